"""Backends as data: who can run a call, and why the others can't.

``auto`` may pick another *implementation* of a spec, never another spec.  A backend named by the
user never falls back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util

import torch
from torch import Tensor

from sage_diffusion.kernels.rope import Rope
from sage_diffusion.kernels.spec import AttentionSpec

#: ``run(q, k, v, spec, mask, is_causal, scale, return_lse)`` -> output and log-sum-exp or None;
#: where a backend folds RoPE also ``rope_q`` and ``rope_k``.
Run = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class AttentionCall:
    """Everything that the choice of a backend may look at.  No tensors inside.

    Attributes:
        q_shape, kv_shape: ``(B, H, Lq, D)`` and ``(B, Hkv, Lk, D)``.
        dtype: of q, k and v.
        device: device type, "cuda" for ROCm too.
        capability: CUDA compute capability, None elsewhere.
        hip_arch: e.g. "gfx1201" on ROCm, None elsewhere.
        mask: None, "bool" or "additive".
        is_causal, return_lse: as in :func:`sage_diffusion.attention`.
        spec: what must be computed.
        rope: q or k is still to be rotated.
    """

    q_shape: tuple[int, ...]
    kv_shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    capability: tuple[int, int] | None
    hip_arch: str | None
    mask: str | None
    is_causal: bool
    return_lse: bool
    spec: AttentionSpec
    rope: bool = False

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        spec: AttentionSpec,
        mask: Tensor | None = None,
        is_causal: bool = False,
        return_lse: bool = False,
        rope: bool = False,
    ) -> AttentionCall:
        """Describe a call."""
        capability, hip_arch = device_arch(q.device)
        kind = None if mask is None else "bool" if mask.dtype == torch.bool else "additive"
        return cls(
            tuple(q.shape),
            tuple(k.shape),
            q.dtype,
            q.device.type,
            capability,
            hip_arch,
            kind,
            is_causal,
            return_lse,
            spec,
            rope,
        )


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Attributes:
        name: what users write in ``backend=``.
        describes: one line for ``doctor``.
        refuse: None if it can run the call, else the reason in words.
        load: imports the implementation on first use.
        folds_rope: it rotates q and k as it quantizes them; for the others PyTorch does before.
        automatic: False if "auto" must not choose it on a GPU (slow or not ours to prefer).
    """

    name: str
    describes: str
    refuse: Callable[[AttentionCall], str | None]
    load: Callable[[], Run]
    automatic: Callable[[AttentionCall], bool] = lambda call: True
    folds_rope: bool = False


class BackendUnavailable(RuntimeError):
    """No backend can run a call; ``reasons`` says why, by name."""

    def __init__(self, spec: AttentionSpec, reasons: dict[str, str]):
        self.reasons = reasons
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        super().__init__(f"no backend can run {spec}: {listed}")


@functools.lru_cache(maxsize=64)
def device_arch(device: torch.device) -> tuple[tuple[int, int] | None, str | None]:
    """``(capability, hip_arch)`` of a device; both None where it is no GPU."""
    if device.type != "cuda":
        return None, None
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return None, name.split(":")[0]
    return torch.cuda.get_device_capability(device), None


@functools.lru_cache(maxsize=16)
def installed(package: str) -> str | None:
    """Version of an installed package, None if it isn't there.  Imports nothing."""
    if util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return "unknown"


@functools.lru_cache(maxsize=1)
def triton_version() -> tuple[int, int] | None:
    """Of ``triton`` or ``triton-windows``, None if neither is installed."""
    if util.find_spec("triton") is None:
        return None
    for name in ("triton", "triton-windows", "pytorch-triton-rocm", "pytorch-triton"):
        try:
            major, minor = metadata.version(name).split(".")[:2]
        except metadata.PackageNotFoundError:
            continue
        return int(major), int(minor)
    return None


# ---------------------------------------------------------------------- our kernels
def _refuse_triton(call: AttentionCall) -> str | None:
    if not call.spec.quantized:
        return "fp16 is not quantized: PyTorch's own attention runs it"
    if call.device != "cuda":
        return f"needs a CUDA or ROCm device, the tensors are on {call.device}"
    from sage_diffusion.kernels.attention import tuning

    return _refuse_triton_version(tuning.triton_version(call.spec)) or tuning.unsupported(
        call.spec, call.capability, call.hip_arch
    )


