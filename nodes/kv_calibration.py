"""Calibrations of language models' K and V: measure, keep, read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
from comfy_api.latest import io, ui

from sage_diffusion.nodes.host import CATEGORY, register_folder, show, signature, without_ending

if TYPE_CHECKING:
    from sage_diffusion.kv.calibration import Calibration

#: Name of their folder below ``models`` and in ``extra_model_paths.yaml``.
CALIBRATIONS = "kv_calibrations"
KVCalibration = io.Custom("KV_CALIBRATION")


def register_calibration_folder() -> None:
    """Tell ComfyUI about ``models/kv_calibrations``; folders of ``extra_model_paths.yaml`` stay."""
    register_folder(CALIBRATIONS, {".safetensors"})


def calibration_path(name: str) -> Path:
    """The file of a calibration.

    Raises:
        ValueError: there is none of that name.
    """
    path = folder_paths.get_full_path(CALIBRATIONS, name) if name else None
    if path is None:
        raise ValueError(f"no calibration named {name!r} in models/{CALIBRATIONS}")
    return Path(path)


def describe(calibration: Calibration) -> str:
    """Whose it is and what it was made of, in a line."""
    about = calibration.about
    weighed = "weighed by gradients" if about.get("gradients") else "without gradients"
    return (
        f"{about.get('model', 'a model')} {calibration.fingerprint}: {len(calibration.layers)} "
        f"layers, {about.get('tokens', '?')} tokens, {weighed}"
    )


class KVCalibrate(io.ComfyNode):
    """What K and V of a CLIP's language model are like on a text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionKVCalibrate",
            display_name="Calibrate KV Cache",
            category=CATEGORY,
            description="Reads a text with a CLIP's language model and measures its keys and "
            "values, for the calibrated presets of KV Cache Compression. Once for each model.",
            search_aliases=["kv calibration", "calibrated preset", "kv cache basis"],
            inputs=[
                io.Clip.Input("clip", tooltip="A language model for Generate Text."),
                io.String.Input(
                    "text",
                    multiline=True,
                    tooltip="What the model will write, at best: at least 288 tokens, several "
                    "thousand are better. Not the text that anything is judged by later.",
                ),
            ],
            outputs=[
                KVCalibration.Output(display_name="calibration", tooltip="Save it, or use it."),
                io.String.Output(display_name="about", tooltip="What it was made of."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip: Any, text: str) -> io.NodeOutput:
        from sage_diffusion.integrations.comfy.kv_calibration import calibrate_clip

        found = calibrate_clip(clip, text)
        show(cls.hidden.unique_id, describe(found))
        return io.NodeOutput(found, describe(found))


class SaveKVCalibration(io.ComfyNode):
    """A calibration into a file; a file that is none is never replaced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionSaveKVCalibration",
            display_name="Save KV Calibration",
            category=CATEGORY,
            description="Writes a calibration as safetensors into models/kv_calibrations.",
            search_aliases=["kv calibration", "keep calibration"],
            is_output_node=True,
            inputs=[
                KVCalibration.Input("calibration", tooltip="From Calibrate KV Cache."),
                io.String.Input(
                    "name",
                    default="my calibration",
                    tooltip="File name without .safetensors; folder/name makes a folder.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replace a calibration of that name. Another file is never replaced.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, calibration: Calibration, name: str, overwrite: bool) -> io.NodeOutput:
        from sage_diffusion.kv.calibration import Calibration

        root = Path(folder_paths.get_folder_paths(CALIBRATIONS)[0]).resolve()
        stem = without_ending(name, "safetensors")
        path = (root / f"{stem}.safetensors").resolve()
        if not stem or stem.endswith("/") or not path.is_relative_to(root):
            raise ValueError(
                f"the name must be a file's inside models/{CALIBRATIONS}, got {name!r}"
            )
        if path.exists():
            if not overwrite:
                raise ValueError(f"{path} exists: set overwrite, or choose another name")
            Calibration.load(path)  # raises where it is something else
        path.parent.mkdir(parents=True, exist_ok=True)
        calibration.save(path)
        show(cls.hidden.unique_id, f"saved {path}")
        return io.NodeOutput(str(path), ui=ui.PreviewText(f"saved {path}"))


class LoadKVCalibration(io.ComfyNode):
    """A calibration from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SageDiffusionLoadKVCalibration",
            display_name="Load KV Calibration",
            category=CATEGORY,
            description="Reads a calibration from models/kv_calibrations. One of another model is "
            "refused where it is used.",
            search_aliases=["kv calibration", "open calibration"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list(CALIBRATIONS),
                    tooltip="A file that Save KV Calibration wrote.",
                )
            ],
            outputs=[
                KVCalibration.Output(
                    display_name="calibration", tooltip="For KV Cache Compression."
                ),
                io.String.Output(display_name="about", tooltip="What it was made of."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> list[str]:
        """A file that was written anew is read anew; of a missing one :meth:`execute` tells."""
        try:
            return signature(calibration_path(file))
        except ValueError:
            return []

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        from sage_diffusion.kv.calibration import Calibration

        found = Calibration.load(calibration_path(file))
        show(cls.hidden.unique_id, describe(found))
        return io.NodeOutput(found, describe(found))
