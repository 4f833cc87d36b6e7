"""New tokenizers: trained on one's own pictures, or repaired."""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io

from sage_diffusion.nodes.host import new_tokenizer_path, show, signature, without_ending
from sage_diffusion.nodes.vq import VQ_CATEGORY, VQTokenizer, picture_of, pixels_of
from sage_diffusion.vq.quantizers.recipes import RECIPES, recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from sage_diffusion.vq.tokenizer import Tokenizer
    from sage_diffusion.vq.training import Step

#: Seconds between previews.
_EVERY = 2.0


def _inputs(steps: int) -> list[Any]:
    """Pictures and how to train, of both nodes."""
    return [
        io.Int.Input("steps", default=steps, min=1, max=1_000_000, tooltip="Of the optimizer."),
        io.Int.Input("batch", default=16, min=1, max=4096, tooltip="Crops a step."),
        io.Int.Input("crop", default=64, min=4, max=1024, tooltip="Side of a crop in pixels."),
        io.Float.Input(
            "learning_rate", default=1e-3, min=1e-6, max=1.0, step=1e-5, tooltip="At its highest."
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=(1 << 31) - 1,
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="Of codes and crops.",
        ),
        io.String.Input(
            "name",
            default="mine",
            tooltip="Of the file in models/vq_tokenizers, with a number; a run of that name that "
            "was cancelled goes on.",
        ),
        io.Boolean.Input(
            "resume", default=True, tooltip="Go on where a cancelled run stopped; off: start anew."
        ),
        io.Image.Input("images", optional=True, tooltip="Pictures to learn from, in a batch."),
        io.String.Input(
            "folder",
            default="",
            optional=True,
            tooltip="A folder of pictures below the input folder, beside or instead of images.",
        ),
    ]


_OUTPUTS = [
    VQTokenizer.Output(display_name="tokenizer", tooltip="The new one."),
    io.Image.Output(display_name="preview", tooltip="Crops, and below what becomes of them."),
    io.String.Output(display_name="text", tooltip="How good it became, and its file."),
]


class TrainVQTokenizer(io.ComfyNode):
    """A small tokenizer from one's own pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionTrainVQTokenizer",
            display_name="Train VQ Tokenizer",
            category=VQ_CATEGORY,
            description="Trains a small tokenizer on your own pictures, 8 x 8 pixels a token, with "
            "a preview. Cancel keeps a checkpoint, and the same name goes on from it.",
            search_aliases=["train vqgan", "simvq", "codebook training", "fsq"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "quantizer",
                    options=list(RECIPES),
                    default="vector",
                    tooltip="vector: codebook by moving averages, with k-means start and revival; "
                    "cosine: the same by angle; simvq for very many codes.",
                ),
                io.Int.Input(
                    "codes",
                    default=4096,
                    min=2,
                    max=1 << 20,
                    tooltip="Of each group and level; of fsq, bsq and lfq a power of two.",
                ),
                io.Int.Input("dim", default=16, min=1, max=512, tooltip="Of the latents."),
                io.Int.Input(
                    "groups", default=1, min=1, max=16, tooltip="Channels are split into so many."
                ),
                io.Int.Input("depth", default=1, min=1, max=16, tooltip="Residual levels."),
                *_inputs(2000),
            ],
            outputs=_OUTPUTS,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str = "", **_: Any) -> list[str]:
        """Other pictures in the folder, another tokenizer."""
        return _folder_signature(folder)

    @classmethod
    def execute(
        cls, quantizer: str, codes: int, dim: int, groups: int, depth: int, **given: Any
    ) -> io.NodeOutput:
        import torch

        from sage_diffusion.vq.families import compact
        from sage_diffusion.vq.training import preview, train

        new_tokenizer_path(given["name"])  # a name that can't be is said before training
        with _learning():
            pictures = _pictures(given)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(given["seed"])
                made = compact.make(recipe(quantizer, codes, dim, groups=groups, depth=depth))
            training = _training(given)
            made.to(comfy.model_management.get_torch_device())

            def shown() -> Tensor:
                return preview(made, pictures, training.crop)

            watch = _Watch(cls.hidden.unique_id, training.steps, shown)
            kept = _checkpoint(given)
            train(made, pictures, training, checkpoint=kept, save_every=100, progress=watch)
            picture = shown()
        path = _save(given["name"], made, kept)
        text = f"{path.name}: {watch.last:.2f} dB of the last batches, {made.bits:g} bits a token"
        show(cls.hidden.unique_id, text)
        return io.NodeOutput(made, picture_of(picture), text)


class CodebookRepair(io.ComfyNode):
    """New codes for a tokenizer that uses hardly any."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionCodebookRepair",
            display_name="Codebook Repair",
            category=VQ_CATEGORY,
            description="Gives a tokenizer that uses hardly any of its codes new ones, and trains "
            "it with them: without that pictures get worse. The old one stays as it is; ids of "
            "the new one mean something else.",
            search_aliases=["codebook collapse", "dead codes", "k-means", "simvq"],
            is_output_node=True,
            inputs=[
                VQTokenizer.Input("tokenizer", tooltip="The one whose codes died."),
                io.Combo.Input(
                    "method",
                    options=["kmeans", "simvq"],
                    tooltip="New codes by k-means of the pictures' latents, or a fresh SimVQ basis "
                    "with their mean and covariance.",
                ),
                io.Combo.Input(
                    "parts",
                    options=["all", "decoder"],
                    tooltip="What learns: all, or the codes and the decoder, the encoder stays.",
                ),
                *_inputs(500),
            ],
            outputs=_OUTPUTS,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str = "", **_: Any) -> list[str]:
        """Other pictures in the folder, another repair."""
        return _folder_signature(folder)

    @classmethod
    def execute(cls, tokenizer: Tokenizer, method: str, parts: str, **given: Any) -> io.NodeOutput:
        import copy

        from sage_diffusion.vq.checkpoints import check_writable
        from sage_diffusion.vq.repair import repair
        from sage_diffusion.vq.training import preview

        check_writable(tokenizer)
        new_tokenizer_path(given["name"])
        with _learning():
            pictures, training = _pictures(given), _training(given, parts)
            watch = _Watch(cls.hidden.unique_id, training.steps, None)
            device = comfy.model_management.get_torch_device()
            found = repair(
                copy.deepcopy(tokenizer).to(device),
                pictures,
                training,
                method=method,
                checkpoint=(kept := _checkpoint(given)),
                progress=watch,
            )
            picture = preview(found.tokenizer, pictures, training.crop)
        path = _save(given["name"], found.tokenizer, kept)
        text = f"{found}\n{path.name}"
        show(cls.hidden.unique_id, text)
        return io.NodeOutput(found.tokenizer, picture_of(picture), text)


