"""TransMLA (Meng et al., 2502.07864): grouped-query attention as one latent for all heads.

K of all heads is one vector of ``d = H D`` channels.  A unitary mix of the heads' channels of one
frequency commutes with RoPE (RoRoPE), so it costs nothing, and gathers what the heads share in few
components.  Those of most weight keep RoPE; of the others it is dropped, and they are joined with
V, balanced, and projected to their first principal components (BKV-PCA).  A token keeps the latent
and the rotated components, once for all heads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.kv import tensor_files

FORMAT = "sage-diffusion-transmla-1"


class ConversionError(ValueError):
    """A model can't be converted, or a file is no conversion of it."""


@dataclass(frozen=True)
class Sizes:
    """What a token keeps in a layer.

    Attributes:
        rank: of the latent.
        rope: channels that keep RoPE, an even number.
    """

    rank: int
    rope: int

    def check(self, width: int) -> None:
        """Raise ConversionError unless they fit K and V of ``width`` channels each."""
        if self.rope % 2 or not 0 <= self.rope <= width:
            raise ConversionError(
                f"rope must be an even number of channels, 0 to {width}, got {self.rope}"
            )
        if not 1 <= self.rank <= 2 * width - self.rope:
            raise ConversionError(
                f"rank must be from 1 to {2 * width - self.rope}, all that has no RoPE, "
                f"got {self.rank}"
            )


@dataclass(frozen=True)
class LayerGram:
    """Second moments of a layer on calibration text.

    Attributes:
        kv: ``[2 d, 2 d]`` float64, of K before RoPE and V.
        q: ``[H, D]`` float64, of the query heads of each KV head, summed, before RoPE.
    """

    kv: Tensor
    q: Tensor


@dataclass(frozen=True)
class LayerMaps:
    """Linear maps that make a layer's attention one of a single latent.

    Attributes:
        down: ``[rank + rope, 2 d]``, from K before RoPE and V to what is kept.
        q_up: ``[H, rank + rope, D]``, from a query head to the channels of what is kept.
        v_up: ``[H, D, rank]``, from attention's mean of latents to a head's output.
        frequencies: ``[rope / 2]`` int64; channel n and ``rope / 2 + n`` of those with RoPE are
            a pair that turns by this one of the model's frequencies.
    """

    down: Tensor
    q_up: Tensor
    v_up: Tensor
    frequencies: Tensor


def maps(gram: LayerGram, sizes: Sizes, angles: Tensor, length: int, *, balance: bool = True,
         by_weight: bool = True) -> LayerMaps:  # fmt: skip
    """The maps of a layer.

    Args:
        angles: ``[D / 2]``, radians a token of each frequency; channel i turns with i + D / 2.
        length: tokens of a text, for how far a frequency turns.
        balance: K without RoPE and V have the same energy before they are projected jointly.
        by_weight: components keep RoPE in the order of what the scores lose without it; False: in
            the order of their number in each frequency, all frequencies alike, as the paper does.

    Raises:
        ConversionError: the sizes don't fit.
    """
    heads, dim = gram.q.shape
    width = heads * dim
    sizes.check(width)
    turned, order = _components(gram, angles, length, by_weight)
    kept = sizes.rope // 2
    rotated, plain = order[:kept], order[kept:].sort().values
    rows = torch.cat([turned[:, rotated].flatten(0, 1), turned[:, plain].flatten(0, 1)])
    with_rope, without = rows.split([sizes.rope, width - sizes.rope])  # of K's channels
    both = torch.block_diag(without, torch.eye(width, dtype=rows.dtype))
    second = both @ gram.kv @ both.T
    ratio = 1.0
    cut = len(without)
    if balance and cut:
        energies = second.diagonal()
        ratio = float((energies[:cut].sum() / energies[cut:].sum().clamp(min=1e-300)).sqrt())
    scale = torch.ones(len(second), dtype=rows.dtype)
    scale[:cut] /= max(ratio, 1e-12)
    _, vectors = torch.linalg.eigh(scale[:, None] * second * scale)
    basis = vectors.flip(1)[:, : sizes.rank]  # [2 d - rope, rank]
    down = (basis.T * scale) @ both
    rope_down = torch.cat([with_rope, torch.zeros_like(with_rope)], 1)
    back = basis / scale[:, None]
    content = (back[:cut].T @ without).unflatten(1, (heads, dim)).transpose(0, 1)
    position = with_rope.unflatten(1, (heads, dim)).transpose(0, 1)
    return LayerMaps(
        torch.cat([down, rope_down]).float(),
        torch.cat([content, position], 1).float(),
        back[cut:].unflatten(0, (heads, dim)).float(),
        rotated // heads,
    )


