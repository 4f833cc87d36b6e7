"""Pictures as tokens: load a tokenizer, encode, edit, decode, inspect, keep."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import comfy.model_management
import folder_paths
from comfy_api.latest import io, ui

from sage_diffusion.nodes.host import (
    TOKENIZERS,
    report_path,
    show,
    signature,
    tokenizer_names,
    tokenizer_path,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sage_diffusion.vq.idfile import Tokens
    from sage_diffusion.vq.tokenizer import Tokenizer

VQ_CATEGORY = "image/VQ tokens"

VQTokenizer = io.Custom("VQ_TOKENIZER")
VQTokens = io.Custom("VQ_TOKENS")


def pixels_of(image: Tensor) -> Tensor:
    """ComfyUI's ``[B, H, W, 3]`` as a tokenizer takes it."""
    return image[..., :3].movedim(-1, 1)


def picture_of(pixels: Tensor) -> Tensor:
    """``[B, 3, H, W]`` as ComfyUI's IMAGE."""
    return pixels.movedim(1, -1).float().cpu().contiguous()


@contextmanager
def _on_card(tokenizer: Tokenizer) -> Iterator[Tokenizer]:
    """The tokenizer on the card, and off it again whatever happens."""
    try:
        yield tokenizer.to(comfy.model_management.vae_device())
    finally:
        tokenizer.to(comfy.model_management.vae_offload_device())


def _summary(tokens: Tokens) -> str:
    from sage_diffusion.vq.tokenizer import token_bits

    count, height, width = tokens.ids.shape[:3]
    pictures = f"{count} x " if count > 1 else ""
    used = len(tokens.ids.unique())
    return (
        f"{pictures}{width} x {height} tokens, {used} of {tokens.codebook_size} codes, "
        f"{token_bits(tokens.ids):.2f} bits each as used"
    )


