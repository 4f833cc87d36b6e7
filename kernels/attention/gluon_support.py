"""Which GPU runs which spec on the Gluon kernel, and how.  Data only: no Triton here."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from ..formats import Precision
from ..spec import AttentionSpec
from .record import Kernels


class GluonLaunch(NamedTuple):
    """A launch configuration.

    Attributes:
        num_warps: each owns 16 query rows.
        step: tiles of 64 keys between two barriers.
        stages: steps whose K and V are in shared memory.
    """

    num_warps: int
    step: int
    stages: int

    @property
    def block_m(self) -> int:
        """Query rows of a program."""
        return 16 * self.num_warps


#: By padded head dim.  ``stages`` is a power of two, which makes a ring's slot one instruction.
_LAUNCHES = {64: GluonLaunch(8, 1, 4), 128: GluonLaunch(8, 1, 4), 256: GluonLaunch(8, 1, 2)}

#: Moved from K's scales to Q's: what the kernel leaves unscaled, because a mask hides it, is then
#: beyond every score.
SCALE_SHIFT = 2.0**60

#: What a thread may have.  Said aloud, ptxas spends them on hiding latency; silent, it saves some.
MAX_REGISTERS = 255

#: Beyond this head dim INT8 Q no longer fits into the registers.
MAX_INT8_HEAD_DIM = 128

#: Triton's first version whose Gluon tells layouts apart as :mod:`..versions` needs for assembly.
TRITON_VERSION = (3, 6)


def column_factor(qk: Precision) -> float:
    """What K's scales are multiplied by in the lists that the kernel reads."""
    sign = 1.0 if qk is Precision.FP4 else -1.0  # that of gluon_asm.MAGIC_BITS
    return sign / SCALE_SHIFT


def launch(dim: int) -> GluonLaunch:
    """The configuration for a padded head dim."""
    return _LAUNCHES[dim]


def candidates() -> list[GluonLaunch]:
    """Launches that a card may prefer."""
    rings = ((1, 2), (1, 4), (2, 2))
    return [GluonLaunch(warps, *ring) for warps, ring in itertools.product((4, 8), rings)]


def unsupported_spec(spec: AttentionSpec) -> str | None:
    """Why the kernel computes a spec on no device, or None."""
    if spec.qk not in (Precision.INT4, Precision.INT8, Precision.FP4):
        return f"the kernel reads Q and K in int4, int8 or fp4, not in {spec.qk.value}"
    if spec.pv in (Precision.INT8, Precision.FP4):
        return None
    if spec.pv is Precision.FP8 and spec.pv_accumulator == "fp16":
        return None
    return "the kernel reads P and V in int8, fp4, or fp8 with the fp16 accumulator (fp8-fast)"


def unsupported(
    spec: AttentionSpec,
    capability: tuple[int, int] | None,
    hip_arch: str | None,
    head_dim: int | None = None,
) -> str | None:
    """Why a GPU cannot run a spec on the Gluon kernel, or None if it can.

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
    found = f"sm_{capability[0]}{capability[1]}"
    if capability[0] not in (8, 12):
        return f"written for mma.sync on sm_80 .. sm_89 and sm_12x, found {found}"
    if spec.qk is Precision.INT4 and capability[0] != 8:
        return f"int4 tensor cores exist on sm_80 .. sm_89, not on {found}"
    if Precision.FP4 in (spec.qk, spec.pv) and capability[0] != 12:
        return f"fp4 tensor cores behind mma.sync exist on sm_12x, not on {found}"
    if spec.pv is Precision.FP8 and capability < (8, 9):
        return f"fp8 needs sm_89 or newer, found {found}"
    if head_dim is not None and head_dim > MAX_INT8_HEAD_DIM and spec.qk is Precision.INT8:
        return f"int8 fits into registers up to head_dim {MAX_INT8_HEAD_DIM}, got {head_dim}"
    return None


KERNELS = Kernels(
    "gluon",
    "this package's kernels whose P stays in registers: INT4, FP4, 8 bit on NVIDIA cards",
    f"{__package__}.gluon",
    unsupported_spec,
    unsupported,
    launch=lambda arch, dim, spec: launch(dim),
    candidates=lambda arch, dim, spec: candidates(),
    knobs=("num_warps", "step", "stages"),
    triton_version=lambda spec: TRITON_VERSION,
    column_factor=lambda spec: column_factor(spec.qk),
)
