"""What a backend's kernels are, as data, for whoever chooses, tunes, compiles or checks them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..formats import TILE_N
from ..spec import AttentionSpec

#: Launches that were measured on a card: ``tuned(device, spec, padded head dim)``, None where
#: nothing was.  Who keeps them in a file hands them to a kernel's entry.
Tuned = Callable[[torch.device, AttentionSpec, int], Any]


@dataclass(frozen=True)
class Kernels:
    """One backend's attention kernels.  Reading it imports no Triton.

    A launch is a NamedTuple of the backend's own.

    Attributes:
        name: what users write in ``backend=``.
        describes: one line for ``doctor``.
        module: holds ``attention`` and ``attend_quantized``, imported on first use.
        unsupported_spec: ``(spec)`` -> why they compute it on no device, or None.
        unsupported: ``(spec, capability, hip_arch, head_dim)`` -> why a GPU can't, or None.
        launch: ``(arch, padded head dim, spec or None)`` -> the launch that ships.
        candidates: ``(arch, padded head dim, spec or None)`` -> launches to try beside it.
        knobs: fields of a launch that are chosen for a card; the rest is its architecture's own.
        triton_version: ``(spec)`` -> Triton's first version that will do.
        permuted: ``(spec)`` -> whether V's tokens are in the order of P's registers.
        column_factor: ``(spec)`` -> what it wants K's scales in column order multiplied by
            (:func:`.gluon_columns.key_scales`), or None.
        adds_key_masks: one mask for all queries comes as part of the bias, else as a mask.
        devices: that they run on, in words.
        tile_keys: keys of a tile.
    """

    name: str
    describes: str
    module: str
    unsupported_spec: Callable[[AttentionSpec], str | None]
    unsupported: Callable[
        [AttentionSpec, tuple[int, int] | None, str | None, int | None], str | None
    ]
    launch: Callable[[str, int, AttentionSpec | None], Any]
    candidates: Callable[[str, int, AttentionSpec | None], list[Any]]
    knobs: tuple[str, ...]
    triton_version: Callable[[AttentionSpec], tuple[int, int]]
    permuted: Callable[[AttentionSpec], bool] = lambda spec: True
    column_factor: Callable[[AttentionSpec], float | None] = lambda spec: None
    adds_key_masks: bool = True
    devices: str = "CUDA"
    tile_keys: int = TILE_N

    def load(self) -> Any:
        """The module."""
        return importlib.import_module(self.module)
