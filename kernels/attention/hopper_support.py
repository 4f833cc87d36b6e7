"""Which GPU runs which spec on the Hopper kernel, and how.  Data only: no Triton here."""

from __future__ import annotations

from typing import NamedTuple

from ..formats import Precision
from ..spec import AttentionSpec
from .record import Kernels

#: Of a thread.
MOST_REGISTERS = 255


class HopperLaunch(NamedTuple):
    """A launch configuration.

    Attributes:
        num_warps: each owns 16 query rows; four make a warpgroup.
        stages: tiles of 128 keys whose K and V are in shared memory, a power of two.
        registers: of a thread, at most; fewer let more programs share a multiprocessor.
    """

    num_warps: int
    stages: int
    registers: int = MOST_REGISTERS

    @property
    def block_m(self) -> int:
        """Query rows of a program."""
        return 16 * self.num_warps


#: Keys of a tile.
TILE_KEYS = 128

#: By padded head dim: three programs share a multiprocessor and hide each other's waits.  An H200
#: was fastest with 128 registers at head dim 64, by 5 %, but those spill in the main loop.
_LAUNCHES = {64: HopperLaunch(4, 2, 168), 128: HopperLaunch(4, 2, 168)}

#: Beyond this head dim two accumulators no longer fit into the registers.
MAX_HEAD_DIM = 128

#: Triton's first version that the kernel was compiled and tested with.
TRITON_VERSION = (3, 6)

#: ``wgmma`` exists on sm_90 only.
CAPABILITY = (9, 0)


def launch(dim: int, masked: bool = False, measured: HopperLaunch | None = None) -> HopperLaunch:
    """The configuration for a padded head dim.

    Args:
        masked: a mask is read too, which needs registers.
        measured: instead of the built-in one.
    """
    found = measured or _LAUNCHES[dim]
    return found._replace(registers=MOST_REGISTERS) if masked else found


def candidates() -> list[HopperLaunch]:
    """Launches that a card may prefer."""
    tried = ((4, 2, 255), (4, 2, 168), (4, 2, 128), (4, 4, 255), (8, 2, 255))
    return [HopperLaunch(*fields) for fields in tried]


def unsupported_spec(spec: AttentionSpec) -> str | None:
    """Why the kernel computes a spec on no device, or None."""
    if spec.qk not in (Precision.INT8, Precision.FP8):
        return f"the kernel reads Q and K in int8 or fp8, not in {spec.qk.value}"
    if spec.pv is not Precision.FP8 or spec.pv_accumulator != "fp32":
        fast = "-fast" if spec.pv_accumulator == "fp16" else ""
        return f"the kernel reads P and V in fp8, not in {spec.pv.value}{fast}"
    if spec.smooth_q:
        return "smooth_q is not part of the kernel"
    return None


def unsupported(
    spec: AttentionSpec,
    capability: tuple[int, int] | None,
    hip_arch: str | None,
    head_dim: int | None = None,
) -> str | None:
    """Why a GPU cannot run a spec on the Hopper kernel, or None if it can.

    Args:
        capability: CUDA compute capability, None on AMD.
        hip_arch: e.g. "gfx1201", None on NVIDIA.
        head_dim: None if it doesn't matter yet.
    """
    reason = unsupported_spec(spec)
    if reason is not None:
        return reason
    if capability is None:
        return f"needs an NVIDIA card, found {hip_arch or 'none'}"
    if capability != CAPABILITY:
        return f"written for wgmma on sm_90, found sm_{capability[0]}{capability[1]}"
    if head_dim is not None and head_dim > MAX_HEAD_DIM:
        return f"accumulators fit into registers up to head_dim {MAX_HEAD_DIM}, got {head_dim}"
    return None


KERNELS = Kernels(
    "hopper",
    "this package's kernel on wgmma whose P stays in registers: INT8 or FP8 with FP8",
    f"{__package__}.hopper",
    unsupported_spec,
    unsupported,
    launch=lambda arch, dim, spec: launch(dim),
    candidates=lambda arch, dim, spec: candidates(),
    knobs=("num_warps", "stages", "registers"),
    triton_version=lambda spec: TRITON_VERSION,
    column_factor=lambda spec: 1.0,
    tile_keys=TILE_KEYS,
)
