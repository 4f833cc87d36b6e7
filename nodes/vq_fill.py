"""Masked tokens completed by a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comfy.model_management
from comfy_api.latest import io

from sage_diffusion.kernels.spec import LADDER
from sage_diffusion.nodes.host import fill_names, fill_path, show, signature
from sage_diffusion.nodes.vq import VQ_CATEGORY, VQTokenizer, VQTokens

if TYPE_CHECKING:
    from torch import Tensor

    from sage_diffusion.vq.idfile import Tokens
    from sage_diffusion.vq.tokenizer import Tokenizer


class VQFill(io.ComfyNode):
    """A bidirectional transformer fills what a mask touches, surest tokens first."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionVQFill",
            display_name="VQ Fill",
            category=VQ_CATEGORY,
            description="Completes the tokens under a mask with a masked transformer (MaskGIT): "
            "diffusers' UVit2DModel, aMUSEd's checkpoints included. Needs diffusers.",
            search_aliases=["inpaint tokens", "maskgit", "amused", "fill tokens"],
            inputs=[
                VQTokenizer.Input("tokenizer", tooltip="The one that made the tokens."),
                VQTokens.Input("tokens", tooltip="What lies under the mask is not read."),
                io.Mask.Input("mask", tooltip="Tokens that it touches are filled."),
                io.Combo.Input(
                    "model",
                    options=fill_names(),
                    tooltip="The bundled one, of the bundled tokenizer's tokens, or a folder of "
                    "models/vq_fill: a UVit2DModel, or an aMUSEd pipeline.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=(1 << 63) - 1,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the first variant; the next has the next.",
                ),
                io.Int.Input("steps", default=12, min=1, max=256, tooltip="Of the model."),
                io.Int.Input("variants", default=1, min=1, max=64, tooltip="Of each picture."),
                io.Float.Input(
                    "temperature",
                    default=2.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Noise in what the first steps keep; the last has none.",
                ),
                io.Float.Input(
                    "guidance", default=1.0, min=0.0, max=30.0, step=0.1, tooltip="1: none."
                ),
                io.String.Input(
                    "prompt", default="", tooltip="A text for aMUSEd, or a class of the model."
                ),
                io.Combo.Input(
                    "attention",
                    options=list(LADDER),
                    default="fp16",
                    tooltip="Precision of the model's attention.",
                ),
            ],
            outputs=[
                VQTokens.Output(display_name="tokens", tooltip="Filled, variant by variant."),
                io.String.Output(display_name="text", tooltip="How many were filled."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str, **_: Any) -> list[str]:
        """A model that was written anew is read anew; of a missing one :meth:`execute` tells."""
        try:
            return signature(fill_path(model))
        except ValueError:
            return []

    @classmethod
    def execute(
        cls,
        tokenizer: Tokenizer,
        tokens: Tokens,
        mask: Tensor,
        model: str,
        attention: str,
        temperature: float,
        **options: Any,
    ) -> io.NodeOutput:
        from dataclasses import replace

        from sage_diffusion.vq.edit import touched
        from sage_diffusion.vq.fill import load_fill

        tokens.check(tokenizer)
        where = touched(mask, *tokens.ids.shape[1:3]).expand(tokens.ids.shape[:3])
        found = load_fill(fill_path(model), None if attention == "fp16" else attention)
        found.check(tokenizer)
        found.model.to(comfy.model_management.get_torch_device())
        ids = found.fill(tokens.ids, where, temperature=(temperature, 0.0), **options).cpu()
        text = (
            f"{int(where.sum())} of {where.numel()} tokens filled, {options['variants']} variants"
        )
        show(cls.hidden.unique_id, text)
        return io.NodeOutput(replace(tokens, ids=ids), text)
