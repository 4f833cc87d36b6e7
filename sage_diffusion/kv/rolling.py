"""A past that can forget its oldest tokens: a body of another method for each span of tokens."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sage_diffusion.kv import parts as _parts
from sage_diffusion.kv.method import Body, Method, Place, Rotate
from sage_diffusion.kv.parts import Part


@dataclass(frozen=True)
class Rolling(Method):
    """Compresses span by span, so that whole spans can be dropped.

    Attributes:
        method: compresses a span.
        span: its tokens; rounded up to whole units of the method.

    Raises:
        ValueError: the method compresses K before RoPE: it counts its tokens to know their places;
            or it keeps what queries attend to most, and spans are not told of queries.
    """

    method: Method
    span: int = 1024

    def __post_init__(self) -> None:
        if self.span < 1:
            raise ValueError(f"span must be at least 1 token, got {self.span}")
        if self.method.pre_rope:
            raise ValueError(
                f"{type(self.method).__name__} compresses K before RoPE and can't drop its oldest "
                "tokens; choose a method that compresses K after RoPE"
            )
        if self.method.heavy:
            raise ValueError(
                f"{type(self.method).__name__} keeps the tokens that queries attend to most, and a "
                "past that drops its oldest tokens sees no queries; choose a method without"
            )

    def body(self, place: Place) -> RollingBody:
        return RollingBody(self, place)


class RollingBody(Body):
    """Spans from the oldest to the newest; only the newest may be partly filled."""

    place: Place

    def __init__(self, method: Rolling, place: Place):
        super().__init__(place)
        first = method.method.body(place)
        self.unit = first.unit
        self._method = method.method
        self._span = -(-method.span // self.unit) * self.unit
        self._bodies: deque[Body] = deque([first])

    def append(self, k: Tensor, v: Tensor) -> None:
        while k.shape[2]:
            if self._bodies[-1].tokens == self._span:
                self._bodies.append(self._method.body(self.place))
            free = self._span - self._bodies[-1].tokens
            self._bodies[-1].append(k[:, :, :free], v[:, :, :free])
            self.tokens += min(free, k.shape[2])
            k, v = k[:, :, free:], v[:, :, free:]

    def drop(self) -> int:
        """Forget the oldest span; how many tokens it held."""
        tokens = self._bodies.popleft().tokens
        if not self._bodies:
            self._bodies.append(self._method.body(self.place))
        self.tokens -= tokens
        return tokens

    def _within(self, start: int, stop: int) -> list[tuple[Body, int, int]]:
        """Bodies that hold tokens of a range, with the range in each's own count."""
        found, offset = [], 0
        for body in self._bodies:
            first, last = max(start - offset, 0), min(stop - offset, body.tokens)
            if first < last:
                found.append((body, first, last))
            offset += body.tokens
        return found

    def read(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        within = self._within(start, self.tokens if stop is None else stop)
        found = [body.read(first, last) for body, first, last in within]
        if len(found) == 1:
            return found[0]
        if not found:
            return self._bodies[-1].read(0, 0)
        return torch.cat([k for k, _ in found], 2), torch.cat([v for _, v in found], 2)

    def attend(
        self, q: Tensor, scale: float, mask: Tensor | None = None, rotate: Rotate | None = None
    ) -> Part:
        assert rotate is None  # a method that wants K before RoPE was refused
        found, start = [], 0
        for body in self._bodies:
            stop = start + body.tokens
            if body.tokens:
                found.append(body.attend(q, scale, _parts.columns(mask, start, stop)))
            start = stop
        return _parts.merge(found)

    def crop(self, tokens: int) -> None:
        over = self.tokens - tokens
        while over > 0:
            last = self._bodies[-1]
            if over >= last.tokens and len(self._bodies) > 1:
                over -= last.tokens
                self._bodies.pop()
            else:
                last.crop(last.tokens - over)
                over = 0
        self.tokens = tokens

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        for body in self._bodies:
            body.map(function)

    def to(self, device: torch.device | str) -> None:
        for body in self._bodies:
            body.to(device)

    def park(self, device: torch.device | str, level: int) -> None:
        for body in self._bodies:
            body.park(device, level)

    def unpark(self, device: torch.device | str) -> None:
        for body in self._bodies:
            body.unpark(device)

    def parts(self) -> Counter[str]:
        return sum((body.parts() for body in self._bodies), Counter())

    @property
    def nbytes(self) -> int:
        return sum(body.nbytes for body in self._bodies)
