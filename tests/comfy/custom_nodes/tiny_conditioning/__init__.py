"""Test pack: CONDITIONING without a text encoder, as no core node makes it."""

import torch


class TinyConditioning:
    """Random numbers in the place of a prompt."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "width": ("INT", {"default": 768, "min": 1, "max": 16384}),
                "tokens": ("INT", {"default": 77, "min": 1, "max": 4096}),
                "pooled": ("INT", {"default": 0, "min": 0, "max": 16384}),
                "seed": ("INT", {"default": 0}),
            }
        }

    def make(self, width, tokens, pooled, seed):
        generator = torch.Generator().manual_seed(seed)
        more = {}
        if pooled:
            more["pooled_output"] = torch.randn(1, pooled, generator=generator)
        return ([[torch.randn(1, tokens, width, generator=generator), more]],)


NODE_CLASS_MAPPINGS = {"TinyConditioning": TinyConditioning}
