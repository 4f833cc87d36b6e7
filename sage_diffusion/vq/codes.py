"""Nearest-code search: check the call, choose who computes it, run it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from sage_diffusion.kernels.vq import blocks, reference
from sage_diffusion.kernels.vq.terms import METRICS, Terms, terms

#: Largest codebook and latent.
MOST_CODES, MOST_DIMS = 1 << 20, 2048

Search = Callable[[Tensor, Tensor, Terms], Tensor]


def nearest_code(
    z: Tensor, table: Tensor, metric: str = "l2", *, backend: str = "auto", rounded: bool = False
) -> Tensor:
    """Id of the code that is nearest to each latent; the lowest id where several are.

    Exact for the numbers given: float32 is multiplied in float32, BF16 and FP16 are widened.  Never
    holds latents x codes.

    Args:
        z: ``[N, D]``, floating, finite, 3 <= D <= 2048 (1 and 2 work too).
        table: ``[K, D]``, K up to 2^20.
        metric: "l2" (least ``|z - c|``), "cosine" (largest cosine) or "dot" (largest ``z . c``).
        backend: "triton", "torch", "reference", or "auto": Triton on a GPU, Torch elsewhere.
        rounded: look for candidates with operands rounded to BF16, on the tensor cores, and score
            only those in float32: faster for float32 on a GPU, and now and then the second nearest.

    Returns:
        ``[N]`` int64 on the device of ``z``.

    Raises:
        ValueError: shapes, metric, backend or devices do not fit; ``z`` is not finite; or the
            backend can't run here (the message says why).
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    _check(z, table)
    return best_code(z, table, terms(table, metric), backend=backend, rounded=rounded)


@torch.no_grad()
def best_code(
    z: Tensor, table: Tensor, given: Terms, *, backend: str = "auto", rounded: bool = False
) -> Tensor:
    """As :func:`nearest_code` for scores ``(z . c) * scale + bias`` of any scale and bias."""
    _check(z, table)
    if not len(z):
        return torch.empty(0, dtype=torch.int64, device=z.device)
    if not bool(torch.isfinite(z).all()):
        raise ValueError("latents must be finite, got NaN or infinity")
    return _search(choose(z.device, backend), rounded)(z.detach(), table.detach(), given)


def choose(device: torch.device, backend: str = "auto") -> str:
    """Name of the backend that computes on a device.

    Raises:
        ValueError: there is no such backend, or it can't run there.
    """
    reasons = {"triton": _refuse_triton(device), "torch": None, "reference": None}
    if backend == "auto":
        return next(name for name, reason in reasons.items() if reason is None)
    if backend not in reasons:
        raise ValueError(f"backend must be one of auto, {', '.join(reasons)}, got {backend!r}")
    reason = reasons[backend]
    if reason is not None:
        raise ValueError(f"{backend} can't search on {device}: {reason}")
    return backend


def _refuse_triton(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA or ROCm device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton needs sm_80 or newer"
    return None


def _search(backend: str, rounded: bool) -> Search:
    if backend == "triton":
        from sage_diffusion.kernels.vq import triton

        return lambda z, table, given: triton.nearest_code(z, table, given, rounded=rounded)
    if backend == "reference" or rounded:
        return lambda z, table, given: reference.nearest_code(z, table, given, rounded=rounded)
    return blocks.nearest_code


def _check(z: Tensor, table: Tensor) -> None:
    for name, x in (("z", z), ("table", table)):
        if x.ndim != 2 or not x.is_floating_point():
            raise ValueError(
                f"{name} must be a floating matrix, got {x.dtype} of shape {tuple(x.shape)}"
            )
    if z.shape[1] != table.shape[1]:
        raise ValueError(f"z and table must have the same D, got {z.shape[1]} and {table.shape[1]}")
    if z.device != table.device:
        raise ValueError(
            f"z and table must be on the same device, got {z.device} and {table.device}"
        )
    if not 1 <= len(table) <= MOST_CODES or not 1 <= table.shape[1] <= MOST_DIMS:
        raise ValueError(
            f"table must have 1 to {MOST_CODES} codes of 1 to {MOST_DIMS} dims, "
            f"got {tuple(table.shape)}"
        )
