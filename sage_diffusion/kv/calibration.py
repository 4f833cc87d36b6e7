"""What a model's K and V are like, measured once on some text: bases, tables, shares, ratios."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sage_diffusion.kv import tensor_files
from sage_diffusion.kv.allocation import allocate
from sage_diffusion.kv.bases import Basis
from sage_diffusion.kv.coefficients import WIDTHS, dequantize, quantize, side_bits

FORMAT = "sage-diffusion-kv-calibration-1"

#: A basis of all heads' channels together, or one of each head.
Joint = Literal["joint", "head"]

#: Tokens of a group of one direction, for which the table of distortions is measured.
GROUP = 128


class CalibrationError(ValueError):
    """A file is no calibration, or one of another model."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Measured on calibration text; constants of the model.

    L layers that can be compressed, H KV heads of D channels, d = H D, W widths.

    Attributes:
        fingerprint: of the model's weights.
        layers: their numbers in the model.
        tensors: ``k.mean [L, d]`` and of both bases (``joint.``, ``head.``) ``back`` int8
            (``[L, d, d]`` or ``[L, H, D, D]``), ``scale [L, d]`` of its rows, ``weights [L, d]``,
            ``table [L, d, W]``: the squared error that each width leaves of a coefficient;
            ``heavy [L, H]``: shares of the heavy hitters, of mean 1; ``mass [L, 101]``: attention
            that the best 0, 1, .. 100 % of the older tokens receive; and per head after RoPE
            ``post.mean [L, 2, H, D]``, ``post.basis [L, 2, H, D, D]``, ``post.energy [L, 2, H, D]``
            of K and V; where MatryoshkaKV's rotations were trained ``post.losses
            [L, 2, H, D + 1]``, nats of a token that the first 0 .. D coordinates of a head cost.
        about: what it was made of, plain data.
    """

    fingerprint: str
    layers: tuple[int, ...]
    tensors: dict[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)
    _derived: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` finds in the tensors, at the first call with ``key`` and for good."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def row(self, layer: int) -> int:
        """Where a layer of the model stands in the tensors.

        Raises:
            CalibrationError: it was not calibrated.
        """
        if layer not in self.layers:
            raise CalibrationError(
                f"the calibration must cover layer {layer}, it has {self.layers}"
            )
        return self.layers.index(layer)

    def check(self, fingerprint: str) -> None:
        """Raise CalibrationError unless it is of the model with this fingerprint."""
        if fingerprint != self.fingerprint:
            raise CalibrationError(
                f"the calibration must be of this model ({fingerprint}), got one of "
                f"{self.about.get('model', 'another')} ({self.fingerprint})"
            )

    def back(self, layer: int, basis: Joint) -> tuple[Tensor, Tensor, Tensor]:
        """INT8 rows, their scales, and the mean: what decoding needs.

        Returns:
            ``[d, d]`` or ``[H, D, D]`` int8, ``[d]`` float16, ``[d]`` float16.
        """
        row = self.row(layer)
        found = (f"{basis}.back", f"{basis}.scale", "k.mean")
        back, scale, mean = (self.tensors[name][row] for name in found)
        return back, scale, mean

    def widths(self, bits: float, basis: Joint) -> Tensor:
        """Widths of all directions of all layers ``[L, d]`` int64 for a mean number of bits.

        Reverse water-filling over all layers at once, with the measured table of the quantizer;
        a direction's bits include its steps and zeros.
        """
        return self.once(("widths", float(bits), basis), lambda: self._dealt_out(bits, basis))

    def _dealt_out(self, bits: float, basis: Joint) -> Tensor:
        losses = self._losses(basis)
        costs = torch.tensor([b + (side_bits(GROUP) if b else 0.0) for b in WIDTHS])
        chosen = allocate(losses, costs, bits * losses.shape[0])
        return torch.tensor(WIDTHS)[chosen].view(self.tensors[f"{basis}.weights"].shape)

    def loss(self, bits: float, basis: Joint) -> float:
        """What the metric predicts for these bits, in arbitrary units: compares bases and bits."""
        chosen = torch.searchsorted(torch.tensor(WIDTHS), self.widths(bits, basis).flatten())
        return float(self._losses(basis).gather(1, chosen[:, None]).sum())

    def _losses(self, basis: Joint) -> Tensor:
        weights, table = self.tensors[f"{basis}.weights"], self.tensors[f"{basis}.table"]
        return (weights[..., None] * table).flatten(0, 1)

    def ratios(self, kept: float) -> Tensor:
        """PrefixKV's share of the tokens that each layer keeps, ``[L]``, of mean ``kept``.

        One level of attention mass that all layers reach (2412.03409, section 3.3).
        """
        return kept_shares(self.tensors["mass"], kept)

    def save(self, path: str | Path) -> None:
        """Write as safetensors."""
        about = {
            "fingerprint": self.fingerprint,
            "layers": json.dumps(self.layers),
            "about": json.dumps(self.about),
        }
        tensor_files.save(path, FORMAT, self.tensors, about)

    @classmethod
    def load(cls, path: str | Path, fingerprint: str | None = None) -> Calibration:
        """Read what :meth:`save` wrote.

        Args:
            fingerprint: of the model that it must be of.

        Raises:
            OSError: the file can't be read.
            CalibrationError: it is no calibration, or one of another model.
        """
        names = ("fingerprint", "layers", "about")
        tensors, about = tensor_files.load(path, FORMAT, "calibration", CalibrationError, names)
        made = cls(
            about["fingerprint"],
            tuple(json.loads(about["layers"])),
            tensors,
            json.loads(about["about"]),
        )
        if fingerprint is not None:
            made.check(fingerprint)
        return made


def fingerprint(model: nn.Module) -> str:
    """Sixteen hexadecimal digits of a model's weights: names, shapes and a sample as bfloat16."""
    digest = hashlib.sha256()
    for name, x in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(x.shape)}".encode())
        sample = x.detach().flatten()[:256].cpu().to(torch.bfloat16).view(torch.uint8)
        digest.update(bytes(sample.tolist()))
    return digest.hexdigest()[:16]


