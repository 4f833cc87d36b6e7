"""From what one layer's attention was given on calibration text to what a calibration holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sage_diffusion.kv.bases import Basis, eigenbasis
from sage_diffusion.kv.calibration import Calibration, fingerprint, rounded, table

#: Points of the curve of attention mass, beyond that of no tokens.
POINTS = 100

#: Newest queries of a text that show which older tokens matter.
QUERIES = 64

#: Share of heavy hitters for which their distribution over layers and heads is measured.
HEAVY = 0.02


@dataclass
class LayerMoments:
    """Of one layer; sums in float64, K of all texts in float16.

    Attributes:
        k: of each text ``[n, d]``, before RoPE (after it, where the host knows no RoPE).
        gradient: sum of ``g g'`` ``[d, d]``, g of K likewise; None where there is no backward pass.
        attended: of each text ``[H, m]``, squared probabilities of the newest queries.
        received: of each text ``[m]``, probability that all later queries give to each older token.
        post: K and V after RoPE: counts, sums and second moments per head.
    """

    k: list[Tensor] = field(default_factory=list)
    gradient: Tensor | None = None
    gradients: int = 0
    attended: list[Tensor] = field(default_factory=list)
    received: list[Tensor] = field(default_factory=list)
    count: int = 0
    sums: Tensor | None = None  # [2, H, D]
    squares: Tensor | None = None  # [2, H, D, D]

    def add(self, q: Tensor, k: Tensor, v: Tensor, flat: Tensor, sink: int, gap: int) -> None:
        """One text of T tokens.

        Args:
            q: ``[1, Hq, n, D]``, its newest queries.
            k, v: ``[1, H, T, D]``, K after RoPE.
            flat: ``[T, H D]`` on the CPU, K before RoPE.
            sink: first tokens, which count nowhere.
            gap: last tokens, which are exact when the newest queries look at older ones.
        """
        self.k.append(flat[sink:].half())
        self.add_sides(k[0, :, sink:].cpu(), v[0, :, sink:].cpu())
        chances = _chances(q, k)[..., sink : k.shape[2] - gap]  # [H, G * n, m]
        self.attended.append(chances.square().sum(1).cpu())
        self.received.append(chances.sum((0, 1)).cpu())

    def add_gradient(self, g: Tensor) -> None:
        """``g [n, d]``."""
        g = g.double()
        found = g.T @ g
        self.gradient = found if self.gradient is None else self.gradient + found
        self.gradients += g.shape[0]

    def add_sides(self, k: Tensor, v: Tensor) -> None:
        """K after RoPE and V, ``[H, n, D]`` each of the same D."""
        both = torch.stack([k, v]).double()
        sums, squares = both.sum(2), both.transpose(2, 3) @ both
        self.count += k.shape[1]
        self.sums = sums if self.sums is None else self.sums + sums
        self.squares = squares if self.squares is None else self.squares + squares

    def tensors(self, heads: int) -> dict[str, Tensor]:
        """This layer's part of :attr:`Calibration.tensors`, but for the heavy hitters' shares."""
        k = [one.float() for one in self.k]
        joined = torch.cat(k).double()
        mean = joined.mean(0)
        covariance = (joined - mean).T @ (joined - mean) / len(joined)
        metric = None if self.gradient is None else self.gradient / self.gradients
        found = {"k.mean": mean.half()}
        for name, count in (("joint", 1), ("head", heads)):
            found |= {
                f"{name}.{key}": x
                for key, x in _basis(
                    eigenbasis(found["k.mean"].float(), covariance, metric, count), k, count
                ).items()
            }
        return found | self._post() | {"mass": self._mass()}

    def _post(self) -> dict[str, Tensor]:
        assert self.sums is not None and self.squares is not None
        mean = self.sums / self.count
        covariance = self.squares / self.count - mean[..., None] * mean[..., None, :]
        energy, vectors = torch.linalg.eigh(covariance)
        return {
            "post.mean": mean.half(),
            "post.basis": vectors.flip(-1).half(),
            "post.energy": energy.flip(-1).clamp(min=0).float(),
        }

    def _mass(self) -> Tensor:
        curves = []
        for received in self.received:
            ordered = received.double().sort(descending=True).values.cumsum(0)
            ordered = torch.cat([ordered.new_zeros(1), ordered]) / ordered[-1]
            at = torch.linspace(0, len(ordered) - 1, POINTS + 1).round().long()
            curves.append(ordered[at])
        return torch.stack(curves).mean(0).float()


def _basis(basis: Basis, k: list[Tensor], heads: int) -> dict[str, Tensor]:
    codes, scale = rounded(basis, heads)
    rows = codes.float() if heads == 1 else torch.block_diag(*codes.float())
    into = torch.linalg.inv(rows * scale.float()[:, None])
    return {
        "back": codes,
        "scale": scale,
        "weights": basis.weights,
        "table": table([(one - basis.mean) @ into for one in k]),
    }


def _chances(q: Tensor, k: Tensor) -> Tensor:
    """Probabilities ``[H, G * n, T]`` that the last n queries give to all tokens."""
    groups, rows, tokens = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    grouped = q[0].unflatten(0, (-1, groups)).float()  # [H, G, n, D]
    scores = grouped @ k[0, :, None].float().transpose(2, 3) * q.shape[-1] ** -0.5
    seen = torch.ones(rows, tokens, dtype=torch.bool, device=q.device).tril(tokens - rows)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).flatten(1, 2)


def calibration_of(
    model: nn.Module, moments: Mapping[int, LayerMoments], heads: int, about: dict[str, Any]
) -> Calibration:
    """What the moments of a model's layers, by their numbers, amount to."""
    parts = [one.tensors(heads) for one in moments.values()]
    tensors = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    tensors["heavy"] = heavy_shares([one.attended for one in moments.values()])
    return Calibration(fingerprint(model), tuple(moments), tensors, about)


def heavy_shares(attended: list[list[Tensor]], share: float = HEAVY) -> Tensor:
    """Shares of layers and heads in all heavy hitters ``[L, H]``, of mean 1.

    Args:
        attended: of each layer and text ``[H, m]``.
        share: of the tokens of a text, over all layers and heads, that are heavy hitters.
    """
    total = torch.zeros(len(attended), attended[0][0].shape[0], dtype=torch.float64)
    for text in range(len(attended[0])):
        found = torch.stack([layer[text] for layer in attended])  # [L, H, m]
        level = found.flatten().topk(max(1, int(share * found.numel()))).values[-1]
        total += (found >= level).double().mean(2)
    return (total / total.mean()).float()
