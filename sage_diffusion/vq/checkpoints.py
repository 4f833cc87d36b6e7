"""Tokenizer files: this package's own (safetensors with a JSON header), and other people's."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.files import write_bytes
from sage_diffusion.json_files import JSONError, parse_json, read_json
from sage_diffusion.vq.families import Checkpoint, families
from sage_diffusion.vq.families.base import needed
from sage_diffusion.vq.tokenizer import Tokenizer, TokenizerError

#: Key of the header in a file's metadata, and its version.
_KEY, _VERSION = "sage_vq", 1

#: The tokenizer that comes with this package.
BUNDLED = Path(__file__).parent.parent / "assets" / "photo_vq" / "tokenizer.safetensors"

#: State of a codebook's training.
_TRAINING = ("counts", "sums", "started")

#: Parts of whole models (transformers) that make their tokenizers.
_PARTS = re.compile(r"(^|\.)(vqmodel|vision_tokenizer|visual)\.")


def load_tokenizer(source: str | Path) -> Tokenizer:
    """A tokenizer, in evaluation mode on the CPU.

    Args:
        source: "bundled", a file of this package, another project's ``.safetensors``, or a folder
            with ``config.json`` as diffusers writes it.  Families are told by their keys.

    Raises:
        TokenizerError: there is no such file, or no family that reads it, with each one's reason.
    """
    path = BUNDLED if str(source) == "bundled" else Path(source)
    checkpoint = _read(path)
    reasons = []
    for family in families():
        reason = family.refuse(checkpoint)
        if reason is None:
            tokenizer = family.load(checkpoint).eval()
            _check_fingerprint(path, checkpoint.header, tokenizer)
            return tokenizer
        reasons.append(f"{family.name}: {reason}")
    raise TokenizerError(f"{path} is of no tokenizer family that is known; {'; '.join(reasons)}")


def save_tokenizer(path: Path, tokenizer: Tokenizer, *, half: bool = False) -> None:
    """Write a tokenizer with everything that it takes to make it again, whole or not at all.

    Args:
        path: of the file.
        tokenizer: as :func:`~sage_diffusion.vq.families.compact.make` makes it, or of another
            family that can be written (a repaired VQGAN).
        half: convolutions in FP16, half the size; codes stay in float32, so that ids do.

    Raises:
        TokenizerError: its family can't be written.
    """
    from safetensors.torch import save

    check_writable(tokenizer)
    state = {}
    for name, tensor in tokenizer.state_dict().items():
        if name.rpartition(".")[2] in _TRAINING:
            continue
        network = not name.startswith("quantizer.")
        state[name] = tensor.detach().cpu().to(torch.float16 if half and network else torch.float32)
    header = {
        "version": _VERSION,
        "family": tokenizer.traits.family,
        "settings": tokenizer.settings,
        "quantizer": tokenizer.quantizer.settings,
        "fingerprint": tokenizer.fingerprint,
    }
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    write_bytes(path, save(contiguous, {_KEY: json.dumps(header)}))


def check_writable(tokenizer: Tokenizer) -> None:
    """Raise TokenizerError unless :func:`save_tokenizer` writes this family."""
    written = sorted({family.name for family in families() if family.make is not None})
    if tokenizer.traits.family not in written:
        raise TokenizerError(
            f"only the families {', '.join(written)} are written, got {tokenizer.traits.family}; "
            "convert its checkpoint instead"
        )


def convert(
    source: Path,
    out: Path,
    *,
    metric: str | None = None,
    levels: Sequence[int] | None = None,
    scales: Sequence[int] | None = None,
) -> Tokenizer:
    """Rewrite a pickled checkpoint (``.ckpt``, ``.pt``, ``.pth``, ``.bin``) as safetensors.

    The pickle is read with ``weights_only=True``: one that wants to run code is refused.  Losses,
    discriminators and weights that averages replace are left out; the result is checked by loading.

    Args:
        source: the checkpoint; weights may lie below ``state_dict`` or ``model``.
        out: the new file; it must not exist.
        metric: of the codes where keys do not tell it: "l2", "cosine" or "dot" (IBQ's).
        levels: of a VQGAN whose latents are rounded (FSQ), which has no codebook.
        scales: sides of VAR's grids, where they are not those for 256 pixels.

    Returns:
        The tokenizer that the new file holds.

    Raises:
        TokenizerError: the source is no checkpoint, wants code, or is of no known family; or
            ``out`` exists.
    """
    from safetensors.torch import save

    if out.exists():
        raise TokenizerError(f"{out} exists; nothing is overwritten")
    state = needed(_unpickle(source))
    tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    told = {"metric": metric, "levels": levels, "scales": scales}
    header: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
    checkpoint = Checkpoint(tensors, None, header)
    known = families()
    family = next((f for f in known if f.refuse(checkpoint) is None), None)
    if family is None:
        reasons = "; ".join(f"{f.name}: {f.refuse(checkpoint)}" for f in known)
        raise TokenizerError(f"{source} is of no tokenizer family that is known; {reasons}")
    tokenizer = family.load(checkpoint).eval()
    header.update(version=_VERSION, family=family.name, fingerprint=tokenizer.fingerprint)
    write_bytes(out, save(tensors, {_KEY: json.dumps(header)}))
    return tokenizer


def _read(path: Path) -> Checkpoint:
    config = None
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise TokenizerError(f"{path} must hold a config.json, found none")
        config = _json(path / "config.json")
        return Checkpoint(_folder(path), config, None)
    if not path.is_file():
        raise TokenizerError(f"{path} must be a file or folder, there is none")
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise TokenizerError(f"{path} is a pickle; convert it first (sage-diffusion vq convert)")
    state, header = _tensors(path)
    return Checkpoint(state, config, None if header is None else _header(path, header))


def _folder(path: Path) -> dict[str, Tensor]:
    """Weights of a folder; of a whole model only what its tokenizer needs."""
    files = sorted(path.glob("*.safetensors"))
    if not files or (len(files) > 1 and not list(path.glob("*.safetensors.index.json"))):
        raise TokenizerError(
            f"{path} must hold one .safetensors file, or parts and their index, "
            f"found {len(files)} files"
        )
    names = {file: _open(file, lambda found: list(found.keys())) for file in files}
    whole = any(_PARTS.search(name) for own in names.values() for name in own)
    state: dict[str, Tensor] = {}
    for file, own in names.items():
        kept = [name for name in own if not whole or _PARTS.search(name)]
        state |= _open(file, _getter(kept))
    return state


def _getter(names: list[str]) -> Callable[[Any], dict[str, Tensor]]:
    return lambda file: {name: file.get_tensor(name) for name in names}


def _tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors of a file, and its header's text."""

    def read(file: Any) -> tuple[dict[str, Tensor], Any]:
        header = (file.metadata() or {}).get(_KEY)
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118

    return _open(path, read)


def _open(path: Path, read: Callable[[Any], Any]) -> Any:
    """What is read of an open safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return read(file)
    except (SafetensorError, OSError) as error:
        raise TokenizerError(f"{path} is no safetensors file: {error}") from None


def _header(path: Path, text: str) -> dict[str, Any]:
    try:
        header = parse_json(text)
    except JSONError as error:
        raise TokenizerError(f"{path} has a damaged header: {error}") from None
    if not isinstance(header, dict) or header.get("version") != _VERSION:
        raise TokenizerError(f"{path} must have a header of version {_VERSION}, got {text[:80]}")
    return header


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, JSONError) as error:
        raise TokenizerError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise TokenizerError(f"{path} must hold an object, got {type(found).__name__}")
    return found


def _check_fingerprint(path: Path, header: dict[str, Any] | None, tokenizer: Tokenizer) -> None:
    said = (header or {}).get("fingerprint", tokenizer.fingerprint)
    if said != tokenizer.fingerprint:
        raise TokenizerError(
            f"{path} must hold the codes that its header names ({said}), "
            f"found others ({tokenizer.fingerprint})"
        )


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TokenizerError(f"{path} can't be read: {error.strerror}") from None
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise TokenizerError(f"{path} is no checkpoint that PyTorch reads") from None
        raise TokenizerError(f"{path} wants to run code, {wanted[1]}: it is not read") from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise TokenizerError(f"{path} is no checkpoint: {error}") from None
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    state = (
        {k: v for k, v in loaded.items() if isinstance(v, Tensor)}
        if isinstance(loaded, dict)
        else {}
    )
    if not state:
        raise TokenizerError(f"{path} must hold a dictionary of tensors, found none")
    return state
