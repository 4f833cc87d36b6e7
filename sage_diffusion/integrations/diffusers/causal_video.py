"""The bundled causal video model: bouncing digits, one frame at a time from all frames before.

    model = CausalVideo.bundled()
    cache = model.cache(method="k2v2")
    pictures = model.continue_clips(seen, frames=8, cache=cache, seed=0)

A ``WanTransformer3DModel`` trained as a rectified flow on :mod:`sage_diffusion.kv.bouncing`.  A
latent is a block of 2 x 2 pixels, so there is no autoencoder; a token is 2 x 2 latents, so a frame
has 64; a frame is a block of the autoregression.  How it was trained and what it can't do is in
``sage_diffusion/assets/causal_video/README.md``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor

from sage_diffusion.integrations.diffusers.bundled import dtype_argument
from sage_diffusion.integrations.diffusers.kv import WanKVCache, cached

#: Where the weights lie.
ASSETS = Path(__file__).resolve().parents[2] / "assets" / "causal_video"

#: Tokens of a frame.
TOKENS = 64

#: Pixels of a latent along a side, and the shape of a frame's latents.
PIXELS = 2
LATENT = (12, 16, 16)


def to_latents(pictures: Tensor) -> Tensor:
    """``[..., 3, 32, 32]`` in -1 .. 1 to ``[..., 12, 16, 16]``."""
    return F.pixel_unshuffle(pictures, PIXELS)


def to_pictures(latents: Tensor) -> Tensor:
    """The inverse of :func:`to_latents`."""
    return F.pixel_shuffle(latents, PIXELS)


def noise(clips: int, frames: int, seed: int) -> Tensor:
    """Noise ``[clips, frames, 12, 16, 16]``; clip i has that of ``seed + i``, whoever is beside."""
    return torch.stack(
        [
            torch.randn(frames, *LATENT, generator=torch.Generator().manual_seed(seed + clip))
            for clip in range(clips)
        ]
    )


class CausalVideo:
    """Continues clips frame by frame.

    Args:
        transformer: predicts ``noise - latents`` at ``(1 - t) * latents + t * noise``.
    """

    def __init__(self, transformer: WanTransformer3DModel):
        self.transformer = transformer

    @classmethod
    def bundled(
        cls, folder: str | Path = ASSETS, dtype: torch.dtype = torch.bfloat16
    ) -> CausalVideo:
        """The model that this package carries, or one saved by its training script.

        Raises:
            FileNotFoundError: the folder holds no such model.
        """
        weights = Path(folder) / "transformer"
        if not (weights / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} must hold transformer/: this installation lacks the bundled model"
            )
        found = WanTransformer3DModel.from_pretrained(weights, **dtype_argument(dtype))
        return cls(found.eval())

    def cache(self, frames: int = -1, **settings: Any) -> WanKVCache:
        """An empty cache for this model.

        Args:
            frames: most frames that are kept, the present one included; -1: all.
            settings: of :class:`WanKVCache`.
        """
        window = frames * TOKENS if frames > 0 else -1
        return WanKVCache(len(self.transformer.blocks), window, **settings)

    @torch.no_grad()
    def continue_clips(
        self,
        seen: Tensor,
        frames: int,
        cache: WanKVCache,
        *,
        steps: int = 4,
        seed: int = 0,
    ) -> Tensor:
        """Pictures ``[N, frames, 3, 32, 32]`` in -1 .. 1 that follow those seen.

        Args:
            seen: ``[N, F, 3, 32, 32]`` in -1 .. 1, from the beginning of the clips.
            frames: how many to draw.
            cache: is reset first, and holds the clips afterwards.
            steps: Euler steps of a frame; one pass more writes the finished frame to the cache.
            seed: of the noise, see :func:`noise`.

        Raises:
            ValueError: nothing to draw, or in no steps.
        """
        if frames < 1 or steps < 1:
            raise ValueError(f"frames and steps must be at least 1, got {frames} and {steps}")
        dtype = self.transformer.dtype
        text = torch.zeros(len(seen), 1, self.transformer.config.text_dim, dtype=dtype)
        known = to_latents(seen)
        random = noise(len(seen), frames, seed)
        cache.reset()
        drawn = []
        with cached(self.transformer, cache) as run:

            def velocity(latents: Tensor, time: float, frame: int) -> Tensor:
                times = torch.full((len(seen),), time * 1000)
                found = run(latents[:, :, None].to(dtype), times, text, frame_offset=frame)
                return found[:, :, 0].float()

            for frame in range(seen.shape[1] + frames):
                cache.enable_append_mode()
                if frame < seen.shape[1]:
                    velocity(known[:, frame], 0.0, frame)
                    continue
                latents = random[:, frame - seen.shape[1]]
                for step in range(steps):
                    latents = latents - velocity(latents, 1 - step / steps, frame) / steps
                    cache.enable_overwrite_mode()
                velocity(latents, 0.0, frame)
                drawn.append(to_pictures(latents))
        return torch.stack(drawn, 1)
