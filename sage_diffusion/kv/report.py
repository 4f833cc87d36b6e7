"""What a compressed past takes, measured: bytes by what they hold, and bits of an element."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sage_diffusion.kv.layer import Layer

_CONTEXTS = (4096, 32768)


@dataclass(frozen=True)
class Report:
    """Of all compressed layers of a cache.

    Attributes:
        preset: its name, or the method.
        tokens: that are held.
        compressed, exact: tokens in the bodies of all layers, and in sinks and windows.
        layers: how many are compressed.
        left: type of the layers that are left alone -> how many.
        nbytes: allocated now.
        exact_bytes: what an exact cache of the same layers would take.
        peak_bytes: most that was allocated at once, the shared scratch included.
        bits: all-in, of an element of K or V: everything that is stored.
        body_bits: of an element of the bodies, constants such as bases left out.
        bits_at: context -> all-in bits there, extrapolated; empty before anything is compressed.
        parts: bytes by what they hold.
        heavy, kept_exact: tokens of all layers that are kept at 8 bits, and those that no code
            could stand for.
    """

    preset: str
    tokens: int
    compressed: int
    exact: int
    layers: int
    left: Mapping[str, int]
    nbytes: int
    exact_bytes: int
    peak_bytes: int
    bits: float
    body_bits: float | None
    bits_at: Mapping[int, float]
    parts: Mapping[str, int]
    heavy: int
    kept_exact: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "bits_at": {str(n): x for n, x in self.bits_at.items()}}

    def __str__(self) -> str:
        mib = 2**20
        lines = [
            f"{self.preset}: {self.layers} layers compressed"
            + "".join(f", {count} of {kind} left alone" for kind, count in self.left.items()),
            f"{self.tokens} tokens: {self.nbytes / mib:.1f} MiB, exact "
            f"{self.exact_bytes / mib:.1f} MiB; at most {self.peak_bytes / mib:.1f} MiB at once",
            f"{self.bits:.2f} bits an element all-in"
            + ("" if self.body_bits is None else f", {self.body_bits:.2f} in the body")
            + "".join(f", {bits:.2f} at {n} tokens" for n, bits in self.bits_at.items()),
            *(f"  {name:<12} {size / mib:9.3f} MiB" for name, size in self.parts.items()),
        ]
        if self.heavy or self.kept_exact:
            lines.append(f"{self.heavy} tokens kept at 8 bits, {self.kept_exact} kept exact")
        return "\n".join(lines)


def elements(layer: Layer, tokens: int) -> int:
    """Numbers that ``tokens`` tokens of K and V are."""
    place = layer.filled().place
    return layer.batch * tokens * place.heads * (place.head_dim + place.value_dim)


def exact_bytes(layer: Layer, tokens: int) -> int:
    """Bytes of these as they come."""
    return elements(layer, tokens) * layer.filled().place.dtype.itemsize


def body_bytes(layer: Layer) -> int:
    """Bytes of a body that grow with its tokens, better copies included."""
    body = layer.filled()
    grown = sum(size for name, size in body.parts().items() if name not in body.constants)
    return grown + sum(s.used for kept in layer.kept() for s in kept.stores.values())


def constant_bytes(layer: Layer) -> int:
    """Bytes of a body that do not: bases and the like."""
    return sum(x.numel() * x.element_size() for x in layer.filled().constants.values())


def bytes_at(layer: Layer, tokens: int) -> float:
    """Bytes if ``tokens`` were held, from what the body takes now.

    Raises:
        ValueError: some would be compressed and nothing is yet.
    """
    over = _leaving(layer, tokens)
    constant = constant_bytes(layer)
    if not over:
        return constant + exact_bytes(layer, tokens)
    if not layer.compressed:
        raise ValueError(
            f"bits at {tokens} tokens follow from what is compressed, and nothing is yet: "
            f"layer {layer.number} holds {layer.tokens} tokens"
        )
    rate = body_bytes(layer) / layer.compressed
    return constant + rate * over + exact_bytes(layer, tokens - over)


def check_constants(layers: Sequence[Layer], tokens: int) -> None:
    """Whether constants such as bases pay at this length; some layers store for others, too.

    Raises:
        ValueError: they take at least as much as compression saves.
    """
    layers = [layer for layer in layers if layer.compressed]
    constant, saved = sum(map(constant_bytes, layers)), 0.0
    for layer in layers:
        over = _leaving(layer, tokens)
        saved += exact_bytes(layer, over) - body_bytes(layer) / layer.compressed * over
    if constant and constant >= saved:
        raise ValueError(
            f"bases must save more than they take at {tokens} tokens: those of {len(layers)} "
            f"layers take {constant} bytes, compression saves {max(round(saved), 0)}"
        )


def _leaving(layer: Layer, tokens: int) -> int:
    """Tokens that would be compressed."""
    unit = layer.filled().unit
    return max(tokens - layer.sink - layer.window, 0) // unit * unit


def bits(layers: Sequence[Layer], tokens: int) -> float:
    """All-in bits of an element if ``tokens`` were held, from what the bodies take now.

    Raises:
        ValueError: some would be compressed and nothing is yet, or there would be no tokens.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    return 8 * sum(bytes_at(x, tokens) for x in layers) / sum(elements(x, tokens) for x in layers)


def measure(
    preset: str, layers: Sequence[Layer], left: Mapping[str, int], peak_bytes: int
) -> Report:
    """Look at layers that hold something.

    Raises:
        ValueError: there are no tokens.
    """
    if not layers or not layers[0].tokens:
        raise ValueError("a cache must hold tokens to be reported on")
    parts: Counter[str] = Counter()
    for layer in layers:
        parts.update(layer.parts())
    stored = sum(elements(x, x.tokens) for x in layers)
    compressed = sum(x.compressed for x in layers)
    body = sum(elements(x, x.compressed) for x in layers)
    return Report(
        preset=preset,
        tokens=layers[0].tokens,
        compressed=compressed,
        exact=sum(x.tokens for x in layers) - compressed,
        layers=len(layers),
        left=dict(left),
        nbytes=sum(x.nbytes for x in layers),
        exact_bytes=sum(exact_bytes(x, x.tokens) for x in layers),
        peak_bytes=peak_bytes,
        bits=8 * parts.total() / stored,
        body_bits=8 * sum(body_bytes(x) for x in layers) / body if body else None,
        bits_at={n: bits(layers, n) for n in _CONTEXTS} if body else {},
        parts=dict(sorted(parts.items())),
        heavy=sum(x.heavy for x in layers),
        kept_exact=sum(x.kept_exact for x in layers),
    )
