"""What a family of tokenizer checkpoints is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sage_diffusion.vq.quantizers import Quantizer, VectorQuantizer, build
from sage_diffusion.vq.tokenizer import Tokenizer, TokenizerError

#: Parts of a training checkpoint that no tokenizer needs.
TRAINING = re.compile(r"^(loss|discriminator|disc|perceptual_loss|lpips|colorize)\b")

_JANUS = "gen_vision_model."


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
        make: one with fresh weights from a quantizer and settings, where this package writes files
            of the family too; see :func:`own`.
    """

    name: str
    refuse: Callable[[Checkpoint], str | None]
    load: Callable[[Checkpoint], Tokenizer]
    make: Callable[[Quantizer, dict[str, Any]], Tokenizer] | None = None


def own(name: str, make: Callable[[Quantizer, dict[str, Any]], Tokenizer]) -> Family:
    """A family as this package writes it: everything that ``make`` needs is in the header."""

    def refuse(checkpoint: Checkpoint) -> str | None:
        header = checkpoint.header or {}
        if header.get("family") == name and ("quantizer" in header or "settings" in header):
            return None
        return "the file has no header of this family"

    def load(checkpoint: Checkpoint) -> Tokenizer:
        header = checkpoint.header or {}
        try:
            tokenizer = make(build(header["quantizer"]), header["settings"])
            state = {key: x.to(torch.float32) for key, x in checkpoint.state.items()}
            tokenizer.load_state_dict(state)
        except KeyError as error:
            raise TokenizerError(f"the header must have {error}") from None
        except (ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise TokenizerError(f"weights do not fit their header: {said}") from None
        return tokenizer

    return Family(name, refuse, load, make)


def lacking(state: Iterable[str], *names: str) -> str | None:
    """The first of these keys that is missing, in words; None if there are all."""
    missing = next((name for name in names if name not in state), None)
    return None if missing is None else f"no {missing} among the keys"


def numbers(state: Iterable[str], pattern: str) -> list[int]:
    """Numbers that stand in keys, ascending."""
    return sorted({int(m[1]) for m in (re.match(pattern, name) for name in state) if m})


def averaged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with their averages in their places, where training kept such.

    The authors of IBQ and Open-MAGVIT2 evaluate with those, and SimVQ's checkpoints have them too.
    Averages lie under ``model_ema.`` and the name without its dots.
    """
    found = {}
    for name, tensor in state.items():
        average = state.get("model_ema." + name.replace(".", ""))
        if not name.startswith("model_ema."):
            found[name] = tensor if average is None else average
    return found


def needed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a tokenizer needs of a training checkpoint, or of a whole Janus of its authors.

    Averages have taken their weights' places; losses and discriminators are gone.
    """
    whole = any(name.startswith(_JANUS) for name in state)
    return {
        name: tensor
        for name, tensor in averaged(state).items()
        if not TRAINING.match(name) and (not whole or name.startswith(_JANUS))
    }


def codes(table: Tensor, metric: str = "l2") -> VectorQuantizer:
    """A codebook that is not trained any more."""
    quantizer = VectorQuantizer(table.shape[1], len(table), decay=None, kmeans=False, metric=metric)
    quantizer.load_state_dict({"codebook": table.float()})
    return quantizer


def fill(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Put weights into a network.

    Raises:
        TokenizerError: they are of another one.
    """
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except (TypeError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise TokenizerError(f"weights do not fit {what}: {said[:400]}") from None
