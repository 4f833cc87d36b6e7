"""Choose launch configurations: measured on the card that is here, or by the cost model.

A candidate that does not compile, does not fit or computes something else is left out with the
reason.  The launches that ship were chosen by the same predictions (``tune --predict``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.attend import backends, launches
from sage_diffusion.attend.calls import AttentionCall
from sage_diffusion.attend.execution import compiler_errors
from sage_diffusion.attend.launches import Entry
from sage_diffusion.kernels.formats import padded_dim
from sage_diffusion.kernels.spec import LADDER, AttentionSpec
from sage_diffusion.machine import version
from sage_diffusion.speed.bench import distance, inputs
from sage_diffusion.speed.timing import Card, Timer

#: Tokens and heads of the call that is measured.
TOKENS, HEADS = 8192, 16

#: A launch changes the order of no sum, so that results agree far better than this.
SAME = 0.01

#: Predicted cycles within this of the best count as equal: the second pipe decides, and then the
#: launch that ships.
CLOSE = 0.02

#: Shared memory that one program may have (CUDA C++ Programming Guide, compute capabilities).
SHARED_MEMORY = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
}


@dataclass(frozen=True)
class Trial:
    """One candidate.

    Attributes:
        launch: its knobs.
        value: milliseconds, or cycles of the predicted bound; None if it is out.
        second: the second pipe's share of the bound, of a prediction.
        note: registers and spills of a prediction, or why the candidate is out.
        built_in: the launch that ships.
    """

    launch: dict[str, int]
    value: float | None
    second: float | None = None
    note: str = ""
    built_in: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class Choice:
    """All candidates of one kernel on one card, and the winner (None if none is left)."""

    backend: str
    spec: AttentionSpec
    head_dim: int
    trials: tuple[Trial, ...]
    best: Trial | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "backend": self.backend,
            "spec": self.spec.formats,
            "head_dim": self.head_dim,
            "best": None if self.best is None else self.best.launch,
            "trials": [trial.as_dict() for trial in self.trials],
        }


def candidates(
    backend: str, arch: str, head_dim: int, spec: AttentionSpec | None = None
) -> list[Any]:
    """Launches to try, the built-in one (for the spec) first.

    Args:
        backend: one whose kernels are ours.
        arch: "sm_89", "gfx942".
        head_dim: padded.
    """
    kernels = backends.ours()[backend]
    shape = (arch, head_dim, spec)
    return list(dict.fromkeys([kernels.launch(*shape), *kernels.candidates(*shape)]))


def specs_of(backend: str, names: Iterable[str] = LADDER) -> list[AttentionSpec]:
    """One spec for every kernel of the backend."""
    kernels = backends.ours()[backend]
    parsed = [spec for spec in map(AttentionSpec.parse, names) if spec.quantized]
    return [spec for spec in parsed if kernels.unsupported_spec(spec) is None]


def measure(
    backend: str,
    spec: AttentionSpec,
    head_dim: int,
    card: Card,
    *,
    arch: str,
    run: Callable[..., Tensor] | None = None,
    tell: Callable[[Trial], None] = lambda trial: None,
    **shape: int,
) -> Choice:
    """Time every candidate of one kernel, quantization included, and take the fastest.

    Args:
        backend, spec, head_dim: the kernel.
        card: where it runs, and its timer.
        arch: of the card.
        run: ``run(q, k, v, spec, launch)``, the backend's attention if None.
        tell: called with every trial.
        shape: ``tokens`` and ``heads`` of the call.
    """
    run = run or functools.partial(_attend, backend)
    q, k, v = inputs(
        1,
        shape.get("heads", HEADS),
        shape.get("tokens", TOKENS),
        head_dim,
        card.device,
        torch.float16,
    )
    expected: Tensor | None = None
    trials: list[Trial] = []
    for candidate in candidates(backend, arch, padded_dim(head_dim), spec):
        call = functools.partial(run, q, k, v, spec, candidate)
        value, why, out = _time(call, card.timer, expected)
        knobs = launches.knobs_of(backends.ours()[backend], candidate)
        trial = Trial(knobs, value, note=why, built_in=not trials)
        expected = out if expected is None else expected
        trials.append(trial)
        tell(trial)
    left = [trial for trial in trials if trial.value is not None]
    best = min(left, key=lambda trial: trial.value or 0.0, default=None)
    return Choice(backend, spec, padded_dim(head_dim), tuple(trials), best)


def _attend(
    backend: str, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, launch: Any
) -> Tensor:
    module = backends.ours()[backend].load()
    return module.attention(q, k, v, spec, tuned=lambda *_: launch)[0]


def _time(
    call: Callable[[], Tensor], timer: Timer, expected: Tensor | None
) -> tuple[float | None, str, Tensor | None]:
    """Milliseconds or None, why not, and the output."""
    try:
        out = call()
        error = 0.0 if expected is None else distance(out, expected)
        if not error <= SAME:
            return None, f"computes something else: relative L1 {error:.3g}", None
        return timer(call).median, "", out
    except compiler_errors() as caught:
        return None, " ".join(str(caught).split()) or type(caught).__name__, None


def predict(
    backend: str,
    spec: AttentionSpec,
    head_dim: int,
    gpu: str,
    *,
    tell: Callable[[Trial], None] = lambda trial: None,
) -> Choice:
    """Predicted bounds of every candidate, from its machine code.

    Args:
        backend, spec, head_dim: the kernel.
        gpu: a card of the cost model.
        tell: called with every trial.

    Raises:
        CostError: a card of that name is unknown, or it can't run the spec.
    """
    from sage_diffusion.speed.cost import CostError, cubin_cost, gpu_named
    from sage_diffusion.speed.cost_compile import compile_attention

    card = gpu_named(gpu)
    trials: list[Trial] = []
    for candidate in candidates(backend, card.arch, padded_dim(head_dim), spec):
        knobs = launches.knobs_of(backends.ours()[backend], candidate)
        reasons: dict[str, str] = {}
        value, second, note = None, None, ""
        try:
            kernel = compile_attention(
                spec, head_dim, card.capability, backend=backend, launch=candidate, reasons=reasons
            )
        except compiler_errors() as caught:
            note = " ".join(str(caught).split())
        else:
            if kernel is None:
                raise CostError(f"{spec} on {backend}: {reasons[str(spec)]}")
            cost = cubin_cost(kernel.cubin, gpu, str(spec), head_dim)
            limit = SHARED_MEMORY[card.arch]
            if kernel.shared > limit:
                note = f"needs {kernel.shared} bytes of shared memory, the card has {limit}"
            elif cost.spills:
                note = f"spills {cost.spills} times"
            else:
                value, second = cost.cycles, cost.second
                note = f"{cost.registers} registers, {cost.bound}, then {cost.second_pipe}"
        trial = Trial(knobs, value, second, note, built_in=not trials)
        trials.append(trial)
        tell(trial)
    return Choice(backend, spec, padded_dim(head_dim), tuple(trials), best_bound(trials))


def best_bound(trials: Sequence[Trial]) -> Trial | None:
    """Least cycles; among close ones the least busy second pipe; then the launch that ships."""
    left = [trial for trial in trials if trial.value is not None]
    for figure in ("value", "second"):
        least = min((getattr(trial, figure) for trial in left), default=0.0)
        left = [trial for trial in left if getattr(trial, figure) <= (1 + CLOSE) * least]
    return min(left, key=lambda trial: not trial.built_in, default=None)


def entries(choices: Sequence[Choice], gpu: str, arch: str, source: str) -> list[Entry]:
    """What to store."""
    triton = version("triton") or version("triton-windows") or "unknown"
    found = []
    for choice in choices:
        best = choice.best
        if best is not None and best.value is not None:
            entry = Entry(
                gpu=gpu,
                triton=triton,
                arch=arch,
                backend=choice.backend,
                formats=choice.spec.formats,
                head_dim=choice.head_dim,
                launch=best.launch,
                source=source,
                value=best.value,
            )
            found.append(entry)
    return found


def refusal(backend: str, spec: AttentionSpec, head_dim: int, arch: str) -> str | None:
    """Why a card has no such kernel, or None."""
    call = AttentionCall.typical(spec, arch, head_dim, TOKENS, dtype=torch.float16)
    return backends.named(backend).refuse(call)