def _components(
    gram: LayerGram, angles: Tensor, length: int, by_weight: bool
) -> tuple[Tensor, Tensor]:
    """Components of K that turn as one, and their order.

    Returns:
        ``[2, d / 2, d]``: the two rows (real and imaginary part) of component ``i H + j``, number
        j of frequency i; and the components from the one that needs RoPE most, int64.
    """
    heads, dim = gram.q.shape
    half = dim // 2
    blocks = gram.kv[: heads * dim, : heads * dim].view(heads, 2, half, heads, 2, half)
    pairs = torch.einsum("aribsi->irasb", blocks)  # [half, 2, H, 2, H]
    real = pairs[:, 0, :, 0] + pairs[:, 1, :, 1]
    imaginary = pairs[:, 1, :, 0] - pairs[:, 0, :, 1]
    energy, vectors = torch.linalg.eigh(torch.complex(real, imaginary))  # E[k k^H] ascending
    energy, vectors = energy.flip(1), vectors.flip(2)
    a, b = vectors.real.mT, vectors.imag.mT  # [half, component, H]
    turned = torch.zeros(2, half, heads, heads, 2, half, dtype=gram.kv.dtype)
    at = torch.arange(half)
    # conj(u) (x + i y) = (a x + b y) + i (a y - b x)
    for part, signs in enumerate(((a, b), (-b, a))):
        for side, sign in enumerate(signs):
            turned[part, at, :, :, side, at] = sign
    if not by_weight:
        return turned.view(2, heads * half, -1), _by_number(half, heads)
    looked = (gram.q[:, :half] + gram.q[:, half:]).T  # [half, H]
    looked = torch.einsum("ijh,ih->ij", vectors.abs().square().mT, looked)
    weight = energy.clamp(min=0) * looked * _turning(angles, length)[:, None]
    return turned.view(2, heads * half, -1), weight.flatten().argsort(descending=True, stable=True)


def _by_number(half: int, heads: int) -> Tensor:
    return torch.arange(half * heads).view(half, heads).T.flatten()


def _turning(angles: Tensor, length: int) -> Tensor:
    """Mean ``|e^(i angle n) - 1|^2`` over distances below ``length``."""
    distances = torch.arange(length, dtype=torch.float64)
    return 2 - 2 * (angles.double()[:, None] * distances).cos().mean(1)


@dataclass(frozen=True, eq=False)
class Conversion:
    """All layers' maps, for the model with this fingerprint.

    Attributes:
        tensors: ``"{layer}.down"``, ``.q_up``, ``.v_up`` and ``.frequencies``.
        about: what it was made of and what it costs, plain data.
    """

    fingerprint: str
    sizes: Sizes
    layers: int
    tensors: dict[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, fingerprint: str, sizes: Sizes, found: list[LayerMaps],
           about: dict[str, Any]) -> Conversion:  # fmt: skip
        """Of a model's layers in order."""
        tensors = {f"{i}.{name}": x for i, one in enumerate(found) for name, x in vars(one).items()}
        return cls(fingerprint, sizes, len(found), tensors, about)

    @property
    def width(self) -> int:
        """Channels of K of all heads."""
        return self.tensors["0.down"].shape[1] // 2

    def maps(self, layer: int) -> LayerMaps:
        """Of one layer."""
        names = ("down", "q_up", "v_up", "frequencies")
        return LayerMaps(*(self.tensors[f"{layer}.{name}"] for name in names))

    def save(self, path: str | Path) -> None:
        """Write as safetensors."""
        about = {
            "fingerprint": self.fingerprint,
            "about": json.dumps(self.about),
            "rank": str(self.sizes.rank),
            "rope": str(self.sizes.rope),
            "layers": str(self.layers),
        }
        tensor_files.save(path, FORMAT, self.tensors, about)

    @classmethod
    def load(cls, path: str | Path) -> Conversion:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: the file can't be read.
            ConversionError: it is no conversion.
        """
        names = ("fingerprint", "about", "rank", "rope", "layers")
        tensors, about = tensor_files.load(path, FORMAT, "conversion", ConversionError, names)
        sizes = Sizes(int(about["rank"]), int(about["rope"]))
        layers, more = int(about["layers"]), json.loads(about["about"])
        return cls(about["fingerprint"], sizes, layers, tensors, more)
