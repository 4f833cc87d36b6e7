"""Causal language models of transformers from a folder, or from a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_model(path: Path, dtype: Any = "auto") -> tuple[Any, Any]:
    """A model in evaluation mode, on the CPU, and its tokenizer or None.

    Args:
        path: a folder as transformers writes it, one with a single ``.gguf``, or such a file.
        dtype: of the weights; "auto": as they are stored.

    Raises:
        ValueError: there is neither.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given: dict[str, Any] = {"local_files_only": True}
    folder = path
    if path.suffix == ".gguf":
        folder, given["gguf_file"] = path.parent, path.name
    elif not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise ValueError(f"{path} must hold a config.json or one .gguf, it has {len(files)}")
        given["gguf_file"] = files[0].name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given).eval()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    except (OSError, ValueError):
        tokenizer = None
    return model, tokenizer
