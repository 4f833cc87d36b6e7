"""What compression does to a model's predictions, and what it takes, all in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from sage_diffusion.kv.layer import Layer

#: Parts that are constants of a model, shared by all sequences.
CONSTANTS = ("basis", "scales", "mean")


@dataclass(frozen=True)
class Agreement:
    """How near predictions are to those with an exact past.

    Attributes:
        kl: mean ``KL(exact || x)`` of a token, nats.
        p99: 99th percentile of it.
        top1: share of the tokens whose most probable next token is the same.
        perplexity, exact_perplexity: of the text that follows.
    """

    kl: float
    p99: float
    top1: float
    perplexity: float
    exact_perplexity: float


def agreement(logits: Tensor, exact: Tensor, following: Tensor) -> Agreement:
    """Compare ``[n, vocabulary]`` logits; ``following [n]`` are the tokens that come next."""
    logs, want = logits.float().log_softmax(-1), exact.float().log_softmax(-1)
    kl = (want.exp() * (want - logs)).sum(-1)
    same = logs.argmax(-1) == want.argmax(-1)
    perplexity, exact_perplexity = (
        float(x.gather(1, following[:, None]).mean().neg().exp()) for x in (logs, want)
    )
    return Agreement(
        float(kl.mean()),
        float(kl.quantile(0.99)),
        float(same.float().mean()),
        perplexity,
        exact_perplexity,
    )


@dataclass(frozen=True)
class Bits:
    """Bits for each number of K and V.

    Attributes:
        body: of the compressed tokens, with all steps, zeros, indices and copies.
        constant: bytes of all layers that do not grow with the tokens.
        exact: tokens of sink and window, and the bits of their numbers.
        width: numbers of a token, over all layers and both sides.
    """

    body: float
    constant: int
    exact: tuple[int, int]
    width: int

    def all_in(self, tokens: int) -> float:
        """Of one sequence of so many tokens."""
        exact, bits = self.exact
        share = min(exact, tokens) / tokens
        return self.body * (1 - share) + bits * share + 8 * self.constant / (self.width * tokens)


def bits(layers: list[Layer], exact_bits: int = 16) -> Bits:
    """Count what layers have stored; ``exact_bits`` are those of the model's own dtype in use."""
    parts: Counter[str] = Counter()
    for layer in layers:
        parts.update(layer.parts())
    for name in ("sink", "window"):
        parts.pop(name, None)
    constant = sum(parts.pop(name) for name in list(parts) if name.split(".")[-1] in CONSTANTS)
    place = layers[0].body.place if layers[0].body is not None else None
    if place is None:
        raise ValueError("layers must hold tokens for their bits to be counted")
    numbers = place.heads * (place.head_dim + place.value_dim)
    body = 8 * sum(parts.values()) / (numbers * sum(layer.compressed for layer in layers))
    exact = layers[0].sink + layers[0].window
    return Bits(body, constant, (exact, exact_bits), len(layers) * numbers)


def needle_prompt(haystack: Tensor, needle: Tensor, depth: float) -> Tensor:
    """Token ids ``[n]`` with a needle at a share of the haystack's length."""
    at = int(depth * haystack.numel())
    return torch.cat([haystack[:at], needle, haystack[at:]])
