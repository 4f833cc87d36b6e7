"""Judge compressed pasts of a language model: one exact prefill, then one short pass for each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sage_diffusion.files import write_bytes
from sage_diffusion.integrations.transformers.cache import KVCache, argument
from sage_diffusion.integrations.transformers.rope import text_config
from sage_diffusion.integrations.transformers.tap import Tap
from sage_diffusion.kv.calibration import Calibration, fingerprint
from sage_diffusion.kv.evaluate import Agreement, Bits, agreement, bits, needle_prompt
from sage_diffusion.kv.method import Method

#: Newest queries of the prefix, which choose heavy hitters.
_QUERIES = 64

#: What is hidden in the haystack, and asked for.
NEEDLE = "\nThe secret number of the lighthouse is 48213.\n"
QUESTION = "\nThe secret number of the lighthouse is"
ANSWER = " 48213"


@dataclass(frozen=True)
class Passage:
    """A text whose past is known exactly.

    Attributes:
        ids: ``[n]`` int64, the prefix and what is scored.
        k, v: ``[L, H, T, D]`` of the prefix of T tokens, K after RoPE.
        q: ``[L, Hq, 64, D]``, its newest queries.
        logits: ``[n - T, vocabulary]``, with the exact past.
    """

    ids: Tensor
    k: Tensor
    v: Tensor
    q: Tensor
    logits: Tensor

    @property
    def prefix(self) -> int:
        """T."""
        return self.k.shape[2]


@torch.no_grad()
def passage(model: nn.Module, ids: Tensor, prefix: int, folder: Path | None = None) -> Passage:
    """Prefill ``ids [n]``'s first tokens exactly and predict after the others.

    Args:
        folder: where passages are kept, so that the next call reads them.
    """
    path = None
    if folder is not None:
        path = folder / f"{fingerprint(model)}-{prefix}-{_digest(ids)}.safetensors"
        if path.exists():
            return _read(path, ids)
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def seen(number: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found[number] = q[0, :, -_QUERIES:], k[0], v[0]
        return k, v

    config = text_config(model)
    cache = DynamicCache(config=config)
    named = {argument(model): cache}
    with Tap(seen, config.num_key_value_heads):
        model(ids[None, :prefix], logits_to_keep=1, **named)
    q, k, v = (torch.stack([found[i][side] for i in sorted(found)]) for side in range(3))
    logits = model(ids[None, prefix:], **named).logits[0]
    made = Passage(ids, k, v, q, logits)
    if path is not None:
        from safetensors.torch import save

        write_bytes(path, save({name: getattr(made, name).contiguous() for name in _NAMES}))
    return made


_NAMES = ("k", "v", "q", "logits")


def _digest(ids: Tensor) -> str:
    import hashlib

    return hashlib.sha256(str(ids.tolist()).encode()).hexdigest()[:12]


def _read(path: Path, ids: Tensor) -> Passage:
    from safetensors.torch import load_file

    return Passage(ids, **load_file(path))


@dataclass(frozen=True)
class Verdict:
    """One method on one passage.

    Attributes:
        agreement, bits: what it does and takes.
        bytes: allocated by the compressed layers after the prefill, the exact tokens included.
        seconds: of CPU time, for compressing, and for scoring by attending to the packed past.
    """

    agreement: Agreement
    bits: Bits
    bytes: int
    seconds: tuple[float, float]


@torch.no_grad()
def judge(
    model: nn.Module,
    text: Passage,
    method: Method,
    calibration: Calibration | None = None,
    *,
    sink: int = 32,
    window: int = 128,
    scored: int = 256,
) -> Verdict:
    """Compress a passage's prefix and score the tokens after it, whose own K and V are exact."""
    began = time.process_time()
    cache = compressed(model, text, method, calibration, sink=sink, window=window)
    done = time.process_time()
    logits = _continue(model, cache, text.ids[text.prefix :][:scored])
    ended = time.process_time()
    following = text.ids[text.prefix + 1 :][:scored]
    count = following.numel()
    return Verdict(
        agreement(logits[:count], text.logits[:count], following),
        bits(list(cache.pasts.values())),
        cache.nbytes,
        (done - began, ended - done),
    )


@torch.no_grad()
def compressed(
    model: nn.Module,
    text: Passage,
    method: Method,
    calibration: Calibration | None = None,
    *,
    sink: int = 32,
    window: int = 128,
) -> KVCache:
    """A cache that holds a passage's prefix, compressed all but its first and last tokens."""
    cache = KVCache.for_model(model, method, calibration, sink=sink, window=window)
    for i, past in cache.pasts.items():
        past.append(text.k[i][None], text.v[i][None])
        q = text.q[i][None]
        rows, tokens = q.shape[2], text.prefix
        mask = torch.ones(1, 1, rows, tokens, dtype=torch.bool).tril(tokens - rows)
        past.observe(q, q.shape[-1] ** -0.5, mask)
        past.settle()
    return cache


def _continue(model: nn.Module, cache: KVCache, ids: Tensor) -> Tensor:
    """Logits ``[n, vocabulary]`` of tokens after what a cache holds."""
    return model(ids[None], **{argument(model): cache}).logits[0]


def needles(
    model: nn.Module,
    tokenizer: Any,
    haystack: Tensor,
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7),
    folder: Path | None = None,
) -> list[Passage]:
    """Passages with a number hidden in ``haystack [n]``; what is scored asks for it.

    Depths at which the model does not find the number with an exact past are left out.
    """
    needle, question, answer = (
        tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        for text in (NEEDLE, QUESTION, ANSWER)
    )
    found = []
    for depth in depths:
        prefix = needle_prompt(haystack, needle, depth)
        text = passage(model, torch.cat([prefix, question, answer]), prefix.numel(), folder)
        if _recalled(text.logits, answer):
            found.append(text)
    return found


@torch.no_grad()
def recall(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Passage],
    method: Method,
    calibration: Calibration | None = None,
) -> float:
    """Share of the needles whose every token is the most probable one."""
    answer = tokenizer(ANSWER, return_tensors="pt", add_special_tokens=False).input_ids[0]
    hits = 0
    for text in texts:
        cache = compressed(model, text, method, calibration)
        logits = _continue(model, cache, text.ids[text.prefix :])
        hits += _recalled(logits, answer)
    return hits / len(texts) if texts else float("nan")


def _recalled(logits: Tensor, answer: Tensor) -> bool:
    """``logits`` of question and answer; the answer's tokens are predicted one before them."""
    said = logits[-answer.numel() - 1 : -1].argmax(-1)
    return bool((said == answer).all())
