"""Backends as data: who can run a call, and why the others can't.

``auto`` may pick another *implementation* of a spec, never another spec.  A backend named by the
user never falls back.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from sage_diffusion import machine
from sage_diffusion.attend import installation, providers, verdicts
from sage_diffusion.attend.backend import Backend, backend_of
from sage_diffusion.attend.calls import AttentionCall, Call, Run, torch_native
from sage_diffusion.kernels.attention import gluon_support, hopper_support, tuning
from sage_diffusion.kernels.attention.record import Kernels
from sage_diffusion.kernels.spec import LADDER, AttentionSpec


class BackendUnavailable(RuntimeError):
    """No backend can run a call.

    Attributes:
        reasons: why not, by the backends' names.
        brief: the one that matters most, in a line.
    """

    def __init__(self, spec: AttentionSpec, reasons: dict[str, str]):
        self.reasons = reasons
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        super().__init__(f"no backend can run {spec}: {listed}")
        # Triton's serves the most cards: what it lacks is what is to be done.
        first = tuning.KERNELS.name
        name = first if first in reasons or not reasons else next(iter(reasons))
        others = f" and {len(reasons) - 1} others" if len(reasons) > 1 else ""
        self.brief = f"{reasons.get(name, 'no backend')} ({spec} on {name}{others})"


# ---------------------------------------------------------------------- PyTorch
def _refuse_sdpa(call: AttentionCall) -> str | None:
    if call.spec.quantized:
        return "PyTorch's attention is not quantized"
    if call.return_lse:
        return "PyTorch's attention returns no log-sum-exp"
    if call.mask is not None and call.is_causal:
        return "PyTorch's attention takes a mask or is_causal, not both"
    return None


def _sdpa(call: Call, spec: AttentionSpec, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    q, mask = call.q, call.mask
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        mask = mask.to(q.dtype)
    return torch_native(q, call.k, call.v, mask, call.is_causal, call.scale), None


# ---------------------------------------------------------------------- the twin
def _load_reference() -> Run:
    from sage_diffusion.kernels.attention import reference

    def run(call: Call, spec: AttentionSpec, return_lse: bool) -> tuple[Tensor, Tensor | None]:
        return reference.attention(
            *call[:3],
            spec,
            mask=call.mask,
            is_causal=call.is_causal,
            scale=call.scale,
            rope_q=call.rope_q,
            rope_k=call.rope_k,
            sign_seed=call.sign_seed,
        )

    return run


def _twin_is_automatic(call: AttentionCall) -> bool:
    # On a GPU the twin would turn "faster" into "far slower" without a word.
    return call.device != "cuda" or not call.spec.quantized


_SDPA = Backend(
    "sdpa",
    "PyTorch's scaled_dot_product_attention",
    _refuse_sdpa,
    lambda: _sdpa,
    quantizes=False,
    timed=False,  # its kernels are, one by one
)

_REFERENCE = Backend(
    "reference",
    "the Torch twin: every spec on any device, for accuracy and not for speed",
    lambda call: None,
    _load_reference,
    _twin_is_automatic,
    folds_rope=True,
    finite=True,
    timed=False,
)

#: In the order in which "auto" asks them.
BACKENDS: tuple[Backend, ...] = (
    backend_of(gluon_support.KERNELS),
    backend_of(hopper_support.KERNELS),
    backend_of(tuning.KERNELS),
    providers.SAGEATTENTION,
    providers.COMFY_KITCHEN,
    _SDPA,
    _REFERENCE,
)


def names() -> tuple[str, ...]:
    """What ``backend=`` takes."""
    return ("auto", *(b.name for b in BACKENDS))


def ours() -> dict[str, Kernels]:
    """This package's kernels by their backend's name."""
    return {b.name: b.kernels for b in BACKENDS if b.kernels is not None}


def named(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none.
    """
    for record in BACKENDS:
        if record.name == name:
            return record
    listed = ", ".join(b.name for b in BACKENDS)
    raise ValueError(f"backend must be one of {listed}, got {name!r}")


def problems() -> list[str]:
    """What is to be done before our kernels run on this machine, a line each."""
    version = machine.triton_version()
    return installation.problems(version, tuning.TRITON_VERSION, tuning.KERNELS.module)


def refusals(call: AttentionCall) -> dict[str, str | None]:
    """Every backend's answer to a call, None where it can run it.

    Kernels that were found wrong on this card are named too, though they run by name.
    """
    return {b.name: b.refuse(call) or _found_wrong(b, call) for b in BACKENDS}


def _found_wrong(backend: Backend, call: AttentionCall) -> str | None:
    return verdicts.switched_off(call.card, backend.name, call.spec, call.q_shape[-1])


class Answer(NamedTuple):
    """Who can run a call.

    Attributes:
        auto: the backend that "auto" takes, None where nobody can.
        refusals: backend -> why it can't run the call, None where it can.
    """

    auto: str | None
    refusals: dict[str, str | None]


def answers(
    on: torch.device | str, head_dim: int = 128, tokens: int = 4096, mask: str | None = None
) -> dict[str, Answer]:
    """Every spec of the ladder -> who can run a call of it.

    Args:
        on, head_dim, tokens, mask: as in :meth:`.AttentionCall.typical`.
    """
    found = {}
    for name in LADDER:
        spec = AttentionSpec.parse(name)
        call = AttentionCall.typical(spec, on, head_dim, tokens, mask=mask)
        found[name] = Answer(automatic(call), refusals(call))
    return found


def automatic(call: AttentionCall) -> str | None:
    """The backend that "auto" takes, None where nobody can run the call."""
    try:
        return select(call).name
    except BackendUnavailable:
        return None


@functools.lru_cache(maxsize=4096)
def select(
    call: AttentionCall, backend: str = "auto", failed: tuple[tuple[str, str], ...] = ()
) -> Backend:
    """The backend that runs ``call``: the first that does not refuse, or the named one.

    "auto" also leaves out a kernel that was found wrong on this card (:mod:`.verdicts`).

    Args:
        call: what must be computed.
        backend: "auto" or a name.
        failed: ``(name, reason)`` of backends that tried such a call in vain.

    Raises:
        ValueError: no backend has that name.
        BackendUnavailable: nobody can, or the named one can't.
    """
    if backend not in names():
        raise ValueError(f"backend must be one of {', '.join(names())}, got {backend!r}")
    reasons: dict[str, str] = {}
    for candidate in BACKENDS:
        if backend not in ("auto", candidate.name):
            continue
        reason = dict(failed).get(candidate.name) or candidate.refuse(call)
        if reason is None and backend == "auto":
            reason = _found_wrong(candidate, call)
            if reason is None and not candidate.automatic(call):
                reason = f"only by name: {candidate.describes}"
        if reason is None:
            return candidate
        reasons[candidate.name] = reason
    raise BackendUnavailable(call.spec, reasons)


@functools.cache
def load(backend: Backend) -> Run:
    """The backend's ``run``, imported once."""
    return backend.load()
