"""What this machine can run, and why not the rest."""

from __future__ import annotations

import comfy.model_management
from comfy_api.latest import io, ui

from sage_diffusion.integrations.comfy.doctor import diagnosis
from sage_diffusion.nodes.host import CATEGORY, show


class SageDoctor(io.ComfyNode):
    """Versions, every spec's backend on this machine, and each refusal in words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionDoctor",
            display_name="Sage Doctor",
            category=CATEGORY,
            description="Tells which attention specs this machine can run, by whom, and why not "
            "the rest.",
            search_aliases=["sage doctor", "attention diagnosis", "why is it slow", "environment"],
            is_output_node=True,
            inputs=[
                io.Int.Input(
                    "head_dim",
                    default=128,
                    min=1,
                    max=256,
                    tooltip="Head dim of the model to ask about: 128 for most video models and "
                    "Flux, 64 for SD3 and SDXL.",
                ),
                io.Combo.Input(
                    "mask",
                    options=["none", "bool", "additive"],
                    tooltip="Ask about calls with such a mask (Qwen-Image, LTX, Lumina have them).",
                ),
            ],
            outputs=[io.String.Output(display_name="text", tooltip="The diagnosis.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, head_dim: int, mask: str) -> io.NodeOutput:
        device = str(comfy.model_management.get_torch_device())
        text = diagnosis(device, head_dim=head_dim, mask=None if mask == "none" else mask)
        show(cls.hidden.unique_id, text)
        return io.NodeOutput(text, ui=ui.PreviewText(text))
