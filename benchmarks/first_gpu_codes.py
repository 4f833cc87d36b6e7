"""Section of :mod:`.first_gpu` about nearest codes: right ids, then times beside PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sage_diffusion.vq import nearest_code

if TYPE_CHECKING:
    from benchmarks.first_gpu import Run

#: Latents whose nearest code is looked for in float64 too.
CHECKED = 1024


def search(state: Run) -> dict[str, Any]:
    """Ids and times of every size and type of operands.

    Two codes may be equally near to a latent as far as float32 can tell, so what counts is how much
    farther the found one is: ``excess``, relative to the squared distance, in float64.
    """
    rows: dict[str, Any] = {}
    backend = "reference" if state.place.emulated else "triton"
    for latents, codes, dim in state.sizes.codes:
        torch.manual_seed(0)
        z32 = torch.randn(latents, dim, device=state.place.device)
        table32 = torch.randn(codes, dim, device=state.place.device) * dim**-0.5
        for dtype, rounded in (
            (torch.float32, False),
            (torch.float32, True),
            (torch.bfloat16, False),
        ):
            z, table = z32.to(dtype), table32.to(dtype)
            name = f"{latents} x {codes} x {dim}, {str(dtype).removeprefix('torch.')}"
            name += " rounded" * rounded

            def ours(z=z, table=table, rounded=rounded) -> Tensor:
                return nearest_code(z, table, backend=backend, rounded=rounded)

            rows[name] = compared(state, z, table, ours)
    return rows


def compared(state: Run, z: Tensor, table: Tensor, ours: Callable[[], Tensor]) -> dict[str, Any]:
    """One search against float64 and against ``torch.cdist`` or a product."""

    def theirs() -> Tensor:
        if z.dtype == torch.float32:
            return torch.cdist(z, table).argmin(-1)
        return (z @ table.t() - 0.5 * table.float().square().sum(1).to(z.dtype)).argmax(-1)

    some = z[:CHECKED].double()
    squares = torch.cdist(some, table.double()).square()
    ids = ours()[:CHECKED]
    found, best = squares.gather(1, ids[:, None])[:, 0], squares.min(1).values
    timer = state.timer()
    row: dict[str, Any] = {
        "same_ids": (ids == squares.argmin(1)).float().mean().item(),
        "excess": ((found - best) / best).max().item(),
    }
    for name, call in (("milliseconds", ours), ("torch_ms", theirs)):
        timing = timer(call)
        row[name] = timing.median
    return row
