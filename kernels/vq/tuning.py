"""Launch configurations of the nearest-code kernel.  Data only: no Triton here."""

from __future__ import annotations

from typing import NamedTuple

import torch

#: Dims of a latent that one product of the main loop takes.
BLOCK_D = 128

#: Programs that a multiprocessor shall have, so that loads of one hide behind products of others.
PROGRAMS = 4

#: More splits than this cost more in joining than they bring.
MOST_SPLITS = 64


class Launch(NamedTuple):
    """A launch configuration.

    Attributes:
        block_n: latents of a program.
        block_k: codes of a tile.
        num_warps, num_stages: as Triton knows them.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def padded_dim(dim: int) -> int:
    """The dim that the kernel computes with: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def launch(arch: str, dim: int, dtype: torch.dtype) -> Launch:
    """The configuration for an architecture ("sm_89", "gfx942"), padded dim and operands' type."""
    if dtype == torch.float32:  # no tensor cores: smaller tiles leave registers for the product
        return Launch(32, 64, 4, 1 if arch.startswith("gfx") else 2)
    return Launch(64, 128, 4, 1 if arch.startswith("gfx") else 2)


def splits(latents: int, codes: int, processors: int, config: Launch) -> int:
    """Parts that the codes are searched in, so that few latents fill a card too."""
    wanted = -(-PROGRAMS * processors // -(-latents // config.block_n))
    return max(1, min(wanted, MOST_SPLITS, -(-codes // config.block_k)))


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 where there is none (Triton's interpreter)."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
