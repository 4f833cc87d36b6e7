"""Calibrate a language model of transformers: what its K, V and gradients are like on some text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import get_layer_types_and_kwargs

from sage_diffusion.integrations.transformers.rope import ModelRope, model_rope, text_config
from sage_diffusion.integrations.transformers.tap import Tap
from sage_diffusion.kv.calibration import Calibration, CalibrationError
from sage_diffusion.kv.moments import QUERIES, LayerMoments, calibration_of


@dataclass(frozen=True)
class Recipe:
    """How a model is calibrated.

    Attributes:
        chunk: tokens of a text that are looked at together; longer texts are cut.
        scored: last tokens of a chunk, whose loss is differentiated.
        gap: tokens between these and the last K whose gradients count: the exact window's errors
            are none, so its gradients are of no interest.
        sink: first tokens, which count nowhere.
        draws: labels drawn from the model for each token, a backward pass each; 0 for plain
            covariance (PCA).
        seed: of the draws.

    Raises:
        ValueError: one is too small; nothing of a chunk would be left to look at.
    """

    chunk: int = 1280
    scored: int = 512
    gap: int = 128
    sink: int = 32
    draws: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, {"scored": 1, "gap": 0, "sink": 0, "draws": 0})
        if self.chunk <= self.least:
            raise ValueError(f"chunk must have more than {self.least} tokens, got {self.chunk}")

    @property
    def least(self) -> int:
        """Tokens that a chunk must exceed."""
        return self.sink + 2 * self.gap + self.scored


def check_least(settings: Any, least: Mapping[str, float]) -> None:
    """Raise ValueError where one of these attributes is smaller than it may be."""
    for name, smallest in least.items():
        if not (value := getattr(settings, name)) >= smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}")


def calibrate(
    model: nn.Module,
    texts: Sequence[str | Tensor],
    tokenizer: Any = None,
    *,
    recipe: Recipe = Recipe(),
    report: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Calibrate ``model`` on ``texts``, which should not be what is judged by later.

    Args:
        texts: strings, or token ids ``[n]`` int64.
        tokenizer: turns strings into ids.
        report: is told of each chunk.

    Raises:
        CalibrationError: there is too little text, or a model whose attention is not seen.
    """
    parts = [x for text in texts for x in token_ids(text, tokenizer).split(recipe.chunk)]
    chunks = [x for x in parts if x.numel() > recipe.least]
    if not chunks:
        raise CalibrationError(
            f"a text must have more than {recipe.least} tokens, none of the {len(texts)} has"
        )
    config = text_config(model)
    kinds = get_layer_types_and_kwargs(config)[0]
    layers = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    moments = {i: LayerMoments() for i in layers}
    watch = _Watch(model, heads, moments, recipe, len(kinds))
    for number, ids in enumerate(chunks):
        watch.run(ids)
        report(f"chunk {number + 1} of {len(chunks)}: {ids.numel()} tokens")
    about = {
        "model": type(model).__name__,
        "tokens": sum(ids.numel() for ids in chunks),
        "gradients": moments[layers[0]].gradients,
        "rope": watch.rope is not None,
        **vars(recipe),
    }
    return calibration_of(model, moments, heads, about)


def token_ids(text: str | Tensor, tokenizer: Any) -> Tensor:
    """Ids ``[n]`` of a text, which may be ids already.

    Raises:
        CalibrationError: it is a string, and there is no tokenizer.
    """
    if isinstance(text, Tensor):
        return text
    if tokenizer is None:
        raise CalibrationError("texts that are strings need the model's tokenizer")
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids[0]
    return ids


class _Watch:
    """One forward pass, and some backward, over a chunk: what every layer's attention is given."""

    def __init__(
        self,
        model: nn.Module,
        heads: int,
        moments: dict[int, LayerMoments],
        recipe: Recipe,
        layers: int,
    ):
        self.model, self.heads, self.moments = model, heads, moments
        self.recipe, self.layers, self.rope = recipe, layers, model_rope(model)
        self._draw = torch.Generator().manual_seed(recipe.seed)

    def run(self, ids: Tensor) -> None:
        """Add a chunk ``[n]`` to the moments."""
        found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

        def seen(number: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            found[number] = q.detach()[:, :, -QUERIES:], k, v.detach()
            return k, v

        model: Any = self.model
        ids = ids[None].to(next(model.parameters()).device)
        with torch.set_grad_enabled(self.recipe.draws > 0), Tap(seen, self.heads) as tap:
            embedded = model.get_input_embeddings()(ids)
            embedded = embedded.detach().requires_grad_(self.recipe.draws > 0)
            logits = model(
                inputs_embeds=embedded, use_cache=False, logits_to_keep=self.recipe.scored
            ).logits[0]
        if tap.calls != self.layers:
            raise CalibrationError(
                f"each of the {self.layers} layers must call scaled_dot_product_attention once, "
                f"{tap.calls} calls were seen: load the model with attn_implementation='sdpa'"
            )
        if self.recipe.draws:
            self._gradients(logits, {i: found[i][1] for i in self.moments})
        for i, moments in self.moments.items():
            self._add(moments, *found[i])

    def _gradients(self, logits: Tensor, k: dict[int, Tensor]) -> None:
        """Moments of the gradients of ``-log p`` of labels that are drawn from the model."""
        logs = logits.float().log_softmax(-1)
        chances = logs.detach().exp().cpu()
        stop = k[min(k)].shape[2] - self.recipe.scored - self.recipe.gap
        for draw in range(self.recipe.draws):
            labels = torch.multinomial(chances, 1, generator=self._draw).to(logs.device)
            loss = -logs.gather(1, labels).sum()
            last = draw == self.recipe.draws - 1
            for i, g in zip(
                k, torch.autograd.grad(loss, list(k.values()), retain_graph=not last), strict=True
            ):
                self.moments[i].add_gradient(self._flat(g)[self.recipe.sink : stop])

    def _flat(self, k: Tensor) -> Tensor:
        """``[1, H, n, D]`` after RoPE -> ``[n, H D]`` before it, on the CPU."""
        k = _unrotated(k.detach(), self.rope)
        return k[0].transpose(0, 1).flatten(1).cpu()

    def _add(self, moments: LayerMoments, q: Tensor, k: Tensor, v: Tensor) -> None:
        k = k.detach()
        moments.add(q, k, v, self._flat(k), self.recipe.sink, self.recipe.gap)


def _unrotated(k: Tensor, rope: ModelRope | None) -> Tensor:
    if rope is None:
        return k.float()
    positions = torch.arange(k.shape[2], device=k.device)[None]
    return rope.rotate(k, positions, inverse=True)
