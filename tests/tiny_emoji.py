"""An untrained bundled-style pipeline that runs in milliseconds."""

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

from sage_diffusion.integrations.diffusers.bundled import EmojiPipeline

CLASSES = ("cat", "dog", "bird")


def tiny_emoji(layers: int = 2, seed: int = 0) -> EmojiPipeline:
    """16 x 16 pixels, 16 tokens, head_dim 16."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=3,
        out_channels=3,
        num_layers=layers,
        sample_size=16,
        patch_size=4,
        num_embeds_ada_norm=len(CLASSES),
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    pipe = EmojiPipeline(model.eval(), FlowMatchEulerDiscreteScheduler(), CLASSES)
    pipe.set_progress_bar_config(disable=True)
    return pipe
