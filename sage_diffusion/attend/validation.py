"""What ``attention()`` asks of its tensors, in one place: "k must .., got ..".

Limits of one backend (a mask it can't take, an architecture) live with the backend.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sage_diffusion.attend.calls import Call
from sage_diffusion.kernels.rope import check_rope

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def not_forward(call: Call) -> str | None:
    """Why quantized attention, which is forward only and computes in float32, is not what is asked
    for here; None if it is."""
    if call.wants_grad:
        return "gradients are asked for, quantized attention is forward only"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a transform of torch.func (vmap, jvp, ..), unknown to quantized attention"
    # The level is -1 outside of every `dual_level`; unpacking costs microseconds.
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in call[:3]
    ):
        return "forward-mode derivatives are asked for, quantized attention has none"
    if torch.get_default_dtype() is torch.float64:
        return "the default dtype is float64, quantized attention computes in float32"
    return None


def check_call(call: Call) -> None:
    """Raise ValueError or TypeError unless the call is well-formed.

    q must be ``[B, H, Lq, D]``, k and v ``[B, Hkv, Lk, D]``, Hkv a divisor of H, all fp16, bf16 or
    float32 on one device; the mask None, boolean or floating, broadcastable to ``[B, H, Lq, Lk]``.
    """
    q, k, v, mask = call[:4]
    if not (q.ndim == k.ndim == v.ndim == 4):
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.ndim != 4:
                raise ValueError(f"{name} must have shape [B, H, L, D], got {tuple(x.shape)}")
    batch, heads, q_len, dim = q.shape
    kv_heads, k_len = k.shape[1], k.shape[2]
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(
            f"k must have shape [B, Hkv, Lk, D] with B={batch}, D={dim}, got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q's heads must be a multiple of k's, got {heads} and {kv_heads}")
    if q_len == 0 or k_len == 0 or batch == 0:
        raise ValueError(f"q and k must not be empty, got {tuple(q.shape)} and {tuple(k.shape)}")
    if not 1 <= dim <= 256:
        raise ValueError(f"head_dim must be between 1 and 256, got {dim}")
    if q.dtype not in DTYPES:
        raise TypeError(f"q must be float16, bfloat16 or float32, got {q.dtype}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if k.device != q.device or v.device != q.device:
        raise ValueError(
            f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}"
        )
    if mask is not None:
        check_mask(mask, q, k_len)


def check_rotations(call: Call) -> None:
    """Raise ValueError or TypeError unless the tables are None or fit ``[B, H, L, D]``, and the
    seed of the signs is None or one int32 on q's device."""
    seed = call.sign_seed
    if seed is not None and (seed.dtype is not torch.int32 or seed.numel() != 1):
        raise TypeError(f"sign_seed must be one int32, got {seed.dtype} {tuple(seed.shape)}")
    if seed is not None and seed.device != call.q.device:
        raise ValueError(f"sign_seed must be on q's device {call.q.device}, got {seed.device}")
    for name, x, rope in (("q", call.q, call.rope_q), ("k", call.k, call.rope_k)):
        if rope is not None:
            check_rope(rope, x, name)


def check_mask(mask: Tensor, q: Tensor, k_len: int) -> None:
    """Raise unless ``mask`` is boolean or floating and broadcastable to ``[B, H, Lq, Lk]``."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"mask must be boolean or floating, got {mask.dtype}")
    target = (q.shape[0], q.shape[1], q.shape[2], k_len)
    shape = tuple(mask.shape)
    if len(shape) > 4 or any(
        m not in (1, t) for m, t in zip(reversed(shape), reversed(target), strict=False)
    ):
        raise ValueError(f"mask must be broadcastable to [B, H, Lq, Lk] = {target}, got {shape}")
    if mask.device != q.device:
        raise ValueError(f"mask must be on q's device {q.device}, got {mask.device}")


def four_dims(mask: Tensor | None) -> Tensor | None:
    """The mask with leading dims of 1 added, ``[B|1, H|1, Lq|1, Lk|1]``, as a view."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[(None,) * (4 - mask.ndim)]
