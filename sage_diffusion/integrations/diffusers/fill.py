"""Masked fill through diffusers' ``UVit2DModel`` and ``AmusedScheduler`` (MaskGIT, 2202.04200).

aMUSEd's checkpoints are such models that read a prompt; a model of one's own reads a class, or
nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sage_diffusion.files import write_bytes, write_text
from sage_diffusion.integrations.diffusers.control import enable
from sage_diffusion.vq.fill import check_fill
from sage_diffusion.vq.tokenizer import Tokenizer, TokenizerError

_NOTES, _CLASSES = "fill.json", "classes.safetensors"

#: What aMUSEd takes a picture's looks for.
_AESTHETIC_SCORE = 6.0


@dataclass(frozen=True)
class Notes:
    """What a fill model's folder says besides its network.

    Attributes:
        fingerprint: of the tokenizer whose ids it fills; None: any of its codebook's size.
        classes: names of the classes that it was trained with.
        masking_schedule: "cosine" or "linear", of the scheduler.
        window: tokens along a side of the largest crops that it was trained on, of a model that is
            not told where in the picture it is: it reads as much around a mask, and a quarter more
            on each side of a larger one. 0: the whole picture.
        sharpness: factor of the logits that tokens are drawn from. A small model is unsure of
            much and draws what fits nowhere at 1.
    """

    fingerprint: str | None = None
    classes: tuple[str, ...] = field(default=())
    masking_schedule: str = "cosine"
    window: int = 0
    sharpness: float = 1.0


class FillModel:
    """A model that completes masked tokens.

    Args:
        model: a ``UVit2DModel``.
        scheduler: an ``AmusedScheduler``.
        condition: the hidden states ``[1, L, D]`` and pooled embedding ``[1, P]`` of a text; ""
            must be one.
        notes: of its folder.
        factor: pixels along a token's sides, which aMUSEd is told of; 0 for models that are not.
    """

    def __init__(
        self,
        model: Any,
        scheduler: Any,
        condition: Callable[[str], tuple[Tensor, Tensor]],
        notes: Notes,
        factor: int = 0,
    ):
        self.model, self.scheduler, self.condition = model, scheduler, condition
        self.notes, self.factor = notes, factor

    @property
    def codebook_size(self) -> int:
        """Ids that it knows, without that of the mask."""
        return self.model.config.codebook_size

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise TokenizerError unless this model fills a tokenizer's ids."""
        known = (self.codebook_size, self.notes.fingerprint or tokenizer.fingerprint)
        if known != (tokenizer.codebook_size, tokenizer.fingerprint):
            raise TokenizerError(
                f"the fill model must be of this tokenizer ({tokenizer.codebook_size} codes, "
                f"{tokenizer.fingerprint}), it is of another vocabulary ({known[0]} codes, "
                f"{known[1]})"
            )

    @torch.no_grad()
    def fill(
        self,
        ids: Tensor,
        mask: Tensor,
        *,
        seed: int = 0,
        steps: int = 12,
        variants: int = 1,
        temperature: float | tuple[float, float] = (2.0, 0.0),
        guidance: float = 1.0,
        prompt: str = "",
    ) -> Tensor:
        """New ids where the mask is true; all others stay.

        Args:
            ids: ``[B, h, w]``; what stands under the mask is not read.
            mask: boolean ``[h, w]`` or ``[B, h, w]``.
            seed: of the first variant; the next has the next.
            steps: of the model; each keeps the surest tokens, more of them every time.
            variants: of each picture.
            temperature: of the noise in what counts as sure, first and last step.
            guidance: 1: none; more moves the logits away from those without prompt.
            prompt: a text, or a class of the model; "" is none.

        Returns:
            ``[variants * B, h, w]``, variant by variant.

        Raises:
            TokenizerError: ids, mask or an option do not fit the model.
        """
        mask = check_fill(ids, mask, self.codebook_size)
        ends = temperature if isinstance(temperature, tuple) else (temperature, temperature)
        if steps < 1 or variants < 1 or len(ends) != 2 or not all(0 <= t < 1e3 for t in ends):
            raise TokenizerError(
                "steps and variants must be at least 1, temperature one or two numbers from 0 on, "
                f"got {steps}, {variants}, {temperature}"
            )
        if guidance != 1.0 and not prompt:
            raise TokenizerError("guidance needs a prompt or class to move to, got none")
        device = self.model.device
        texts = ["", prompt] if guidance != 1.0 else [prompt]
        region = self._region(mask)
        given, mask = (
            x[region].to(device).repeat(variants, 1, 1) for x in (ids, mask.expand_as(ids))
        )
        inputs = self.inputs(texts, given.shape[1:], len(given))
        generators = [torch.Generator().manual_seed(seed + i) for i in range(variants)]
        self.scheduler.set_timesteps(steps, ends, device)
        sample = given.masked_fill(mask, self.mask_id)
        for i, timestep in enumerate(self.scheduler.timesteps):
            with self._at(i, steps):
                logits = self.model(sample.repeat(len(texts), 1, 1), **inputs)
            logits = logits.float()
            if len(texts) > 1:
                without, logits = logits.chunk(2)
                logits = without + guidance * (logits - without)
            logits = logits * self.notes.sharpness
            for n, one in enumerate(sample):
                self._step(timestep, logits[n], one, mask[n], generators[n // len(ids)])
        filled = ids.repeat(variants, 1, 1)
        filled[region] = sample.to(ids.device)
        return filled

    def _region(self, mask: Tensor) -> tuple[slice, ...]:
        """What the model reads of ids ``[B, h, w]`` where these masks are to be filled."""
        found = [slice(None)]
        for dim, side in ((2, mask.shape[1]), (1, mask.shape[2])):
            touched = mask.any(dim).any(0).nonzero().flatten().tolist()
            if not (self.notes.window and touched):
                return (slice(None),)
            first, last = touched[0], touched[-1] + 1
            wide = max(self.notes.window, last - first + self.notes.window // 2)
            start = max(0, min((first + last - wide) // 2, side - wide))
            found.append(slice(start, min(side, start + wide)))
        return tuple(found)

    @torch.no_grad()
    def bits(self, ids: Tensor, mask: Tensor) -> float:
        """Cross-entropy of the ids under a mask, all of them masked at once.

        Args:
            ids: ``[B, h, w]``; a model that knows crops is asked of whole ones, from the top left.
            mask: boolean ``[h, w]`` or ``[B, h, w]``, true somewhere.

        Returns:
            Bits a masked token.

        Raises:
            TokenizerError: ids or mask do not fit the model, or nothing is masked.
        """
        mask = check_fill(ids, mask, self.codebook_size).expand_as(ids)
        if not mask.any():
            raise TokenizerError("a mask must be true somewhere, got none")
        total, side = 0.0, self.notes.window or max(ids.shape[1:])
        for rows in range(0, ids.shape[1], side):
            for cols in range(0, ids.shape[2], side):
                part = (slice(None), slice(rows, rows + side), slice(cols, cols + side))
                some, where = ids[part].to(self.model.device), mask[part].to(self.model.device)
                inputs = self.inputs([""], some.shape[1:], len(some))
                logits = self.model(some.masked_fill(where, self.mask_id), **inputs).float()
                logits = logits.movedim(1, 3)[where]
                total += F.cross_entropy(logits, some[where].long(), reduction="sum").item()
        return total / int(mask.sum()) / math.log(2)

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked token."""
        return self.scheduler.config.mask_token_id

    def _step(
        self, timestep: Tensor, logits: Tensor, ids: Tensor, mask: Tensor, generator: Any
    ) -> None:
        """One picture's ids ``[h, w]`` after a step, from ``[K, h, w]``.

        The scheduler sees what is to fill alone: of all tokens it would mask given ones where noise
        is hot, one of a picture that has nothing to fill, and draw for each.
        """
        if mask.sum() > (timestep != 0):  # a single token stays masked until the last step
            ids[mask] = self.scheduler.step(
                logits[:, mask].T[None], timestep, ids[mask][None], generator=generator
            ).prev_sample[0]

    def inputs(self, texts: Sequence[str], grid: Sequence[int], count: int) -> dict[str, Tensor]:
        """Arguments of the model besides its ids: conditions of so many pictures, for each text."""
        config, device, dtype = self.model.config, self.model.device, self.model.dtype
        hidden, pooled = zip(*(self.condition(text) for text in texts), strict=True)
        micro = torch.zeros(config.micro_cond_embed_dim // config.micro_cond_encode_dim)
        if self.factor:  # width before height, as aMUSEd was trained
            height, width = (side * self.factor for side in grid)
            micro = torch.tensor([width, height, 0.0, 0.0, _AESTHETIC_SCORE])
        named = {
            "encoder_hidden_states": torch.cat(hidden),
            "pooled_text_emb": torch.cat(pooled),
            "micro_conds": micro.expand(len(texts), -1),
        }
        return {n: x.to(device, dtype).repeat_interleave(count, 0) for n, x in named.items()}

    def _at(self, step: int, steps: int) -> Any:
        """Where sampling stands, for the model's attention."""
        session = getattr(getattr(self.model, "sage", None), "session", None)
        if session is None:
            return contextlib.nullcontext()
        return session.at(step / max(steps - 1, 1), step=step)


def load(folder: Path, attention: str | None = None) -> FillModel:
    """See :func:`sage_diffusion.vq.fill.load_fill`."""
    made = _pipeline(folder) if (folder / "model_index.json").is_file() else _own(folder)
    made.model.eval()
    if attention is not None:
        enable(made.model, attention)
    return made


def save_fill(
    folder: Path, model: Any, notes: Notes, classes: tuple[Tensor, Tensor] | None = None
) -> None:
    """Write a fill model of one's own.

    Args:
        folder: is made; what lies in it under the same names is replaced.
        model: a ``UVit2DModel`` whose last id is that of the mask.
        notes: of it.
        classes: hidden states ``[1 + C, L, D]`` and pooled embeddings ``[1 + C, P]``, first those
            of no class; None: zeros, without classes.
    """
    from safetensors.torch import save

    model.save_pretrained(folder)
    if classes is not None:
        named = dict(zip(("hidden", "pooled"), classes, strict=True))
        write_bytes(folder / _CLASSES, save({n: x.contiguous() for n, x in named.items()}))
    write_text(folder / _NOTES, json.dumps(asdict(notes), indent=2) + "\n")


def _model(folder: Path) -> Any:
    from diffusers import UVit2DModel

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{folder} must hold a UVit2DModel's config.json: {error}") from None
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind != "UVit2DModel":
        raise TokenizerError(f"{folder} must hold a UVit2DModel, its config.json names {kind}")
    try:
        return UVit2DModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:400]
        raise TokenizerError(f"{folder} holds no UVit2DModel that can be read: {said}") from None


def _own(folder: Path) -> FillModel:
    from diffusers import AmusedScheduler
    from safetensors.torch import load_file

    model = _model(folder)
    notes = _notes(folder)
    config = model.config
    hidden = torch.zeros(1, 1, config.encoder_hidden_size)
    pooled = torch.zeros(1, config.cond_embed_dim)
    if (folder / _CLASSES).is_file():
        found = load_file(folder / _CLASSES)
        hidden, pooled = found["hidden"], found["pooled"]
    names = ("", *notes.classes)
    if not len(names) == len(hidden) == len(pooled):
        raise TokenizerError(
            f"{folder} must have embeddings of no class and of {len(notes.classes)}, "
            f"got {len(hidden)} and {len(pooled)}"
        )

    def condition(text: str) -> tuple[Tensor, Tensor]:
        if text not in names:
            known = ", ".join(notes.classes) or "none"
            raise TokenizerError(f"prompt must be a class of the fill model ({known}), got {text}")
        i = names.index(text)
        return hidden[i : i + 1], pooled[i : i + 1]

    scheduler = AmusedScheduler(
        mask_token_id=config.vocab_size - 1,
        masking_schedule=notes.masking_schedule,  # type: ignore[arg-type]
    )
    return FillModel(model, scheduler, condition, notes)


def _notes(folder: Path) -> Notes:
    path = folder / _NOTES
    if not path.is_file():
        return Notes()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Notes(**{**found, "classes": tuple(found.get("classes", ()))})
    except (ValueError, TypeError, AttributeError) as error:
        raise TokenizerError(f"{path} is damaged: {error}") from None


def _pipeline(folder: Path) -> FillModel:
    """aMUSEd's: its text encoder reads the prompt."""
    from diffusers import AmusedScheduler
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    model = _model(folder / "transformer")
    scheduler = AmusedScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    reader: Any = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    encoder: Any = CLIPTextModelWithProjection.from_pretrained(
        folder / "text_encoder", local_files_only=True
    ).eval()
    vqvae = json.loads((folder / "vqvae" / "config.json").read_text(encoding="utf-8"))

    def condition(text: str) -> tuple[Tensor, Tensor]:
        ids = reader(
            [text],
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=reader.model_max_length,
        ).input_ids
        found = encoder(ids, return_dict=True, output_hidden_states=True)
        return found.hidden_states[-2], found.text_embeds

    factor = 2 ** (len(vqvae["block_out_channels"]) - 1)
    return FillModel(model, scheduler, condition, Notes(), factor)
