"""Masked fill: a model that completes the masked tokens of a picture."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.vq.tokenizer import TokenizerError

#: Where the models live; imported by name, because integrations stand behind this package.
_HOME = "sage_diffusion.integrations.diffusers.fill"

#: The fill model that comes with this package, of the bundled tokenizer's tokens.
BUNDLED = Path(__file__).parent.parent / "assets" / "photo_fill"


def load_fill(source: str | Path, attention: str | None = None) -> Any:
    """A fill model, in evaluation mode on the CPU: ``fill(ids, mask, seed=0, steps=12)``.

    See :class:`sage_diffusion.integrations.diffusers.fill.FillModel`.

    Args:
        source: "bundled", a folder of diffusers' ``UVit2DModel`` as ``save_fill`` of that module
            writes it, or of a whole aMUSEd pipeline.
        attention: spec or path of a plan that its attention runs; None: unquantized.

    Raises:
        TokenizerError: there is no such folder, or it holds something else.
        ValueError: the attention's spec or plan won't do.
    """
    path = BUNDLED if str(source) == "bundled" else Path(source)
    return importlib.import_module(_HOME).load(path, attention)


def token_mask(picture: Tensor, factor: int) -> Tensor:
    """Tokens ``[h, w]`` with any masked pixel of a mask ``[H, W]`` (true, or 0.5 and more).

    Raises:
        TokenizerError: its sides are no multiples of the factor.
    """
    height, width = picture.shape[-2:]
    if picture.ndim != 2 or height % factor or width % factor:
        raise TokenizerError(
            f"the mask must have two sides, multiples of {factor}, got {tuple(picture.shape)}"
        )
    cells = picture.unflatten(1, (-1, factor)).unflatten(0, (-1, factor))
    return (cells.float() >= 0.5).any(3).any(1)


def check_fill(ids: Tensor, mask: Tensor, codebook_size: int) -> Tensor:
    """The mask ``[B, h, w]`` of ids ``[B, h, w]``.

    Raises:
        TokenizerError: the mask is of another grid or not boolean, or ids are of another shape or
            vocabulary.
    """
    if ids.ndim != 3 or ids.is_floating_point():
        raise TokenizerError(f"ids must be integers [B, h, w], got {ids.dtype} {tuple(ids.shape)}")
    if mask.dtype != torch.bool or mask.shape not in (ids.shape, ids.shape[1:]):
        height, width = ids.shape[1:]
        raise TokenizerError(
            f"the mask must be boolean of the ids' grid, {height} x {width}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    mask = mask.expand(ids.shape)
    kept = ids[~mask]
    if kept.numel() and (kept.min() < 0 or kept.max() >= codebook_size):
        raise TokenizerError(
            f"ids must be 0 to {codebook_size - 1}, got {int(kept.min())} to {int(kept.max())}"
        )
    return mask
