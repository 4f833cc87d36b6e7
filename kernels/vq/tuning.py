"""Launch configurations of the nearest-code kernel.  Data only: no Triton here."""

from __future__ import annotations

from typing import NamedTuple

import torch

#: Programs that a multiprocessor shall have, so that loads of one hide behind products of others.
PROGRAMS = 4

#: More splits than this cost more in joining than they bring.
MOST_SPLITS = 64


class Launch(NamedTuple):
    """A launch configuration.

    Attributes:
        block_n: latents of a program.
        block_k: codes of a tile.
        block_d: dims that one product of the main loop takes, at most.
        num_warps, num_stages: as Triton knows them.
    """

    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int


def padded_dim(dim: int) -> int:
    """The dim that the kernel computes with: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def launch(arch: str, dtype: torch.dtype) -> Launch:
    """The configuration for an architecture ("sm_89", "gfx942") and type of operands."""
    amd, rdna = arch.startswith("gfx"), arch.startswith("gfx1")
    stages = 1 if amd else 2
    if dtype == torch.float32 and amd:  # no tensor cores: operands and products share registers
        return Launch(32, 64, 32 if rdna else 64, 8 if rdna else 4, stages)
    if dtype == torch.float32:  # in three products of TF32, whose parts need registers
        return Launch(64, 128 if arch in ("sm_90", "sm_100") else 64, 32, 4, 3)
    # RDNA's matrix operands take twice the registers.
    return Launch(64, 64 if rdna else 128, 64 if rdna else 128, 4, stages)


def precision(arch: str) -> str:
    """How float32 is multiplied: on NVIDIA's tensor cores as three products of TF32, whose error is
    that of float32 but for a bit or two; elsewhere as it is."""
    return "tf32x3" if arch.startswith("sm_") else "ieee"


def splits(latents: int, codes: int, processors: int, config: Launch) -> int:
    """Parts that the codes are searched in, so that few latents fill a card too."""
    wanted = -(-PROGRAMS * processors // -(-latents // config.block_n))
    return max(1, min(wanted, MOST_SPLITS, -(-codes // config.block_k)))


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 where there is none (Triton's interpreter)."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