def _refuse_triton_version(needed: tuple[int, int]) -> str | None:
    """Of a kernel that needs this version of Triton or a newer one."""
    version = triton_version()
    if version is None:
        return "triton is not installed (Windows: pip install triton-windows)"
    if version < needed:
        found = f"found {version[0]}.{version[1]}"
        return f"needs triton {needed[0]}.{needed[1]} or newer, {found}"
    return None


def _refuse_without_gluon(call: AttentionCall, needed: tuple[int, int]) -> str | None:
    """What both kernels in Gluon need."""
    if not call.spec.quantized:
        return "fp16 is not quantized: PyTorch's own attention runs it"
    if call.device != "cuda":
        return f"needs a CUDA device, the tensors are on {call.device}"
    return _refuse_triton_version(needed)


def _refuse_gluon(call: AttentionCall) -> str | None:
    from sage_diffusion.kernels.attention import gluon_support

    return _refuse_without_gluon(call, gluon_support.TRITON_VERSION) or gluon_support.unsupported(
        call.spec, call.capability, call.hip_arch, head_dim=call.q_shape[-1]
    )


def _refuse_hopper(call: AttentionCall) -> str | None:
    from sage_diffusion.kernels.attention import hopper_support

    return _refuse_without_gluon(call, hopper_support.TRITON_VERSION) or hopper_support.unsupported(
        call.spec, call.capability, call.hip_arch, head_dim=call.q_shape[-1]
    )


def _load_gluon() -> Run:
    from sage_diffusion import launches
    from sage_diffusion.kernels.attention import gluon

    return launches.bound(gluon.attention, "gluon")


def _load_hopper() -> Run:
    from sage_diffusion import launches
    from sage_diffusion.kernels.attention import hopper

    return launches.bound(hopper.attention, "hopper")


def _load_triton() -> Run:
    from sage_diffusion import launches
    from sage_diffusion.kernels.attention import triton

    return launches.bound(triton.attention, "triton")


# ---------------------------------------------------------------------- PyTorch
def _refuse_sdpa(call: AttentionCall) -> str | None:
    if call.spec.quantized:
        return "PyTorch's attention is not quantized"
    if call.return_lse:
        return "PyTorch's attention returns no log-sum-exp"
    if call.mask is not None and call.is_causal:
        return "PyTorch's attention takes a mask or is_causal, not both"
    return None


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        mask = mask.to(q.dtype)
    out = torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out, None


# ---------------------------------------------------------------------- the twin
def _load_reference() -> Run:
    from sage_diffusion.kernels.attention import reference

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: AttentionSpec,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        return_lse: bool,
        rope_q: Rope | None = None,
        rope_k: Rope | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        return reference.attention(
            q,
            k,
            v,
            spec,
            mask=mask,
            is_causal=is_causal,
            scale=scale,
            rope_q=rope_q,
            rope_k=rope_k,
        )

    return run


def _twin_is_automatic(call: AttentionCall) -> bool:
    # On a GPU the twin would turn "faster" into "far slower" without a word.
    return call.device != "cuda" or not call.spec.quantized


def _backends() -> tuple[Backend, ...]:
    from sage_diffusion import providers

    return (
        Backend(
            "gluon",
            "this package's kernels whose P stays in registers: INT4, FP4, 8 bit on NVIDIA cards",
            _refuse_gluon,
            _load_gluon,
            folds_rope=True,
        ),
        Backend(
            "hopper",
            "this package's kernel on wgmma whose P stays in registers: INT8 or FP8 with FP8",
            _refuse_hopper,
            _load_hopper,
            folds_rope=True,
        ),
        Backend("triton", "this package's kernels", _refuse_triton, _load_triton, folds_rope=True),
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
        ),
    )


BACKENDS: tuple[Backend, ...] = _backends()

BACKEND_NAMES = ("auto", *(b.name for b in BACKENDS))


def refusals(call: AttentionCall) -> dict[str, str | None]:
    """Every backend's answer to a call, None where it can run it."""
    return {b.name: b.refuse(call) for b in BACKENDS}


@functools.lru_cache(maxsize=4096)
def select(
    call: AttentionCall, backend: str = "auto", failed: tuple[tuple[str, str], ...] = ()
) -> Backend:
    """The backend that runs ``call``: the first that does not refuse, or the named one.

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
        if reason is None and backend == "auto" and not candidate.automatic(call):
            reason = f"only by name: {candidate.describes}"
        if reason is None:
            return candidate
        reasons[candidate.name] = reason
    raise BackendUnavailable(call.spec, reasons)


@functools.cache
def load(backend: Backend) -> Run:
    """The backend's ``run``, imported once."""
    return backend.load()
