"""Tokens out of transformers' generators of pictures, for edits, and to pixels: Emu3 and Janus."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sage_diffusion.vq.tokenizer import TokenizerError

#: Emu3 ends a picture's rows with a token, and the picture with three.
_END = 3


def picture_ids(model: Any, tokens: Tensor, height: int, width: int) -> Tensor:
    """Ids ``[B, height, width]`` of the tokens that a model generated for pictures.

    Args:
        model: an ``Emu3ForConditionalGeneration`` or ``JanusForConditionalGeneration``.
        tokens: ``[B, N]`` as ``decode_image_tokens`` takes them.
        height, width: of the grid.

    Raises:
        TokenizerError: there are more or fewer tokens.
    """
    rows = _vocabulary(model) is not None
    wanted = height * (width + 1) + _END if rows else height * width
    if tokens.ndim != 2 or tokens.shape[1] != wanted:
        raise TokenizerError(
            f"tokens of a grid of {height} x {width} must be [B, {wanted}], "
            f"got {tuple(tokens.shape)}"
        )
    if not rows:
        return tokens.view(-1, height, width)
    grid = tokens[:, :-_END].view(-1, height, width + 1)
    return _vocabulary(model).convert_bpe2img(grid).long()


@torch.no_grad()
def picture(model: Any, ids: Tensor) -> Tensor:
    """Pictures ``[B, 3, H, W]`` in 0 .. 1 of ids ``[B, h, w]``, by ``decode_image_tokens``.

    Raises:
        TokenizerError: ids are out of range or of another shape.
    """
    vocabulary = _vocabulary(model)
    size = len(model.model.vqmodel.quantize.embedding.weight)
    if ids.ndim != 3 or ids.is_floating_point():
        raise TokenizerError(f"ids must be integers [B, h, w], got {tuple(ids.shape)}")
    if ids.numel() and (ids.min() < 0 or ids.max() >= size):
        raise TokenizerError(
            f"ids must be 0 to {size - 1}, got {int(ids.min())} to {int(ids.max())}"
        )
    if vocabulary is None:
        pixels = model.decode_image_tokens(ids.flatten(1)).permute(0, 3, 1, 2)
    else:
        rows = vocabulary.convert_img2bpe(ids.flatten(0, 1)).view(len(ids), -1)
        tokens = torch.nn.functional.pad(rows, (0, _END), value=vocabulary.eol_token_id)
        height, width = ids.shape[1:]
        pixels = model.decode_image_tokens(image_tokens=tokens, height=height, width=width)
    return ((pixels.float() + 1) / 2).clamp(0, 1)


def _vocabulary(model: Any) -> Any:
    """Emu3's names of ids among its words; None: a model without."""
    return getattr(model.model, "vocabulary_mapping", None)
