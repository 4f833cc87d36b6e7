"""``attention()``: validate, choose a backend, run.  The only public way to compute."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_diffusion.attend import ops
from sage_diffusion.attend.calls import Call
from sage_diffusion.attend.execution import compute
from sage_diffusion.attend.validation import check_call, check_rotations, not_forward
from sage_diffusion.kernels.rope import Rope
from sage_diffusion.kernels.spec import DEFAULT, AttentionSpec
from sage_diffusion.plan.signs import SEEDS


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec | str = DEFAULT,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    rope_q: Rope | None = None,
    rope_k: Rope | None = None,
    sign_seed: int | Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T + mask) v``, quantized as ``spec`` says.  Forward only.

    Args:
        q: ``[B, H, Lq, D]`` float16, bfloat16 or float32, any strides, D up to 256.
        k, v: ``[B, Hkv, Lk, D]`` of q's dtype and device; Hkv divides H.
        spec: an :class:`AttentionSpec` or its name; ``"fp16"`` is not quantized.
        mask: boolean (True: attend) or additive float, broadcastable to ``[B, H, Lq, Lk]``.
        is_causal: query i sees keys 0 .. i (PyTorch's alignment), also together with a mask.
        scale: softmax scale, ``1 / sqrt(D)`` if None.
        rope_q, rope_k: rotate q and k first; for self-attention hand the same tables over twice.
            This package's kernels and their twin rotate in float32 as they quantize.  For the other
            backends PyTorch rotates first, and rounds to q's dtype.
        sign_seed: of the signs of the spec's Hadamard rotation, one int32 on q's device or a number
            below 2^31; None is the same as 0.  Another seed rounds to other errors of the same
            size.  A tensor may be changed between calls, and between replays of a captured graph.
        backend: ``"auto"``, or a name of :data:`sage_diffusion.attend.backends.BACKENDS`;
            ``"reference"`` is the Torch twin of the kernels, on any device.
        return_lse: return the natural log-sum-exp ``[B, H, Lq]`` float32 too.

    Returns:
        ``[B, H, Lq, D]`` in q's dtype; with ``return_lse`` a pair.  A fully masked row gives 0 in
        a quantized spec.

    Raises:
        ValueError, TypeError: the tensors or the spec are wrong; says what must hold.
        BackendUnavailable: no backend (or not the named one) can run the call.
        KernelCompilationError: the named backend's kernel does not compile; "auto" tries the next.
        RuntimeError: a derivative is asked for, by grad mode or forward mode, a transform of
            torch.func is around, or the default dtype is float64.
    """
    if isinstance(sign_seed, int):
        if not 0 <= sign_seed < SEEDS:
            raise ValueError(f"sign_seed must be at least 0 and below 2^31, got {sign_seed}")
        sign_seed = torch.full((1,), sign_seed, dtype=torch.int32, device=q.device)
    call = Call(q, k, v, mask, is_causal, scale, rope_q, rope_k, sign_seed)
    if call.wants_grad:
        raise RuntimeError(
            "attention() is forward only, but q, k or v requires grad: use torch.no_grad()"
        )
    parsed = AttentionSpec.parse(spec)
    if torch.compiler.is_compiling():
        check_call(call)
        check_rotations(call)
        out, lse = ops.by_spec(call, str(parsed), backend, return_lse)
        return (out, lse) if return_lse else out
    reason = not_forward(call) if parsed.quantized else None
    if reason is not None:
        raise RuntimeError(reason)
    out, maybe_lse = compute(call, parsed, backend, return_lse)
    if return_lse:
        assert maybe_lse is not None  # a backend that has none refuses `return_lse`
        return out, maybe_lse
    return out
