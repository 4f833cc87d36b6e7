"""Backends as data: who can run a call, and why the others can't.

``auto`` may pick another *implementation* of a spec, never another spec.  A backend named by the
user never falls back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sage_diffusion.attend import installation, providers, verdicts
from sage_diffusion.attend.calls import AttentionCall, Call, Run, torch_native
from sage_diffusion.kernels.spec import LADDER, AttentionSpec
from sage_diffusion.machine import triton_version

#: Where our kernels are.
_KERNELS = "sage_diffusion.kernels.attention"


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Attributes:
        name: what users write in ``backend=``.
        describes: one line for ``doctor``.
        refuse: None if it can run the call, else the reason in words.
        load: imports the implementation on first use.
        folds_rope: it rotates q and k as it quantizes them; for the others PyTorch does before.
        finite: of finite inputs it makes finite outputs, scores beyond float32's resolution (2^27
            in log2 units) excepted; the others' outputs lose their NaN before a model sees them.
        automatic: False if "auto" must not choose it on a GPU (slow or not ours to prefer).
    """

    name: str
    describes: str
    refuse: Callable[[AttentionCall], str | None]
    load: Callable[[], Run]
    automatic: Callable[[AttentionCall], bool] = lambda call: True
    folds_rope: bool = False
    finite: bool = False


class BackendUnavailable(RuntimeError):
    """No backend can run a call; ``reasons`` says why, by name."""

    def __init__(self, spec: AttentionSpec, reasons: dict[str, str]):
        self.reasons = reasons
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        super().__init__(f"no backend can run {spec}: {listed}")


# ---------------------------------------------------------------------- our kernels
def _refuse_triton(call: AttentionCall) -> str | None:
    if not call.spec.quantized:
        return "fp16 is not quantized: PyTorch's own attention runs it"
    if call.device != "cuda":
        return f"needs a CUDA or ROCm device, the tensors are on {call.device}"
    from sage_diffusion.kernels.attention import tuning

    needed = tuning.triton_version(call.spec)
    return _refuse_triton_version(needed, "triton") or tuning.unsupported(
        call.spec, call.capability, call.hip_arch
    )


def _refuse_triton_version(needed: tuple[int, int], kernels: str) -> str | None:
    """Of a kernel that needs this version of Triton or a newer one."""
    return installation.refuse_triton(triton_version(), needed, f"{_KERNELS}.{kernels}")


def _refuse_without_gluon(call: AttentionCall, needed: tuple[int, int], kernels: str) -> str | None:
    """What both kernels in Gluon need."""
    if not call.spec.quantized:
        return "fp16 is not quantized: PyTorch's own attention runs it"
    if call.device != "cuda":
        return f"needs a CUDA device, the tensors are on {call.device}"
    return _refuse_triton_version(needed, kernels)


def _refuse_gluon(call: AttentionCall) -> str | None:
    from sage_diffusion.kernels.attention import gluon_support

    needed = gluon_support.TRITON_VERSION
    return _refuse_without_gluon(call, needed, "gluon") or gluon_support.unsupported(
        call.spec, call.capability, call.hip_arch, head_dim=call.q_shape[-1]
    )


def _refuse_hopper(call: AttentionCall) -> str | None:
    from sage_diffusion.kernels.attention import hopper_support

    needed = hopper_support.TRITON_VERSION
    return _refuse_without_gluon(call, needed, "hopper") or hopper_support.unsupported(
        call.spec, call.capability, call.hip_arch, head_dim=call.q_shape[-1]
    )


def run_kernel(
    attention: Callable[..., tuple[Tensor, Tensor | None]],
    call: Call,
    spec: AttentionSpec,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """A kernel's entry on a call; kernels know no calls."""
    q, k, v, mask, is_causal, scale, *ropes = call
    return attention(
        q, k, v, spec, mask, is_causal, scale, return_lse, rope_q=ropes[0], rope_k=ropes[1]
    )


def _load_gluon() -> Run:
    from sage_diffusion.attend import launches
    from sage_diffusion.kernels.attention import gluon

    return functools.partial(run_kernel, launches.bound(gluon.attention, "gluon"))


def _load_hopper() -> Run:
    from sage_diffusion.attend import launches
    from sage_diffusion.kernels.attention import hopper

    return functools.partial(run_kernel, launches.bound(hopper.attention, "hopper"))


def _load_triton() -> Run:
    from sage_diffusion.attend import launches
    from sage_diffusion.kernels.attention import triton

    return functools.partial(run_kernel, launches.bound(triton.attention, "triton"))


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
        )

    return run


def _twin_is_automatic(call: AttentionCall) -> bool:
    # On a GPU the twin would turn "faster" into "far slower" without a word.
    return call.device != "cuda" or not call.spec.quantized


def _backends() -> tuple[Backend, ...]:
    return (
        Backend(
            "gluon",
            "this package's kernels whose P stays in registers: INT4, FP4, 8 bit on NVIDIA cards",
            _refuse_gluon,
            _load_gluon,
            folds_rope=True,
            finite=True,
        ),
        Backend(
            "hopper",
            "this package's kernel on wgmma whose P stays in registers: INT8 or FP8 with FP8",
            _refuse_hopper,
            _load_hopper,
            folds_rope=True,
            finite=True,
        ),
        Backend(
            "triton",
            "this package's kernels",
            _refuse_triton,
            _load_triton,
            folds_rope=True,
            finite=True,
        ),
        Backend(
            "sageattention",
            "the sageattention package, where its numerics equal the spec",
            providers.refuse_sageattention,
            providers.load_sageattention,
        ),
        Backend(
            "comfy_kitchen",
            "the comfy-kitchen package's INT8 attention",
            providers.refuse_comfy_kitchen,
            providers.load_comfy_kitchen,
        ),
        Backend("sdpa", "PyTorch's scaled_dot_product_attention", _refuse_sdpa, lambda: _sdpa),
        Backend(
            "reference",
            "the Torch twin: every spec on any device, for accuracy and not for speed",
            lambda call: None,
            _load_reference,
            _twin_is_automatic,
            folds_rope=True,
            finite=True,
        ),
    )


BACKENDS: tuple[Backend, ...] = _backends()

BACKEND_NAMES = ("auto", *(b.name for b in BACKENDS))


def problems() -> list[str]:
    """What is to be done before our kernels run on this machine, a line each."""
    from sage_diffusion.kernels.attention import tuning

    return installation.problems(triton_version(), tuning.TRITON_VERSION, f"{_KERNELS}.triton")


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
    if backend not in BACKEND_NAMES:
        raise ValueError(f"backend must be one of {', '.join(BACKEND_NAMES)}, got {backend!r}")
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
