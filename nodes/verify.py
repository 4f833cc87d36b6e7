"""Are the kernels right on this card?"""

from __future__ import annotations

import comfy.model_management
from comfy_api.latest import io, ui

from sage_diffusion.integrations.comfy.verify import last_verdict, verify_now
from sage_diffusion.nodes.host import CATEGORY, show

_LAST, _NOW = "last verdict", "verify now"


class SageVerify(io.ComfyNode):
    """Every kernel of this card against its reference; wrong ones are left out from then on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionVerify",
            display_name="Sage Verify",
            category=CATEGORY,
            description="Runs every attention kernel of this card against its reference, about a "
            "minute, and switches off what is wrong here; or shows what was found last.",
            search_aliases=["sage verify", "kernel test", "self test", "wrong pictures"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "action",
                    options=[_LAST, _NOW],
                    tooltip="Show what was found last, or run the kernels now. Other work on the "
                    "card should rest meanwhile.",
                ),
            ],
            outputs=[io.String.Output(display_name="text", tooltip="A line per kernel.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, action: str) -> float:
        """Never the same: it is asked anew every time."""
        return float("nan")

    @classmethod
    def execute(cls, action: str) -> io.NodeOutput:
        device, node = str(comfy.model_management.get_torch_device()), cls.hidden.unique_id
        if action == _LAST:
            text = last_verdict(device)
        else:
            interrupted = comfy.model_management.throw_exception_if_processing_interrupted
            text = verify_now(device, lambda line: show(node, line), interrupted)
        show(node, text)
        return io.NodeOutput(text, ui=ui.PreviewText(text))
