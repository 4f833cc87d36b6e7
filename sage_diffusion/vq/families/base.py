"""What a family of tokenizer checkpoints is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from sage_diffusion.vq.tokenizer import Tokenizer


class Checkpoint(NamedTuple):
    """A checkpoint's content.

    Attributes:
        state: tensors by name.
        config: ``config.json`` beside them, if it is a folder.
        header: this package's own, if the file has one.
    """

    state: dict[str, Tensor]
    config: dict[str, Any] | None
    header: dict[str, Any] | None


@dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
        name: of it.
        refuse: why a checkpoint is of another family, or None if it is of this one.
        load: the tokenizer; raises TokenizerError.
    """

    name: str
    refuse: Callable[[Checkpoint], str | None]
    load: Callable[[Checkpoint], Tokenizer]