class LoadVQTokenizer(io.ComfyNode):
    """A tokenizer by name, its family told by its keys."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionLoadVQTokenizer",
            display_name="Load VQ Tokenizer",
            category=VQ_CATEGORY,
            description="Loads a VQ tokenizer: the bundled one, or from models/vq_tokenizers a "
            ".safetensors file or a folder as diffusers writes it. Its family is told by its keys.",
            search_aliases=["vqgan", "movq", "simvq", "tokenizer", "codebook"],
            inputs=[
                io.Combo.Input(
                    "tokenizer",
                    options=tokenizer_names(),
                    tooltip="The bundled one, or a file or folder of models/vq_tokenizers.",
                )
            ],
            outputs=[
                VQTokenizer.Output(display_name="tokenizer", tooltip="For VQ Encode and the like."),
                io.String.Output(display_name="text", tooltip="What it is."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, tokenizer: str) -> list[str]:
        """A changed file is read anew, one of a folder too."""
        return signature(tokenizer_path(tokenizer))

    @classmethod
    def execute(cls, tokenizer: str) -> io.NodeOutput:
        from sage_diffusion.vq import load_tokenizer

        found = load_tokenizer(tokenizer_path(tokenizer))
        traits, quantizer = found.traits, found.quantizer
        text = (
            f"{traits.family}: {quantizer.kind}, {found.codebook_size} codes of {quantizer.dim} "
            f"dims, {found.bits:g} bits for {traits.factor} x {traits.factor} pixels"
        )
        if traits.no_decoder:
            text += f"\ncan't decode: {traits.no_decoder}"
        show(cls.hidden.unique_id, text)
        return io.NodeOutput(found, text)


class VQEncode(io.ComfyNode):
    """Pictures to ids."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionVQEncode",
            display_name="VQ Encode",
            category=VQ_CATEGORY,
            description="Turns pictures into grids of tokens. Sides are cropped to whole tokens, "
            "centred.",
            search_aliases=["tokens", "vqgan encode", "tokenize picture"],
            inputs=[
                VQTokenizer.Input("tokenizer", tooltip="From Load VQ Tokenizer."),
                io.Image.Input("image", tooltip="Pictures of one size."),
            ],
            outputs=[
                VQTokens.Output(display_name="tokens", tooltip="Ids, and whose they are."),
                io.String.Output(display_name="text", tooltip="How many, and how they are used."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, tokenizer: Tokenizer, image: Tensor) -> io.NodeOutput:
        from sage_diffusion.vq.idfile import Tokens
        from sage_diffusion.vq.tokenizer import cropped

        pixels, note = cropped(pixels_of(image), tokenizer.traits.factor)
        with _on_card(tokenizer) as found:
            ids = found.encode(pixels).cpu()
        tokens = Tokens.of(tokenizer, ids)
        text = _summary(tokens)
        if note:
            text += f"\ncropped from {note[0]} x {note[1]} to {pixels.shape[3]} x {pixels.shape[2]}"
        show(cls.hidden.unique_id, text)
        return io.NodeOutput(tokens, text)


class VQDecode(io.ComfyNode):
    """Ids to pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionVQDecode",
            display_name="VQ Decode",
            category=VQ_CATEGORY,
            description="Turns tokens back into pictures, with the tokenizer that made them.",
            search_aliases=["tokens", "vqgan decode", "detokenize"],
            inputs=[
                VQTokenizer.Input("tokenizer", tooltip="The one that made the tokens."),
                VQTokens.Input("tokens", tooltip="From VQ Encode, VQ Token Edit or a file."),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The pictures.")],
        )

    @classmethod
    def execute(cls, tokenizer: Tokenizer, tokens: Tokens) -> io.NodeOutput:
        tokens.check(tokenizer)
        with _on_card(tokenizer) as found:
            pixels = found.decode(tokens.ids)
        return io.NodeOutput(picture_of(pixels))


_PAINT, _SWAP, _SHUFFLE, _PALETTE = "one token", "swap two tokens", "shuffle", "fewer tokens"


def _id(name: str, tooltip: str) -> io.Int.Input:
    return io.Int.Input(name, default=0, min=0, max=(1 << 20) - 1, tooltip=tooltip)


class VQTokenEdit(io.ComfyNode):
    """One change of ids, inside a painted mask or everywhere."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionVQTokenEdit",
            display_name="VQ Token Edit",
            category=VQ_CATEGORY,
            description="Changes tokens inside a mask, or all of them: one token everywhere, two "
            "swapped, shuffled, or replaced by the nearest of a few.",
            search_aliases=["tokens", "edit tokens", "codebook palette"],
            inputs=[
                VQTokenizer.Input("tokenizer", tooltip="The one that made the tokens."),
                VQTokens.Input("tokens", tooltip="The tokens to change."),
                io.DynamicCombo.Input(
                    "change",
                    options=[
                        io.DynamicCombo.Option(_PAINT, [_id("code", "The token's id.")]),
                        io.DynamicCombo.Option(
                            _SWAP, [_id("first", "An id."), _id("second", "The other id.")]
                        ),
                        io.DynamicCombo.Option(
                            _SHUFFLE,
                            [
                                io.Int.Input(
                                    "seed",
                                    default=0,
                                    min=0,
                                    max=(1 << 63) - 1,
                                    tooltip="Another seed, another order.",
                                )
                            ],
                        ),
                        io.DynamicCombo.Option(
                            _PALETTE,
                            [
                                io.Int.Input(
                                    "count",
                                    default=16,
                                    min=1,
                                    max=1 << 20,
                                    tooltip="Tokens that are left: those used most.",
                                )
                            ],
                        ),
                    ],
                    tooltip="What to do with them.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Only tokens that it touches; without one, all of them.",
                ),
            ],
            outputs=[
                VQTokens.Output(display_name="tokens", tooltip="The changed ones."),
                io.String.Output(display_name="text", tooltip="How many changed."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        tokenizer: Tokenizer,
        tokens: Tokens,
        change: dict[str, Any],
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        from dataclasses import replace

        import torch

        from sage_diffusion.vq import edit

        tokens.check(tokenizer)
        ids, codes = tokens.ids, tokens.codebook_size
        where = torch.ones(1, 1, 1, dtype=torch.bool)
        if mask is not None:
            where = edit.touched(mask, *ids.shape[1:3])
        kind = change["change"]
        if kind == _PAINT:
            out = edit.paint(ids, where, change["code"], codes)
        elif kind == _SWAP:
            out = edit.swap(ids, where, change["first"], change["second"], codes)
        elif kind == _SHUFFLE:
            out = edit.shuffle(ids, where, change["seed"])
        else:
            out = edit.palette(tokenizer, ids, where, change["count"])
        changed = int((out != ids).view(*ids.shape[:3], -1).any(-1).sum())
        new = replace(tokens, ids=out)
        text = f"{changed} of {ids.shape[:3].numel()} tokens changed"
        show(cls.hidden.unique_id, f"{text}\n{_summary(new)}")
        return io.NodeOutput(new, text)


class CodebookInspector(io.ComfyNode):
    """Which codes pictures use, where, and what they look like."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionCodebookInspector",
            display_name="Codebook Inspector",
            category=VQ_CATEGORY,
            description="Shows how tokens use their codebook: a heat map of all codes, the grid of "
            "ids in colours, the most used codes decoded, and the figures.",
            search_aliases=["codebook usage", "dead codes", "token map"],
            is_output_node=True,
            inputs=[
                VQTokenizer.Input("tokenizer", tooltip="The one that made the tokens."),
                VQTokens.Input("tokens", tooltip="Of one picture, or of many for true figures."),
                io.Int.Input(
                    "shown", default=32, min=1, max=1024, tooltip="Codes that are decoded."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="usage", tooltip="All codes, brighter where used."),
                io.Image.Output(display_name="token map", tooltip="A colour for each id."),
                io.Image.Output(display_name="codes", tooltip="The most used ones, decoded."),
                io.String.Output(display_name="text", tooltip="The figures."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, tokenizer: Tokenizer, tokens: Tokens, shown: int) -> io.NodeOutput:
        from sage_diffusion.vq.pictures import code_sheet, token_map, usage_map

        tokens.check(tokenizer)
        ids = tokens.ids
        rows = ids.reshape(-1, *ids.shape[3:])
        kinds, counts = rows.unique(dim=0, return_counts=True)
        most = kinds[counts.argsort(descending=True, stable=True)[:shown]]
        text = _summary(tokens)
        usage = usage_map(ids, tokens.codebook_size)
        sheet = usage[:, :, :1, :1]
        if tokenizer.decoder is None:
            text += f"\nno codes to show: {tokenizer.traits.no_decoder}"
        else:
            with _on_card(tokenizer) as found:
                sheet = code_sheet(found, most)
        show(cls.hidden.unique_id, text)
        pictures = [picture_of(x) for x in (usage, token_map(ids), sheet)]
        return io.NodeOutput(*pictures, text, ui=ui.PreviewText(text))


class SaveVQTokens(io.ComfyNode):
    """Ids into a file, packed to their bits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionSaveVQTokens",
            display_name="Save VQ Tokens",
            category=VQ_CATEGORY,
            description="Writes tokens, packed to their bits, into the output folder (.vqt).",
            search_aliases=["save tokens", "vqt"],
            is_output_node=True,
            inputs=[
                VQTokens.Input("tokens", tooltip="The tokens to keep."),
                io.String.Input(
                    "filename_prefix",
                    default="tokens",
                    tooltip="Name below the output folder; a number is appended.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, tokens: Tokens, filename_prefix: str) -> io.NodeOutput:
        from sage_diffusion.vq.idfile import save_tokens

        path = report_path(filename_prefix, "vqt")
        save_tokens(path, tokens)
        text = f"{path.name}: {path.stat().st_size} bytes"
        show(cls.hidden.unique_id, text)
        return io.NodeOutput(str(path), ui=ui.PreviewText(text))


class LoadVQTokens(io.ComfyNode):
    """Ids from a file of the input folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionLoadVQTokens",
            display_name="Load VQ Tokens",
            category=VQ_CATEGORY,
            description="Reads a file of tokens (.vqt) from the input or the output folder.",
            search_aliases=["load tokens", "vqt"],
            inputs=[
                io.String.Input(
                    "file",
                    default="tokens_00001.vqt",
                    tooltip="A name below the input folder, or else below the output folder.",
                )
            ],
            outputs=[VQTokens.Output(display_name="tokens", tooltip="Ids, and whose they are.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> tuple[str, float]:
        """A changed file is read anew; of a missing one :meth:`execute` tells."""
        path = _token_file(file)
        return file, path.stat().st_mtime if path.is_file() else 0.0

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        from sage_diffusion.vq.idfile import load_tokens

        tokens = load_tokens(_token_file(file))
        show(cls.hidden.unique_id, _summary(tokens))
        return io.NodeOutput(tokens)


def _token_file(name: str) -> Any:
    """Its path; ValueError where it leaves both folders."""
    from pathlib import Path

    folders = (folder_paths.get_input_directory(), folder_paths.get_output_directory())
    paths = []
    for folder in map(Path, folders):
        path = (folder / name).resolve()
        if path.is_relative_to(folder.resolve()):
            paths.append(path)
    if not paths:
        raise ValueError(f"file must lie in the input or the output folder, got {name!r}")
    return next((path for path in paths if path.is_file()), paths[0])


class ConvertTokenizer(io.ComfyNode):
    """A pickled checkpoint as safetensors."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionConvertTokenizer",
            display_name="Convert VQ Tokenizer",
            category=VQ_CATEGORY,
            description="Rewrites a pickled tokenizer (.ckpt, .pt, .pth, .bin) of "
            "models/vq_tokenizers as safetensors beside it. A pickle that wants to run code is "
            "refused; nothing is overwritten.",
            search_aliases=["convert vqgan", "ckpt to safetensors"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "file", default="vqgan.ckpt", tooltip="A name below models/vq_tokenizers."
                )
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The new file.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        from pathlib import Path

        from sage_diffusion.vq.checkpoints import convert

        found = folder_paths.get_full_path(TOKENIZERS, file)
        if found is None:
            raise ValueError(f"no file {file!r} in models/{TOKENIZERS}")
        out = Path(found).with_suffix(".safetensors")
        tokenizer = convert(Path(found), out)
        text = f"{out.name}: {tokenizer.traits.family}, {tokenizer.codebook_size} codes"
        show(cls.hidden.unique_id, text)
        return io.NodeOutput(str(out), ui=ui.PreviewText(text))
