"""Calibrate ComfyUI's language models on text, and judge what a compressed cache predicts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sage_diffusion.integrations.comfy.kv_inside import (
    generators,
    inside,
    logits,
    rope_of,
    sliding,
    states,
    watched,
)
from sage_diffusion.integrations.comfy.kv_patch import Compressed, compress_clip
from sage_diffusion.kv.calibration import GROUP, Calibration, CalibrationError
from sage_diffusion.kv.evaluate import Agreement, agreement
from sage_diffusion.kv.moments import QUERIES, LayerMoments, calibration_of

#: Tokens that are looked at together; the first, which count nowhere; the newest, which are exact.
CHUNK, SINK, GAP = 1280, 32, 128

_LEAST = SINK + GROUP + GAP


def calibrate_clip(clip: Any, text: str) -> Calibration:
    """What K and V of a CLIP's language model are like on a text.

    ComfyUI computes no gradients, so errors are weighed alike in all directions: bases of plain
    covariance.

    Raises:
        ValueError: it generates no text, or its attention can't be watched.
        CalibrationError: the text is too short.
    """
    module = generators(clip)[0][1]
    rope = rope_of(module)
    if rope is None:
        raise ValueError(f"the RoPE of {type(module).__name__} is not known, calibration needs it")
    moments: dict[int, LayerMoments] = {}

    def seen(number: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        positions = torch.arange(k.shape[2], device=k.device)[None]
        flat = rope.rotate(k, positions, inverse=True)[0].transpose(0, 1).flatten(1).cpu()
        layer = moments.setdefault(number, LayerMoments())
        layer.add(q[:, :, -QUERIES:], k, v, flat, SINK, GAP)

    def run(module: Any, embeds: Tensor) -> Calibration:
        chunks = [x for x in embeds.split(CHUNK, 1) if x.shape[1] >= _LEAST]
        if not chunks:
            raise CalibrationError(
                f"the text must have at least {_LEAST} tokens, it has {embeds.shape[1]}"
            )
        with torch.no_grad(), watched(module, seen):
            for chunk in chunks:
                states(module, chunk)
        about = {
            "model": type(module).__name__,
            "tokens": sum(chunk.shape[1] for chunk in chunks),
            "gradients": 0,
        }
        heads = module.model.config.num_key_value_heads
        full = {i: moments[i] for i, keep in enumerate(sliding(module)) if not keep}
        return calibration_of(module, full, heads, about)

    return inside(clip, text, run)


def compare_predictions(compressed: Compressed, text: str, scored: int = 64) -> Agreement:
    """How near a text's last predictions are to those with an exact past.

    The text's tokens are written into a cache of the same settings as generation writes them: all
    but the last at once, those one by one.

    Args:
        compressed: a CLIP's; what its memory says stays.
        scored: last tokens whose predictions are compared.

    Raises:
        ValueError: the text has no token whose past is compressed.
    """
    settings = compressed.settings

    def run(module: Any, embeds: Tensor) -> tuple[Tensor, Tensor]:
        tokens = embeds.shape[1]
        if tokens <= scored + 1:
            raise ValueError(f"the text must have more than {scored + 1} tokens, it has {tokens}")
        first = tokens - scored
        exact = logits(module, states(module, embeds)[0][:, first:])
        past = module.init_kv_cache(1, tokens, embeds.device, embeds.dtype)
        _, past = states(module, embeds[:, :first], past)
        found = []
        for token in range(first, tokens):
            hidden, past = states(module, embeds[:, token : token + 1], past)
            found.append(logits(module, hidden))
        return torch.cat(found), exact

    with torch.no_grad():
        found, exact = inside(compress_clip(compressed.given, settings).host, text, run)
    return agreement(found, exact, exact.argmax(-1))