def kept_shares(mass: Tensor, kept: float) -> Tensor:
    """Shares ``[L]`` of mean ``kept`` at which all layers reach the same mass.

    Args:
        mass: ``[L, n]``, rising from 0 to 1: received by the best 0 .. 100 % of the tokens.
        kept: 0 to 1.
    """
    if not 0 < kept <= 1:
        raise ValueError(f"the kept share must be above 0 and at most 1, got {kept}")
    low, high = 0.0, 1.0
    for _ in range(50):
        level = (low + high) / 2
        shares = _reach(mass, level)
        low, high = (level, high) if float(shares.mean()) < kept else (low, level)
    shares = _reach(mass, high)
    return (shares * (kept / shares.mean())).clamp(max=1.0)


def _reach(mass: Tensor, level: float) -> Tensor:
    """The share at which each curve reaches the level, linear between its points."""
    steps = mass.shape[1] - 1
    index = (mass < level).sum(1).clamp(1, steps)
    below = mass.gather(1, index[:, None] - 1)[:, 0]
    above = mass.gather(1, index[:, None])[:, 0]
    part = ((level - below) / (above - below).clamp(min=1e-12)).clamp(0, 1)
    return (index - 1 + part) / steps


def rounded(basis: Basis, heads: int) -> tuple[Tensor, Tensor]:
    """INT8 rows of ``basis.back`` (``[d, d]``, or ``[H, D, D]``) and their scales ``[d]``."""
    back = basis.back
    scale = (back.abs().amax(1) / 127).clamp(min=2.0**-24).half()
    codes = (back / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    if heads > 1:
        size = back.shape[0] // heads
        codes = torch.stack([codes[i : i + size, i : i + size] for i in range(0, len(codes), size)])
    return codes, scale


def table(z: Sequence[Tensor], group: int = GROUP) -> Tensor:
    """Mean squared error ``[r, W]`` that each of :data:`WIDTHS` leaves of coefficients ``[n, r]``.

    Measured with the store's own quantizer, on whole groups of the sequences given.
    """
    parts = [part for one in z for part in one.split(group) if part.shape[0] == group]
    if not parts:
        raise ValueError(f"calibration texts must have at least {group} tokens")
    stacked = torch.stack(parts)  # [groups, group, r]
    found = [stacked.pow(2).mean((0, 1))]
    for width in WIDTHS[1:]:
        error = dequantize(*quantize(stacked, (1 << width) - 1, 1), 1) - stacked
        found.append(error.square_().mean((0, 1)))
    return torch.stack(found, -1)
