"""What is known of a model of transformers: its configuration, its RoPE forwards and back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ModelRope:
    """Rotates K by the model's own functions.

    Args:
        rotary: gives cosines and sines ``[B, n, D]`` of positions.
        apply: rotates ``(q, k)`` by them.
    """

    def __init__(self, rotary: nn.Module, apply: Callable[..., Any]):
        self._rotary, self._apply = rotary, apply

    def rotate(self, x: Tensor, positions: Tensor, inverse: bool = False) -> Tensor:
        """``x [B, H, n, D]`` at ``positions [B, n]`` (int64), or back; float32."""
        x = x.float()
        with torch.no_grad():
            cos, sin = self._rotary(x, positions)
        if inverse:  # cosines and sines may be scaled, as YaRN does
            squared = cos.square() + sin.square()
            cos, sin = cos / squared, -sin / squared
        rotated: Tensor = self._apply(x, x, cos, sin)[1]
        return rotated


def text_config(model: nn.Module) -> Any:
    """The configuration of the part of a model that reads and writes text.

    Raises:
        ValueError: it is no model of transformers.
    """
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise ValueError(f"the model must be one of transformers, got {type(model).__name__}")
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


def model_rope(model: nn.Module) -> ModelRope | None:
    """How a model rotates its K, or None where it is done in a way that is not known here.

    Known is one module of cosines and sines for all layers, and an ``apply_rotary_pos_emb`` beside
    the model's classes that undoes itself.
    """
    found = [x for name, x in model.named_modules() if name.split(".")[-1] == "rotary_emb"]
    apply = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if len(found) != 1 or apply is None:
        return None
    rope = ModelRope(found[0], apply)
    config = text_config(model)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    device = next(model.parameters()).device
    probe = torch.linspace(-1, 1, 3 * dim, device=device).view(1, 1, 3, dim)
    positions = torch.tensor([[1, 7, 300]], device=device)
    try:
        again = rope.rotate(rope.rotate(probe, positions), positions, inverse=True)
    except (TypeError, ValueError, RuntimeError):
        return None
    return rope if torch.allclose(again, probe, atol=1e-4) else None