class _Watch:
    """Bar, preview and cancel; called after every step.

    Args:
        node: its id.
        steps: of the training.
        shown: the preview, or None.
    """

    def __init__(self, node: Any, steps: int, shown: Callable[[], Tensor] | None):
        self.bar = comfy.utils.ProgressBar(steps, node_id=node)
        self.node, self.steps, self.shown = node, steps, shown
        self.last, self.at = 0.0, 0.0

    def __call__(self, step: Step) -> None:
        self.last = step.psnr if not self.last else 0.95 * self.last + 0.05 * step.psnr
        picture = None
        if time.monotonic() - self.at >= _EVERY:
            self.at = time.monotonic()
            picture = None if self.shown is None else _jpeg(self.shown())
            show(self.node, f"step {step.step} of {self.steps}: {self.last:.2f} dB")
        self.bar.update_absolute(step.step, self.steps, picture)
        comfy.model_management.throw_exception_if_processing_interrupted()


def _jpeg(picture: Tensor) -> tuple[str, Any, int]:
    """A picture ``[1, 3, H, W]`` as ComfyUI sends previews."""
    import torch
    from PIL import Image

    array = (picture[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return "JPEG", Image.fromarray(array), 1024


@contextmanager
def _learning() -> Iterator[None]:
    """ComfyUI runs nodes in inference mode, in which nothing learns."""
    import torch

    with torch.inference_mode(False), torch.enable_grad():
        yield


def _training(given: dict[str, Any], parts: str = "all") -> Any:
    from sage_diffusion.vq.training import Training

    names = ("steps", "batch", "crop", "learning_rate", "seed")
    return Training(**{name: given[name] for name in names}, parts=parts)


def _pictures(given: dict[str, Any]) -> list[Tensor]:
    """``[3, H, W]`` uint8 of the batch and the folder."""
    import torch

    from sage_diffusion.vq.photographs import LONGEST, load_picture, picture_files

    found = []
    if given.get("images") is not None:
        found += list((pixels_of(given["images"]).cpu() * 255).round().to(torch.uint8))
    if given.get("folder"):
        paths = picture_files([_folder(given["folder"])])
        found += [load_picture(path, LONGEST) for path in paths]
    if not found:
        raise ValueError("give it images, or a folder of pictures below the input folder")
    return found


def _folder(name: str) -> Path:
    """Below ComfyUI's input folder, never outside of it."""
    root = Path(folder_paths.get_input_directory()).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root) or not path.is_dir():
        raise ValueError(f"folder must be one below the input folder, got {name!r}")
    return path


def _folder_signature(name: str | None) -> list[str]:
    try:
        return signature(_folder(name)) if name else []
    except ValueError:
        return []  # of a missing one the node tells when it runs


def _checkpoint(given: dict[str, Any]) -> Path:
    """Where a run of that name keeps what it needs to go on."""
    name = without_ending(given["name"], "safetensors")
    plain = re.sub(r"[^\w .+()-]", "_", name).strip(" .") or "tokenizer"
    folder = Path(folder_paths.get_output_directory()) / "sage_tokenizers"
    path = folder / f"{plain}.checkpoint.safetensors"
    if not given["resume"]:
        path.unlink(missing_ok=True)
    return path


def _save(name: str, made: Tokenizer, kept: Path) -> Path:
    """Into a new file; the checkpoint is done with."""
    from sage_diffusion.vq.checkpoints import save_tokenizer

    made.to(comfy.model_management.vae_offload_device())
    path = new_tokenizer_path(name)
    save_tokenizer(path, made)
    kept.unlink(missing_ok=True)
    return path
