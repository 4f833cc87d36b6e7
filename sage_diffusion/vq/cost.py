"""Predicted bounds of the nearest-code kernel on GPUs that need not be there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sage_diffusion.speed.cost import CostError, KernelCost, NoKernelError, cubin_cost, gpu_named

#: Of the call that is compiled; only that they are divisible by 16 counts.
_LATENTS, _CODES = 4096, 65536


def search_costs(gpus: Sequence[str], dims: Sequence[int]) -> list[KernelCost]:
    """Bounds of the main loop for BF16 latents and the metric l2.

    Args:
        gpus: names of :data:`~sage_diffusion.speed.gpus.GPUS`.
        dims: of the latents, 1 .. 2048; the result has them as head dims.

    Raises:
        NoKernelError: Triton has no code for a card.
        CostError: a GPU's name is unknown, or triton is not installed.
    """
    try:
        from sage_diffusion.kernels.vq import triton
        from sage_diffusion.kernels.vq.terms import Terms
        from sage_diffusion.speed.cost_compile import compiling_for
    except ImportError as error:
        raise CostError(f"compiling a kernel needs triton (pip install triton): {error}") from None

    costs = []
    for name in gpus:
        gpu = gpu_named(name)
        if gpu.capability < (8, 0):
            raise NoKernelError(
                f"no kernel of this package runs on {name}: nearest code: Triton needs sm_80 or "
                f"newer, found {gpu.arch}"
            )
        for dim in dims:
            z = torch.zeros(_LATENTS, dim, dtype=torch.bfloat16)
            table = torch.zeros(_CODES, dim, dtype=torch.bfloat16)
            with compiling_for(gpu.arch) as driver:
                triton.nearest_code(z, table, Terms(bias=torch.zeros(_CODES)), split=8)
            costs.append(cubin_cost(driver.kernels[0].cubin, name, "nearest code, bf16", dim))
    return costs
