"""Nearest-code search inside a model of another pack."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from sage_diffusion.nodes.host import show
from sage_diffusion.nodes.vq import VQ_CATEGORY

_MODEL = io.MatchType.Template("model")


class VQSearch(io.ComfyNode):
    """Quantizers that never write latents x codes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionVQSearch",
            display_name="VQ Search",
            category=VQ_CATEGORY,
            description="Lets the quantizers of a loaded model (diffusers' VQModel, transformers' "
            "Emu3, Janus, Chameleon, GLM-Image, Apertus, Mimi, vector_quantize_pytorch, Stable "
            "Cascade's stage A) find codes without writing all distances. The ids stay the same.",
            search_aliases=["vq memory", "nearest code", "codebook search"],
            inputs=[
                io.MatchType.Input(
                    "model", _MODEL, tooltip="A VAE, pipeline or model that holds a quantizer."
                ),
                io.Boolean.Input(
                    "measure",
                    default=True,
                    tooltip="Run each quantizer's first call both ways and show the peak memory "
                    "before and after; costs the old peak once.",
                ),
            ],
            outputs=[
                io.MatchType.Output(_MODEL, display_name="model", tooltip="The same, searching."),
                io.String.Output(display_name="text", tooltip="Which quantizers search."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, measure: bool) -> io.NodeOutput:
        from sage_diffusion.vq.hosts import searching_copy
        from sage_diffusion.vq.tokenizer import Tokenizer

        node = cls.hidden.unique_id
        if isinstance(model, Tokenizer):
            text = "searches already: every tokenizer of this pack does"
            show(node, text)
            return io.NodeOutput(model, text)
        names: tuple[str, ...] = ()
        lines: list[str] = []

        def tell(measured: Any) -> None:
            lines.append(str(measured))
            show(node, "\n".join([text, *lines]))

        made, names = searching_copy(model, tell if measure else None)
        text = f"{len(names)} quantizers search: {', '.join(name or 'the model' for name in names)}"
        show(node, text)
        return io.NodeOutput(made, text)
