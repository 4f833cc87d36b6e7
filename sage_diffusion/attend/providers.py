"""Other packages' kernels as backends, where their numerics equal the spec.

Which spec a kernel computes is decided by its formats: Q and K, P and V, the accumulator, and
whether it smooths and rotates.  Scales "per thread" (32 scales per 128 query rows) are as accurate
as one per token (SageAttention2, 2411.10958 table 6) and count as such.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sage_diffusion.attend.backend import Backend
from sage_diffusion.attend.calls import AttentionCall, Call, Run
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.machine import installed

#: SageAttention 2's CUDA functions by spec and by the capabilities they are compiled for.
_FP8 = "sageattn_qk_int8_pv_fp8_cuda"
_SAGE2 = {
    "int8/fp16-rotate-balance": ("sageattn_qk_int8_pv_fp16_cuda", {"pv_accum_dtype": "fp32"}),
    "int8/fp8-rotate-balance": (_FP8, {"pv_accum_dtype": "fp32+fp32"}),
    "int8/fp8-fast-rotate-balance": (_FP8, {"pv_accum_dtype": "fp32+fp16"}),
}

#: SageAttention 1 (Triton): per-block INT8, FP16 P V, K smoothed.
_SAGE1_SPEC = "int8/fp16-rotate-balance+block"


_KITCHEN_SPEC = "int8/int8-smooth_v-balance-tile_v"


def _refuse_common(call: AttentionCall, package: str) -> str | None:
    if installed(package) is None:
        return f"{package.replace('_', '-')} is not installed"
    if call.device != "cuda":
        return f"needs a GPU, the tensors are on {call.device}"
    return None


def refuse_sageattention(call: AttentionCall) -> str | None:
    """None if the installed sageattention computes this call's spec exactly as asked."""
    if reason := _refuse_common(call, "sageattention"):
        return reason
    if call.mask is not None:
        return "sageattention drops masks"
    if call.dtype == torch.float32:
        return "sageattention takes fp16 and bf16, got float32"
    if call.is_causal and call.q_shape[2] != call.kv_shape[2]:
        return "sageattention is causal for equal lengths only"
    if call.capability is None:
        return "sageattention needs an NVIDIA GPU"
    name, version = str(call.spec), installed("sageattention") or ""
    if version.startswith("1."):
        if name != _SAGE1_SPEC:
            return f"sageattention {version} computes {_SAGE1_SPEC}, not {name}"
        if call.q_shape[3] not in (64, 96, 128):
            return f"sageattention {version} takes head_dim 64, 96 or 128, got {call.q_shape[3]}"
        if call.return_lse:
            return f"sageattention {version} returns no log-sum-exp"
        return None
    if name not in _SAGE2:
        return f"sageattention {version} computes {', '.join(_SAGE2)}, not {name}"
    if call.q_shape[3] > 128:
        return f"sageattention takes head_dim up to 128, got {call.q_shape[3]}"
    if "fp8" in name and call.capability not in ((8, 9), (12, 0), (12, 1)):
        return "sageattention's FP8 kernel is built for sm_89 and sm_120"
    if call.capability < (8, 0):
        return f"sageattention needs sm_80 or newer, this is sm_{_sm(call.capability)}"
    return None


def load_sageattention() -> Run:
    """sageattention's function for the spec, called with ``[B, H, L, D]``."""
    import sageattention

    def run(call: Call, spec: AttentionSpec, return_lse: bool) -> tuple[Tensor, Tensor | None]:
        q, k, v, is_causal, scale = *call[:3], call.is_causal, call.scale
        name = str(spec)
        if name == _SAGE1_SPEC:
            # Version 1 subtracts K's mean in place: give it a copy.
            out = sageattention.sageattn(
                q, k.clone(), v, tensor_layout="HND", is_causal=is_causal, sm_scale=scale
            )
            return out, None
        function, options = _SAGE2[name]
        kernel: Callable[..., Tensor | tuple[Tensor, Tensor]] = getattr(sageattention, function)
        result = kernel(
            q,
            k,
            v,
            tensor_layout="HND",
            is_causal=is_causal,
            sm_scale=scale,
            smooth_k=True,
            return_lse=return_lse,
            **options,
        )
        return result if isinstance(result, tuple) else (result, None)

    return run


def refuse_comfy_kitchen(call: AttentionCall) -> str | None:
    """None if comfy-kitchen's INT8 attention serves the call.

    It computes INT8 Q K^T (rotated, K stabilized by one key instead of the mean), an unsigned 8-bit
    P and a V that is not smoothed.
    """
    if reason := _refuse_common(call, "comfy_kitchen"):
        return reason
    if str(call.spec) != _KITCHEN_SPEC:
        return f"comfy-kitchen computes {_KITCHEN_SPEC}, not {call.spec}"
    if call.is_causal:
        return "comfy-kitchen's attention is not causal"
    if call.return_lse:
        return "comfy-kitchen returns no log-sum-exp"
    if call.capability is not None and call.capability < (7, 5):
        return f"comfy-kitchen needs sm_75 or newer, this is sm_{_sm(call.capability)}"
    if call.hip_arch is not None and not call.hip_arch.startswith(("gfx11", "gfx12")):
        return f"comfy-kitchen needs RDNA3 or newer, this is {call.hip_arch}"
    return None


def load_comfy_kitchen() -> Run:
    """comfy-kitchen's ``int8_attention``, called with ``[B, H, L, D]``."""
    import comfy_kitchen

    def run(call: Call, spec: AttentionSpec, return_lse: bool) -> tuple[Tensor, Tensor | None]:
        out = comfy_kitchen.int8_attention(*call[:3], scale=call.scale, attn_mask=call.mask)
        return out, None

    return run


def _sm(capability: tuple[int, int]) -> str:
    return f"{capability[0]}{capability[1]}"


SAGEATTENTION = Backend(
    "sageattention",
    "the sageattention package, where its numerics equal the spec",
    refuse_sageattention,
    load_sageattention,
)

COMFY_KITCHEN = Backend(
    "comfy_kitchen",
    "the comfy-kitchen package's INT8 attention",
    refuse_comfy_kitchen,
    load_comfy_kitchen,
    library="comfy_kitchen",
)
