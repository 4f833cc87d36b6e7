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


def bits(layers: Sequence[Layer], tokens: int) -> float:
    """All-in bits of an element if ``tokens`` were held, from what the bodies take now.

    Raises:
        ValueError: some would be compressed and nothing is yet.
    """
    return 8 * sum(x.bytes_at(tokens) for x in layers) / sum(x.elements(tokens) for x in layers)


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
    elements = sum(x.elements(x.tokens) for x in layers)
    compressed = sum(x.compressed for x in layers)
    body = sum(x.elements(x.compressed) for x in layers)
    return Report(
        preset=preset,
        tokens=layers[0].tokens,
        compressed=compressed,
        exact=sum(x.tokens for x in layers) - compressed,
        layers=len(layers),
        left=dict(left),
        nbytes=sum(x.nbytes for x in layers),
        exact_bytes=sum(x.exact_bytes(x.tokens) for x in layers),
        peak_bytes=peak_bytes,
        bits=8 * parts.total() / elements,
        body_bits=8 * sum(x.body_bytes for x in layers) / body if body else None,
        bits_at={n: bits(layers, n) for n in _CONTEXTS} if body else {},
        parts=dict(sorted(parts.items())),
        heavy=sum(x.heavy for x in layers),
        kept_exact=sum(x.kept_exact for x in layers),
    )
