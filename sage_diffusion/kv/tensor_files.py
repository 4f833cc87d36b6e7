"""Files of named tensors, and what they are made of, in a format of the project's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from sage_diffusion.files import write_bytes


def save(
    path: str | Path, form: str, tensors: Mapping[str, Tensor], about: Mapping[str, str]
) -> None:
    """Write as safetensors, whose metadata are ``about`` and the format's name ``form``."""
    from safetensors.torch import save as serialized

    whole = {name: x.contiguous() for name, x in tensors.items()}
    write_bytes(Path(path), serialized(whole, {"format": form, **about}))


def load(
    path: str | Path, form: str, kind: str, error: type[ValueError], names: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of what :func:`save` wrote.

    Args:
        form: the format's name.
        kind: what a file of this format is, for the message.
        error: is raised where it is none.
        names: of metadata that it must have.

    Raises:
        OSError: the file can't be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as reason:
        raise error(f"{path} must be a safetensors file: {reason}") from None
    if about.get("format") != form:
        raise error(f"{path} must be a {kind} ({form}), it is not")
    if lost := [name for name in names if name not in about]:
        raise error(f"{path} must be a whole {kind}: its metadata lack {', '.join(lost)}")
    return tensors, about
