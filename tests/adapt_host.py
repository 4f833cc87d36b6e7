"""A tiny random transformer whose attention goes through a session, and its sampling loop."""

import math

import torch
from torch import Tensor

from sage_diffusion.adapt.costs import card_costs
from sage_diffusion.adapt.sampling import ModelCall
from sage_diffusion.attend.session import AttentionSession

#: Of main loops: calls as tiny as these gain nothing as a whole.
LOOPS = card_costs("rtx4090", math.inf)


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
        self.session.start(self.steps, [self.sigma(step) for step in range(self.steps)])
        change = torch.zeros_like(x)
        for step in range(self.steps):
            if step not in self.cached:
                change = self.network(x, step) / self.steps
            x = x - change
        self.session.finish()
        return x

    def sigma(self, step: int) -> float:
        """Noise before a step."""
        return 1 - step / self.steps

    def network(self, x: Tensor, step: int) -> Tensor:
        """One call of the model, ``[2, tokens, 64]``."""
        self.session.begin_step(step, self.sigma(step))
        h = x + step / self.steps
        for name, (wq, wk, wv, wo) in zip(self.names, self.weights, strict=True):
            norm = torch.nn.functional.layer_norm(h, (64,))
            q, k, v = ((norm @ w).unflatten(-1, (2, 32)).transpose(1, 2) for w in (wq, wk, wv))
            h = h + self.session.layer(name)(q, k, v).transpose(1, 2).flatten(2) @ wo
        return torch.nn.functional.layer_norm(h, (64,))


class TracingSampler(TinySampler):
    """A host with autograd."""

    batch = 1

    def pictures(self, prompt, seed):
        return [(prompt, seed)]

    def trace(self, pictures):
        ((prompt, seed),) = pictures
        self.weights = [w.requires_grad_() for w in self.weights]
        return self.sample(prompt, seed)


class ReplayingSampler(TinySampler):
    """A host that makes calls of its network anew."""

    def pictures(self, prompt, seed):
        return [(prompt, seed)]

    def replay(self, picture, use):
        calls, network = [], TinySampler.network

        def broken(x, step):
            with torch.no_grad():
                out = network(self, x, step).requires_grad_()
            calls.append(ModelCall(x, out, lambda x: network(self, x, step)))
            return out

        self.network = broken
        self.session.finish, finish = lambda: None, self.session.finish
        try:
            use(self.sample(*picture), calls)
        finally:
            del self.network, self.session.finish
            finish()
