"""Attention on a packed past: check the call, choose who computes it, run it."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from sage_diffusion.kernels.kv import reference
from sage_diffusion.kernels.kv.quantize import decode as decode_steps
from sage_diffusion.kernels.kv.sides import Side, Turn, check
from sage_diffusion.kv.parts import Part

#: Rows of Q (query heads of a KV head times queries) beyond which reading the codes once more for
#: every 16 rows costs more than decoding them once.
MOST_ROWS = 256

#: Channels that the Gluon kernel knows, and groups of channels of a token of V.
GLUON_DIMS, GLUON_GAINS = (64, 128, 256), (1, 2, 4, 8)

#: Steps of V that the Gluon kernel knows are below it: it multiplies them by up to 32 in half
#: precision.
MOST_STEP = 2047.0

#: Largest head dim of the Triton kernel.
MOST_DIMS = 256

BACKENDS = ("gluon", "triton", "torch")


@torch.no_grad()
def attend(
    q: Tensor,
    k: Side,
    v: Side,
    scale: float,
    mask: Tensor | None = None,
    turn: Turn | None = None,
    *,
    backend: str = "auto",
) -> Part:
    """Attention of few queries on packed keys and values, which are never unpacked as a whole.

    Args:
        q: ``[B, Hq, L, D]``, floating; Hq a multiple of the heads of K and V.
        k, v: packed sides (:class:`~sage_diffusion.kernels.kv.sides.Side`) of as many tokens.
        scale: of the scores.
        mask: boolean (true: seen) or additive, broadcastable to ``[B, Hq, L, tokens]``.
        turn: RoPE of k, where k was stored before it.
        backend: "gluon" (NVIDIA), "triton", "torch", or "auto": the first that can.

    Returns:
        The output, float32, and its natural log-sum-exp, to be merged with other parts.

    Raises:
        TypeError: a tensor has another type than it must have.
        ValueError: shapes, devices or backend do not fit (the message says why).
    """
    _check(q, k, v, mask)
    if turn is not None and turn.angles.shape != (k.dim // 2,):
        raise ValueError(
            f"turn must have {k.dim // 2} angles, of half of the channels, got "
            f"{tuple(turn.angles.shape)}"
        )
    chosen = choose(q, k, v, backend, before_rope=turn is not None)
    if chosen == "torch":
        return Part(*reference.decode(q, k, v, scale, mask, turn))
    from sage_diffusion.kernels.kv import triton

    if chosen == "triton":
        return Part(*triton.merge(*triton.decode(q, k, v, scale, mask, turn)))
    from sage_diffusion.kernels.kv import gluon

    return Part(*triton.merge(*gluon.decode(q, k, v, scale, mask)))


def choose(q: Tensor, k: Side, v: Side, backend: str = "auto", *, before_rope: bool = False) -> str:
    """Name of the backend that computes a call.

    Args:
        before_rope: whether k must be turned.

    Raises:
        ValueError: there is no such backend, or it can't compute this.
    """
    if backend == "auto":
        return next(name for name in BACKENDS if refuse(name, q, k, v, before_rope) is None)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    reason = refuse(backend, q, k, v, before_rope)
    if reason is not None:
        raise ValueError(f"{backend} can't attend to this on {q.device}: {reason}")
    return backend


def refuse(backend: str, q: Tensor, k: Side, v: Side, before_rope: bool = False) -> str | None:
    """Why a backend can't compute a call, or None."""
    if backend == "torch":
        return None
    reason = refuse_device(q.device)
    if reason is not None:
        return reason
    if backend == "gluon" and torch.version.hip is not None:
        return "needs an NVIDIA card"
    if before_rope:
        reason = _refuse_turn(backend, q, k)
        if reason is not None:
            return reason
    return refuse_shapes(backend, q, k, v)


def refuse_device(device: torch.device) -> str | None:
    """Why no kernel in Triton runs on a device, or None."""
    if device.type != "cuda":
        return "needs a CUDA or ROCm device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton needs sm_80 or newer"
    return None


def _refuse_turn(backend: str, q: Tensor, k: Side) -> str | None:
    """Why keys before RoPE can't be turned."""
    if backend == "gluon":
        return "takes keys after RoPE"
    from sage_diffusion.kernels.attention.tuning import architecture
    from sage_diffusion.kernels.kv import tuning

    return tuning.refuse_turn(architecture(q.device), k.group, k.dim)


def refuse_shapes(backend: str, q: Tensor, k: Side, v: Side) -> str | None:
    """The same, whatever the device."""
    if (k.axis, v.axis) != ("channel", "token"):
        return f"needs keys per channel and values per token, got {k.axis} and {v.axis}"
    if k.dim != v.dim:
        return f"needs as many channels of keys as of values, got {k.dim} and {v.dim}"
    if k.dim > MOST_DIMS:
        return f"needs a head dim of {MOST_DIMS} or less, got {k.dim}"
    rows = q.shape[1] // k.words.shape[1] * q.shape[2]
    if rows > MOST_ROWS:
        return f"reads the codes once for 16 rows of queries, got {rows} rows: decode them once"
    if backend != "gluon":
        return None
    if k.dim not in GLUON_DIMS:
        return f"needs a head dim of {', '.join(map(str, GLUON_DIMS))}, got {k.dim}"
    if v.dim // v.group not in GLUON_GAINS or v.group % 16:
        return f"needs groups of 16 channels or a multiple, at most 8 a token, got {v.group}"
    largest = _largest(v)
    if largest >= MOST_STEP:
        return f"needs steps of values below {MOST_STEP:,.0f}, got {largest:,.0f}"
    return None


def _largest(side: Side) -> float:
    """The largest step; looked up, which waits for the device, only where nobody knows it."""
    if side.largest is not None or not side.tokens:
        return side.largest or 0.0
    groups = side.tokens if side.axis == "token" else -(-side.tokens // side.group)
    return float(decode_steps(side.step[:, :, :groups].amax(), None, side.width)[0])


def _check(q: Tensor, k: Side, v: Side, mask: Tensor | None) -> None:
    check("k", k)
    check("v", v)
    if q.ndim != 4 or not q.is_floating_point():
        raise ValueError(f"q must be floating [B, Hq, L, D], got {q.dtype} {tuple(q.shape)}")
    batch, heads = k.words.shape[:2]
    if v.words.shape[:2] != (batch, heads) or k.tokens != v.tokens:
        raise ValueError(
            f"k and v must have the same batch, heads and tokens, got {(batch, heads, k.tokens)} "
            f"and {(*v.words.shape[:2], v.tokens)}"
        )
    if k.tokens < 1:
        raise ValueError("there must be tokens to attend to, got none")
    if q.shape[0] != batch or q.shape[1] % heads or q.shape[3] != k.dim:
        raise ValueError(
            f"q must be [{batch}, a multiple of {heads}, L, {k.dim}], got {tuple(q.shape)}"
        )
    if not q.device == k.words.device == v.words.device:
        raise ValueError(
            f"q, k and v must be on the same device, got {q.device}, {k.words.device} and "
            f"{v.words.device}"
        )
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be boolean or floating, got {mask.dtype}")
    want = (batch, q.shape[1], q.shape[2], k.tokens)
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(shape) != 4 or any(a not in (1, b) for a, b in zip(shape, want, strict=True)):
        raise ValueError(f"mask must be broadcastable to {want}, got {tuple(mask.shape)}")
