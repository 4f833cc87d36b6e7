"""Train MatryoshkaKV's rotations (2410.14731): every prefix of a head's coordinates should do.

The rotations start from the principal components of a calibration and stay orthogonal by Cayley's
formula.  Each step draws a rank for every layer, side and head and lowers the KL between the model
with its exact past and with the projected one.  Sink and window are exact, as they are in a cache.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sage_diffusion.integrations.transformers.kv_calibration import check_least, token_ids
from sage_diffusion.kv.calibration import Calibration, CalibrationError, fingerprint

_LEAST = {
    "steps": 1,
    "rate": 0,
    "sink": 0,
    "window": 0,
    "levels": 1,
    "draws": 1,
    "held": 2,  # of 1 none would be left to train on
    "measured": 1,
}


@dataclass(frozen=True)
class Training:
    """How rotations are trained.

    Attributes:
        steps: one chunk each.
        chunk: tokens that are looked at together.
        rate: of Adam, after five rising steps, falling as a cosine.
        sink, window: first and last tokens before each query that are exact.
        levels: a rank is one of so many equal parts of a head's channels.
        draws: labels drawn for each token where ranks' losses are estimated.
        held: every so many chunks one is left out and tells whether training helped.
        measured: chunks on which ranks' losses are estimated, at most.
        seed: of chunks, ranks and labels.

    Raises:
        ValueError: one is too small; a chunk has no token that sees a projected one.
    """

    steps: int = 24
    chunk: int = 384
    rate: float = 5e-3
    sink: int = 32
    window: int = 128
    levels: int = 8
    draws: int = 2
    held: int = 8
    measured: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, _LEAST)
        if self.chunk <= self.sink + self.window:
            raise ValueError(
                f"a chunk must have more tokens than sink and window together "
                f"({self.sink + self.window}), got {self.chunk}"
            )


def train(
    model: nn.Module,
    calibration: Calibration,
    texts: Sequence[str | Tensor],
    tokenizer: Any = None,
    *,
    training: Training = Training(),
    report: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """A calibration whose rotations are trained, and which knows what each rank loses.

    Where the KL of held-out chunks at half of the channels has not fallen, the principal components
    stay; ``about["matryoshka"]`` has both figures.

    Args:
        calibration: of this model.
        texts: strings, or token ids ``[n]`` int64; not what is judged by later.
        tokenizer: turns strings into ids.
        report: is told of every tenth step.

    Raises:
        CalibrationError: there is too little text, a calibration of another model, or a model whose
            attention is not seen.
    """
    calibration.check(fingerprint(model))
    chunks = _chunks(texts, tokenizer, training)
    held = chunks[:: training.held]
    seen = [chunk for i, chunk in enumerate(chunks) if i % training.held]
    wanted = [x.requires_grad for x in model.parameters()]
    model.requires_grad_(False)
    try:
        student = _Student(model, calibration, training)
        start = student.basis
        before = student.half(held, start)
        basis = _trained(student, seen, training, report)
        after = student.half(held, basis)
        basis = basis if after < before else start
        losses = _losses(student, chunks[: training.measured], basis, training)
    finally:
        for x, want in zip(model.parameters(), wanted, strict=True):
            x.requires_grad_(want)
    found = {"before": before, "after": after, "trained": after < before, **asdict(training)}
    return dataclasses.replace(
        calibration,
        tensors=calibration.tensors | {"post.basis": basis.half().cpu(), "post.losses": losses},
        about=calibration.about | {"matryoshka": found},
    )


def _chunks(texts: Sequence[str | Tensor], tokenizer: Any, training: Training) -> list[Tensor]:
    parts = [x for text in texts for x in token_ids(text, tokenizer).split(training.chunk)]
    found = [x for x in parts if x.numel() == training.chunk]
    if len(found) < 2:
        raise CalibrationError(
            f"there must be two chunks of {training.chunk} tokens to train on, got {len(found)}"
        )
    return found


class _Student:
    """A model whose older K and V are projected, beside itself with exact ones.

    Attributes:
        basis: ``[L, 2, H, D, D]`` float32, where training starts.
    """

    def __init__(self, model: nn.Module, calibration: Calibration, training: Training):
        self._model: Any = model
        self._device = next(model.parameters()).device
        mean, basis = (calibration.tensors[f"post.{name}"] for name in ("mean", "basis"))
        self._mean, self.basis = (x.float().to(self._device) for x in (mean, basis))
        self._calibration, self._training = calibration, training
        self._first = training.sink + training.window  # the first query with a projected token

    def logs(self, chunk: Tensor, basis: Tensor, gates: Tensor) -> Tensor:
        """Log probabilities ``[n, vocabulary]`` of the tokens that see projected ones.

        Args:
            gates: ``[L, 2, H, D]``, factors of the coordinates.
        """
        projecting = _Projecting(self._calibration, self._mean, basis, gates, self._training)
        with projecting:
            found = self._logits(chunk)
        projecting.check()
        return found

    def _logits(self, chunk: Tensor) -> Tensor:
        count = chunk.numel() - self._first
        out = self._model(chunk[None].to(self._device), use_cache=False, logits_to_keep=count)
        logs: Tensor = out.logits[0].float().log_softmax(-1)
        return logs

    def divergence(self, chunk: Tensor, basis: Tensor, gates: Tensor) -> Tensor:
        """Mean KL of a token, nats."""
        with torch.no_grad():  # again each time: a vocabulary's logits of all chunks are gigabytes
            want = self._logits(chunk)
        logs = self.logs(chunk, basis, gates)
        return (want.exp() * (want - logs)).sum(-1).mean()

    @torch.no_grad()
    def half(self, chunks: list[Tensor], basis: Tensor) -> float:
        """Mean KL over chunks with half of every head's coordinates."""
        gates = torch.zeros_like(self._mean)
        gates[..., : gates.shape[-1] // 2] = 1
        return sum(float(self.divergence(x, basis, gates)) for x in chunks) / len(chunks)


class _Projecting(TorchFunctionMode):
    """Attention whose K and V of older tokens are projected, of the layers of a calibration."""

    def __init__(
        self,
        calibration: Calibration,
        mean: Tensor,
        basis: Tensor,
        gates: Tensor,
        training: Training,
    ):
        super().__init__()
        self._rows = {layer: row for row, layer in enumerate(calibration.layers)}
        self._mean, self._basis, self._gates = mean, basis, gates
        self._training, self._calls = training, 0

    def check(self) -> None:
        """Raise CalibrationError unless every layer was seen."""
        if self._calls <= max(self._rows):
            raise CalibrationError(
                f"each of {max(self._rows) + 1} layers must call scaled_dot_product_attention, "
                f"{self._calls} calls were seen: load the model with attn_implementation='sdpa'"
            )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        row = self._rows.get(self._calls)
        self._calls += 1
        if row is None:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        q, k, v = (args[i] if i < len(args) else kwargs[n] for i, n in enumerate(names))
        return self._attend(row, q, k, v, kwargs.get("scale") or q.shape[-1] ** -0.5)

    def _attend(self, row: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        heads, tokens = self._mean.shape[2], q.shape[2]
        k, v = (x[:, :: x.shape[1] // heads] for x in (k, v))  # where the model repeats heads
        old_k, old_v = (self._projected(row, side, x) for side, x in enumerate((k, v)))
        at = torch.arange(tokens, device=q.device)
        apart = at[:, None] - at
        exact = (apart < self._training.window) | (at < self._training.sink)
        grouped = q.unflatten(1, (heads, -1))  # [B, H, G, T, D]
        near, far = (grouped @ x[:, :, None].transpose(3, 4) for x in (k, old_k))
        scores = torch.where(exact, near, far)
        p = (scores * scale).masked_fill(apart < 0, -math.inf).softmax(-1)
        out = (p * exact) @ v[:, :, None] + (p * ~exact) @ old_v[:, :, None]
        return out.flatten(1, 2)

    def _projected(self, row: int, side: int, x: Tensor) -> Tensor:
        mean, basis = self._mean[row, side][:, None], self._basis[row, side]
        coordinates = (x - mean) @ basis * self._gates[row, side][:, None]
        return coordinates @ basis.mT + mean


def _trained(
    student: _Student, chunks: list[Tensor], training: Training, report: Callable[[str], None]
) -> Tensor:
    """Rotations after training, ``[L, 2, H, D, D]``."""
    start, dim = student.basis, student.basis.shape[-1]
    free = torch.zeros_like(start, requires_grad=True)
    draw = torch.Generator().manual_seed(training.seed)
    adam = torch.optim.Adam([free])
    order: list[int] = []
    for step in range(training.steps):
        falling = (1 + math.cos(math.pi * step / training.steps)) / 2
        adam.param_groups[0]["lr"] = training.rate * min(1, (step + 1) / 5) * falling
        order = order or torch.randperm(len(chunks), generator=draw).tolist()
        ranks = torch.randint(1, training.levels + 1, start.shape[:3], generator=draw)
        gates = torch.arange(dim) * training.levels < (ranks * dim)[..., None]
        loss = student.divergence(chunks[order.pop()], start @ cayley(free), gates.to(start))
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step % 10 == 9:
            report(f"step {step + 1} of {training.steps}: KL {loss.item():.4f}")
    return (start @ cayley(free)).detach()


def cayley(free: Tensor) -> Tensor:
    """An orthogonal matrix ``(I - S / 2)^-1 (I + S / 2)``, S = free - free'; of zeros it is I."""
    half = (free - free.mT) / 2
    one = torch.eye(free.shape[-1], device=free.device)
    return torch.linalg.solve(one - half, one + half)


def _losses(student: _Student, chunks: list[Tensor], basis: Tensor, training: Training) -> Tensor:
    """What keeping the first 0 .. D coordinates of one head alone costs, ``[L, 2, H, D + 1]``.

    Half the second moment of the gradient of ``-log p`` along the coordinates that are dropped,
    with labels drawn from the model: the KL to second order, where the paper measures one head
    after another.
    """
    gates = torch.ones(basis.shape[:-1], device=basis.device, requires_grad=True)
    draw = torch.Generator().manual_seed(training.seed)
    total = torch.zeros(basis.shape[:-1], dtype=torch.float64)
    tokens = 0
    for chunk in chunks:
        logs = student.logs(chunk, basis, gates)
        chances = logs.detach().exp().cpu()
        for left in reversed(range(training.draws)):
            labels = torch.multinomial(chances, 1, generator=draw).to(logs.device)
            loss = -logs.gather(1, labels).sum()
            (found,) = torch.autograd.grad(loss, gates, retain_graph=left > 0)
            tail = found.double().cpu().flip(-1).cumsum(-1).flip(-1)  # all from here on
            total += tail.square() / 2
            tokens += logs.shape[0]
    worst = (total / tokens).flip(-1).cummax(-1).values.flip(-1)
    return torch.cat([worst, torch.zeros_like(worst[..., :1])], -1).float()
