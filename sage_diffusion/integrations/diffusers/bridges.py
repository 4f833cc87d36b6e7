"""Tokens out of diffusers' generators, for edits, and back in: GLM-Image and aMUSEd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.vq.fill import check_fill
from sage_diffusion.vq.tokenizer import TokenizerError

#: Pixels along a side of the tokens that GLM-Image's language model writes; its diffusion half
#: reads each four times, on half of that.
PRIOR_FACTOR = 32


@dataclass(frozen=True)
class PriorTokens:
    """What GLM-Image's language model wrote, on its own grid.

    Attributes:
        ids: ``[B, h, w]``; an edited copy (``dataclasses.replace``) draws another picture.
        image_ids, grids: of pictures that were given, as the pipeline wants them back.
    """

    ids: Tensor
    image_ids: list[Tensor] | None = None
    grids: list[Tensor] | None = None

    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call, beside the prompt (and the pictures): tokens and size."""
        if self.ids.ndim != 3 or self.ids.is_floating_point():
            raise TokenizerError(f"ids must be integers [B, h, w], got {tuple(self.ids.shape)}")
        twice = self.ids.repeat_interleave(2, 1).repeat_interleave(2, 2)
        height, width = (side * PRIOR_FACTOR for side in self.ids.shape[1:])
        return {
            "prior_token_ids": twice.flatten(1),
            "prior_token_image_ids": self.image_ids,
            "source_image_grid_thw": self.grids,
            "height": height,
            "width": width,
        }


def prior_tokens(
    pipe: Any, prompt: str | list[str], height: int, width: int, **options: Any
) -> PriorTokens:
    """Let GLM-Image's language model write the tokens of a picture.

    Args:
        pipe: a ``GlmImagePipeline``.
        prompt: text; batches are lists.
        height, width: of the picture, multiples of 32.
        options: of its ``generate_prior_tokens``: ``image``, ``generator``, ``device``.

    Raises:
        TokenizerError: the sides are no multiples of 32.
    """
    if height % PRIOR_FACTOR or width % PRIOR_FACTOR:
        raise TokenizerError(f"sides must be multiples of {PRIOR_FACTOR}, got {width} x {height}")
    ids, image_ids, grids = pipe.generate_prior_tokens(prompt, height, width, **options)
    rows, columns = 2 * height // PRIOR_FACTOR, 2 * width // PRIOR_FACTOR
    return PriorTokens(ids.view(-1, rows, columns)[:, ::2, ::2], image_ids, grids)


def amused_ids(pipe: Any, prompt: str | list[str], **options: Any) -> Tensor:
    """Ids ``[B, h, w]`` of aMUSEd's pictures of a prompt; options are the pipeline's."""
    return pipe(prompt, output_type="latent", **options).images


def amused_inpaint(
    pipe: Any, ids: Tensor, mask: Tensor, prompt: str | list[str], **options: Any
) -> Tensor:
    """Ids with new ones under a mask, as aMUSEd completes them; the others stay.

    Args:
        pipe: an ``AmusedPipeline`` or ``AmusedInpaintPipeline``; the ids of the latter's picture
            need not be encoded again.
        ids: ``[B, h, w]`` of its tokenizer.
        mask: boolean ``[h, w]`` or ``[B, h, w]``.
        prompt: one for all, or one each.
        options: of ``AmusedPipeline``'s call.

    Raises:
        TokenizerError: ids or mask do not fit.
    """
    from diffusers import AmusedPipeline

    mask = check_fill(ids, mask, pipe.vqvae.config.num_vq_embeddings)
    if not isinstance(pipe, AmusedPipeline):
        pipe = AmusedPipeline(**pipe.components)
    height, width = (side * pipe.vae_scale_factor for side in ids.shape[1:])
    prompts = [prompt] * len(ids) if isinstance(prompt, str) else prompt
    masked = ids.masked_fill(mask, pipe.scheduler.config.mask_token_id).to(pipe.device)
    found = pipe(
        prompts, height=height, width=width, latents=masked, output_type="latent", **options
    ).images
    return torch.where(mask, found.to(ids.device), ids)


@torch.no_grad()
def amused_picture(pipe: Any, ids: Tensor) -> Tensor:
    """Pictures ``[B, 3, H, W]`` in 0 .. 1 of ids ``[B, h, w]``."""
    vqvae = pipe.vqvae
    shape = (*ids.shape, vqvae.config.vq_embed_dim or vqvae.config.latent_channels)
    decoded = vqvae.decode(ids.to(vqvae.device), force_not_quantize=True, shape=shape)
    return decoded.sample.float().clamp(0, 1)
