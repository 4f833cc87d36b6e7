"""A tiny random transformer whose attention goes through a session, and its sampling loop."""

import torch
from torch import Tensor

from sage_diffusion.attend.session import AttentionSession


class TinySampler:
    """Two heads of 32, residual layers of random weights, Euler steps from seeded noise."""

    model: str | None = "TinyDiT"

    def __init__(
        self,
        layers: int = 4,
        steps: int = 8,
        tokens: int = 40,
        poison: int | None = None,
        cached: tuple[int, ...] = (),
    ):
        generator = torch.Generator().manual_seed(3)
        self.session = AttentionSession("fp16")
        self.steps, self.tokens = steps, tokens
        self.cached = cached  # steps at which a cache stands in for the whole model
        self.names = [f"blocks.{i}.attn" for i in range(layers)]
        self.weights = [torch.randn(4, 64, 64, generator=generator) / 8 for _ in range(layers)]
        if poison is not None:
            # A few channels of K are huge, vary from token to token and meet small ones of Q, so
            # the scores stay as they were: no smoothing and no rotation saves four bits from that,
            # balance does.
            self.weights[poison][0, :, ::16] /= 30
            self.weights[poison][1, :, ::16] *= 30
        self.runs = 0

    def attach(self) -> None:
        for name in self.names:
            self.session.layer(name)

    def sample(self, prompt: str, seed: int) -> Tensor:
        self.runs += 1
        generator = torch.Generator().manual_seed(seed * 100 + len(prompt))
        x = torch.randn(2, self.tokens, 64, generator=generator)
        self.attach()
        session = self.session
        sigmas = [1 - step / self.steps for step in range(self.steps)]
        session.start(self.steps, sigmas)
        change = torch.zeros_like(x)
        for step, sigma in enumerate(sigmas):
            if step in self.cached:
                x = x - change
                continue
            session.begin_step(step, sigma)
            h = x + step / self.steps
            for name, (wq, wk, wv, wo) in zip(self.names, self.weights, strict=True):
                norm = torch.nn.functional.layer_norm(h, (64,))
                q, k, v = ((norm @ w).unflatten(-1, (2, 32)).transpose(1, 2) for w in (wq, wk, wv))
                h = h + session.layer(name)(q, k, v).transpose(1, 2).flatten(2) @ wo
            change = torch.nn.functional.layer_norm(h, (64,)) / self.steps
            x = x - change
        session.finish()
        return x
