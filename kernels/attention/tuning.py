"""Which GPU runs which spec, and with which launch configuration.  Data only: no Triton here."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch

from ..formats import Q_BLOCK, Precision
from ..spec import AttentionSpec
from .record import Kernels


class Launch(NamedTuple):
    """A launch configuration of the forward kernel.

    Attributes:
        block_m: query rows of a program.
        num_warps, num_stages: as Triton knows them; AMD pipelines nothing (one stage).
        shift: convert integers by addition, where the conversion instruction is slow.
    """

    block_m: int
    num_warps: int
    num_stages: int
    shift: bool = False


#: Launches by prefix of the architecture, the first that matches, and padded head dim.  Fewer warps
#: spill at head dim 128, on sm_120 at 64 too; on RDNA, whose matrix operands take twice the
#: registers, so do 8.
_LAUNCHES: dict[str, dict[int, Launch]] = {
    "sm_80": {
        64: Launch(128, 4, 3, shift=True),
        128: Launch(128, 8, 3, shift=True),
        256: Launch(64, 8, 2, shift=True),
    },
    "sm_12": {
        64: Launch(128, 8, 3),
        128: Launch(128, 8, 3),
        256: Launch(64, 8, 2),
    },
    "gfx9": {
        64: Launch(128, 4, 1),
        128: Launch(128, 4, 1),
        256: Launch(64, 4, 1),
    },
    "gfx11": {
        64: Launch(128, 8, 1),
        128: Launch(128, 16, 1),
        256: Launch(64, 16, 1),
    },
    "gfx": {
        64: Launch(128, 8, 1),
        128: Launch(128, 8, 1),
        256: Launch(64, 16, 1),
    },
    "": {
        64: Launch(128, 4, 3),
        128: Launch(128, 8, 3),
        256: Launch(64, 8, 2),
    },
}

#: Where those would spill, or were slower on a card: by architecture, format of P and V ("half",
#: "int8", "fp8", "fp8-fast") and padded head dim.  Those of sm_90 were measured on an H200.
_EXCEPTIONS = {
    ("sm_90", "half", 64): Launch(64, 4, 4),
    ("sm_90", "half", 128): Launch(128, 4, 3),
    ("sm_90", "int8", 64): Launch(64, 4, 2),
    ("sm_90", "int8", 128): Launch(64, 4, 3),
    ("sm_90", "fp8", 64): Launch(64, 4, 2),
    ("sm_90", "fp8", 128): Launch(64, 4, 3),
    ("sm_90", "fp8-fast", 64): Launch(64, 4, 2),
    ("sm_90", "fp8-fast", 128): Launch(64, 4, 3),
    ("sm_80", "int8", 128): Launch(64, 4, 2, shift=True),
    ("sm_120", "fp8", 128): Launch(128, 8, 2),
    **{(arch, "int8", 128): Launch(64, 16, 1) for arch in ("gfx1100", "gfx1101", "gfx1102")},
}

#: With FP4 Q and K.  Block-scaled ``tcgen05.mma`` has 128 rows; Triton emulates fewer in BF16.
_FP4_LAUNCHES = {64: Launch(128, 8, 3), 128: Launch(128, 8, 3), 256: Launch(128, 8, 2)}

#: With a mask that differs from query to query, by architecture and padded head dim, where eight
#: warps would spill.
_ROW_MASKS = {("sm_120", 128): Launch(64, 4, 2)}

#: Triton's first version that the kernel was compiled and tested with, and the first whose passes
#: don't fail on a block-scaled product of sm_100 within a loop.
TRITON_VERSION, TRITON_VERSION_FP4 = (3, 6), (3, 9)

#: NVIDIA architectures with E4M3 tensor cores begin here.
_FP8_CAPABILITY = (8, 9)

#: AMD architectures with E4M3 (the OCP format, not the earlier fnuz) in matrix instructions.
_FP8_HIP = ("gfx950", "gfx12")

#: AMD architectures that Triton gives integer matrix instructions.
_MATRIX_HIP = ("gfx90a", "gfx942", "gfx950", "gfx11", "gfx12")


@functools.lru_cache(maxsize=256)
def launch(
    arch: str, dim: int, mask: str = "", measured: Launch | None = None, pv: str = "half"
) -> Launch:
    """The configuration for an architecture ("sm_89", "gfx942") and padded head dim.

    Args:
        mask: "keys" if one mask of the keys is read too, "rows" if it differs from query to query:
            its tiles need registers and, in every stage, shared memory.
        measured: instead of the built-in one.
        pv: format of P and V, "fp8-fast" for FP8 with an FP16 accumulator.
    """
    found = measured or _EXCEPTIONS.get((arch, pv, dim))
    if found is None:
        found = next(table for prefix, table in _LAUNCHES.items() if arch.startswith(prefix))[dim]
    if mask == "rows":
        if measured is None:
            found = _ROW_MASKS.get((arch, dim), found)
        found = found._replace(num_stages=min(found.num_stages, 2))
    if mask == "rows" or (mask == "keys" and arch.startswith("sm_")):
        found = found._replace(num_warps=max(found.num_warps, found.block_m // 16))
    return found


def fp4_launch(dim: int, row_mask: bool = False, measured: Launch | None = None) -> Launch:
    """As :func:`launch` for FP4 Q and K.

    Raises:
        ValueError: ``measured`` has another number of query rows than 128.
    """
    found = measured or _FP4_LAUNCHES[dim]
    if found.block_m != Q_BLOCK:
        raise ValueError(f"block_m must be {Q_BLOCK} for fp4, got {found.block_m}")
    return found._replace(num_stages=min(found.num_stages, 2)) if row_mask else found


def built_in(arch: str, dim: int, spec: AttentionSpec | None = None) -> Launch:
    """The launch of a call without mask: for a spec, as some formats have one of their own."""
    if spec is None:
        return launch(arch, dim)
    if spec.qk is Precision.FP4:
        return fp4_launch(dim)
    fast = "-fast" if spec.pv_accumulator == "fp16" else ""
    return launch(arch, dim, pv="half" if spec.pv is Precision.FP16 else f"{spec.pv.value}{fast}")


def candidates(arch: str, dim: int, spec: AttentionSpec | None = None) -> list[Launch]:
    """Launches that a card may prefer to :func:`built_in`."""
    first, amd = built_in(arch, dim, spec), arch.startswith("gfx")
    blocks = (64,) if dim > 128 else (64, 128)
    if spec is not None and spec.qk is Precision.FP4:
        blocks = (first.block_m,)
    warps, stages = ((4, 8, 16), (1,)) if amd else ((4, 8), (2, 3, 4))
    return [Launch(*fields, first.shift) for fields in itertools.product(blocks, warps, stages)]


@functools.lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """ "sm_89", "gfx942"; "cpu" where there is no GPU (Triton's interpreter)."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def triton_version(spec: AttentionSpec) -> tuple[int, int]:
    """Triton's first version on which the kernel computes a spec."""
    return TRITON_VERSION_FP4 if spec.qk is Precision.FP4 else TRITON_VERSION


def unsupported_spec(spec: AttentionSpec) -> str | None:
    """Why the kernel does not compute a spec on any device, or None if it does."""
    if not spec.quantized:
        return "the kernel quantizes, fp16 is the model's own attention"
    if spec.qk is Precision.FP4:
        if spec.pv in (Precision.FP8, Precision.FP4):
            return None
        return f"with fp4 Q and K the kernel reads P and V in fp8 or fp4, not in {spec.pv.value}"
    if spec.qk is not Precision.INT8:
        return f"the kernel reads Q and K in int8 or fp4, not in {spec.qk.value}"
    if spec.pv is Precision.FP4:
        return "the kernel reads P and V in fp16, int8 or fp8, not in fp4"
    if spec.smooth_q:
        return "smooth_q is not part of the kernel"
    return None


def unsupported(
    spec: AttentionSpec,
    capability: tuple[int, int] | None,
    hip_arch: str | None,
    head_dim: int | None = None,
) -> str | None:
    """Why a GPU cannot run a spec natively, or None if it can.

    Args:
        capability: CUDA compute capability, None on AMD.
        hip_arch: e.g. "gfx1201", None on NVIDIA.
        head_dim: any will do.
    """
    reason = unsupported_spec(spec)
    if reason is not None:
        return reason
    if spec.qk is Precision.FP4 and (capability is None or capability[0] != 10):
        where = hip_arch if capability is None else f"sm_{capability[0]}{capability[1]}"
        return f"fp4 products of Triton are native on sm_10x, found {where or 'no GPU'}"
    if capability is None:
        if hip_arch is None:
            return "needs a CUDA or ROCm device"
        if not hip_arch.startswith(_MATRIX_HIP):
            return f"{hip_arch} has no matrix instructions that Triton uses"
        if spec.pv is Precision.FP8 and not hip_arch.startswith(_FP8_HIP):
            return f"fp8 needs gfx950 or gfx12, found {hip_arch}"
        return None
    found = f"sm_{capability[0]}{capability[1]}"
    if capability < (8, 0):
        return f"Triton needs sm_80 or newer, found {found}"
    if spec.pv is Precision.FP8 and capability < _FP8_CAPABILITY:
        return f"fp8 needs sm_89 or newer, found {found}"
    return None


KERNELS = Kernels(
    "triton",
    "this package's kernels",
    f"{__package__}.triton",
    unsupported_spec,
    unsupported,
    launch=built_in,
    candidates=candidates,
    knobs=("block_m", "num_warps", "num_stages"),
    permuted=lambda spec: spec.pv is Precision.FP4,
    triton_version=triton_version,
    adds_key_masks=False,
    devices="CUDA or ROCm",
)
