"""The project's own: K in few coefficients that count, V as it is, heavy hitters at 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sage_diffusion.kernels.kv.layout import Width
from sage_diffusion.kernels.kv.quantize import Groups, dequantize, quantize
from sage_diffusion.kv.calibration import GROUP, Calibration, CalibrationError, Joint
from sage_diffusion.kv.codes import pack, unpack
from sage_diffusion.kv.coefficients import (
    BLOCK,
    Coefficients,
    TokenCodes,
)
from sage_diffusion.kv.method import Body, Method, Place
from sage_diffusion.kv.store import Store


@dataclass(frozen=True)
class Calibrated(Method):
    """K before RoPE in the eigenbasis of a calibration, bits by reverse water-filling; V min-max.

    Attributes:
        k_bits: mean of K's directions over all layers, steps and zeros included.
        v_width: of the packed layout; "ternary" is three levels between the extremes.
        v_group: channels of one token that share a step and a zero.
        heavy: share of the older tokens, over layers and heads as the calibration found them, whose
            K and V have 8 bits.
        basis: of all heads' channels jointly, or one of each head.
        unit: tokens that are compressed at once.  Groups of K have 128 tokens, or what of these
            comes at once: a smaller unit has more steps and zeros.
    """

    pre_rope = True

    k_bits: float = 2.0
    v_width: Width = 2
    v_group: int = 64
    heavy: float = 0.0
    basis: Joint = "joint"
    unit: int = GROUP

    def body(self, place: Place) -> CalibratedBody:
        if not isinstance(place.calibration, Calibration):
            raise CalibrationError(
                "the calibrated presets need a calibration of the model: "
                "sage-diffusion kv calibrate, or sage_diffusion.kv.calibrate(model, texts)"
            )
        if self.unit % BLOCK or self.unit < 1:
            raise ValueError(f"unit must be a multiple of {BLOCK} tokens, got {self.unit}")
        if not 0 <= self.heavy < 1:
            raise ValueError(f"heavy must be a share from 0 to below 1, got {self.heavy}")
        return CalibratedBody(place, self)


class CalibratedBody(Body):
    """See :class:`Calibrated`.

    Attributes:
        attended: how much the newest queries attend to the tokens that are appended next,
            ``[B, H, n]``; None: no heavy hitters are chosen.
    """

    def __init__(self, place: Place, method: Calibrated):
        super().__init__(place)
        calibration: Calibration = place.calibration
        row = calibration.row(place.layer)
        widths = calibration.widths(method.k_bits, method.basis)[row]
        if widths.numel() != place.heads * place.head_dim:
            raise CalibrationError(
                f"the calibration's layers must have {place.heads * place.head_dim} channels of K, "
                f"they have {widths.numel()}"
            )
        self.unit, self.method = method.unit, method
        back, scale, mean = calibration.back(place.layer, method.basis)
        names = ("k.basis", "k.scales", "k.mean")
        self.constants = {
            name: x.to(place.device, copy=True)  # a view would keep, and count, all layers' rows
            for name, x in zip(names, (back, scale, mean), strict=True)
        }
        self.k = Coefficients(widths, GROUP)
        self.v = TokenCodes(method.v_width, method.v_group, place.value_dim)
        self.stores = {f"k.{name}": store for name, store in self.k.stores.items()}
        self.stores |= {f"v.{name}": store for name, store in self.v.stores.items()}
        self.attended: Tensor | None = None
        self._shares = method.heavy * calibration.tensors["heavy"][row].float()
        self.heavy = HeavyRows(place)
        if method.heavy:
            self.stores |= self.heavy.stores

    def _back(self) -> Tensor:
        """``[d, d]`` float32: rows are directions."""
        rows = self.constants["k.basis"].float()
        rows = rows if rows.dim() == 2 else torch.block_diag(*rows)
        return rows * self.constants["k.scales"].float()[:, None]

    def append(self, k: Tensor, v: Tensor) -> None:
        flat = k.float().transpose(1, 2).flatten(2)  # [B, n, d]
        z = (flat - self.constants["k.mean"].float()) @ torch.linalg.inv(self._back())
        self.k.append(z)
        self.v.append(v)
        if self.attended is not None and self.method.heavy:
            before, after = (
                (self._shares * count).floor().long()
                for count in (self.tokens, self.tokens + k.shape[2])
            )
            counts = (after - before).clamp(max=k.shape[2])
            self.heavy.append(k, v, self.attended, counts, self.tokens)
        self.attended = None
        self.tokens += k.shape[2]

    def read(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        stop = self.tokens if stop is None else stop
        v = self.v.read(start, stop)
        mean = self.constants["k.mean"].float()
        if self.k.kept.numel():
            kept = self._back().index_select(0, self.k.kept.to(mean.device))
            flat = self.k.read(start, stop) @ kept + mean
        else:  # of some layers no direction is worth a bit
            flat = mean.expand(v.shape[0], stop - start, -1)
        k = flat.unflatten(2, (self.place.heads, -1)).transpose(1, 2).contiguous()
        self.heavy.write(k, v, start, stop)
        return k, v

    def crop(self, tokens: int) -> None:
        self.k.cut(tokens)
        self.v.cut(tokens)
        self.heavy.cut(tokens)
        self.tokens = tokens


class HeavyRows:
    """Rows of K and V at 8 bits that stand for some heads' tokens of a body.

    Attributes:
        stores: ``heavy.tokens`` int32 and ``heavy.heads`` uint8 ``[B, M]``, and codes, steps and
            zeros of both sides ``[B, M, ..]``.
    """

    def __init__(self, place: Place):
        self.dims = {"k": place.head_dim, "v": place.value_dim}
        sides = [f"heavy.{side}.{kind}" for side in "kv" for kind in ("codes", "steps", "zeros")]
        self.stores = {name: Store(1) for name in ("heavy.tokens", "heavy.heads", *sides)}

    def append(self, k: Tensor, v: Tensor, attended: Tensor, counts: Tensor, start: int) -> None:
        """Keep ``counts [H]`` of the tokens ``start``.., those of most ``attended [B, H, n]``."""
        heads, tokens = choose(attended, counts)
        if not heads.numel():
            return
        batch = torch.arange(k.shape[0], device=k.device)[:, None]
        for side, x in (("k", k), ("v", v)):
            groups = quantize(x[batch, heads, tokens], 8, "token", self.dims[side], "fp8")
            assert groups.zero is not None  # 8 bits are not symmetric
            self.stores[f"heavy.{side}.codes"].append(pack(groups.codes, 8))
            self.stores[f"heavy.{side}.steps"].append(groups.step)
            self.stores[f"heavy.{side}.zeros"].append(groups.zero.view(torch.uint8))
        self.stores["heavy.tokens"].append((tokens + start).to(torch.int32))
        self.stores["heavy.heads"].append(heads.to(torch.uint8).expand(k.shape[0], -1))

    def write(self, k: Tensor, v: Tensor, start: int, stop: int) -> None:
        """Put the rows of tokens ``start`` to ``stop`` into ``k, v [B, H, stop - start, D]``."""
        if not self.stores["heavy.tokens"].length:
            return
        tokens = self.stores["heavy.tokens"].read()
        batch, row = ((tokens >= start) & (tokens < stop)).nonzero(as_tuple=True)
        where = (
            batch,
            self.stores["heavy.heads"].read()[batch, row].long(),
            tokens[batch, row] - start,
        )
        for side, x in (("k", k), ("v", v)):
            words, step, zero = (
                self.stores[f"heavy.{side}.{kind}"].read()[batch, row]
                for kind in ("codes", "steps", "zeros")
            )
            codes = unpack(words, 8, self.dims[side])
            groups = Groups(codes, step, zero.view(torch.float8_e4m3fn))
            x[where] = dequantize(groups, 8, "token")

    def cut(self, tokens: int) -> None:
        """Forget what stands for tokens from ``tokens`` on; sequences may have forgotten others."""
        store = self.stores["heavy.tokens"]
        if store.length:
            store.map(lambda x: torch.where(x < tokens, x, torch.full_like(x, -1)))


def choose(attended: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The most attended tokens of each head.

    Args:
        attended: ``[B, H, n]``.
        counts: ``[H]`` int64, how many of each head.

    Returns:
        heads ``[M]`` and tokens ``[B, M]``, int64, M the sum of the counts.
    """
    found = [attended[:, h].topk(count).indices for h, count in enumerate(counts.tolist())]
    heads = torch.arange(len(counts), device=attended.device)
    return heads.repeat_interleave(counts.to(heads.device)), torch.cat(found, -1)
