"""Open-MAGVIT2 (Luo et al., 2409.04410): signs of 18 latents, written as its weights want it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sage_diffusion.vq.families.base import Checkpoint, Family, averaged, fill, lacking, numbers
from sage_diffusion.vq.quantizers import LFQ
from sage_diffusion.vq.tokenizer import Tokenizer, Traits


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


class _Block(nn.Module):
    """Two convolutions without bias beside the identity."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm1, self.norm2 = _norm(width), _norm(out)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        if width != out:
            self.nin_shortcut = nn.Conv2d(width, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        silu = nn.functional.silu
        y = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


def _blocks(width: int, out: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(_Block(width if i == 0 else out, out) for i in range(count))


class _Encoder(nn.Module):
    def __init__(self, widths: list[int], first: int, depth: int, dim: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = nn.Module()
            level.block = _blocks(widths[i - 1] if i else first, width, depth)
            if i < len(widths) - 1:
                level.downsample = nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.down.append(level)
        self.mid_block = _blocks(widths[-1], widths[-1], depth)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        level: Any
        for level in self.down:
            x = _through(level.block, x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        x = _through(self.mid_block, x)
        return self.conv_out(nn.functional.silu(self.norm_out(x)))


class _Adaptive(nn.Module):
    """Group normalization whose scale and shift come from the codes' spread and mean."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.width = width
        self.gamma, self.beta = nn.Linear(dim, width), nn.Linear(dim, width)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        flat = codes.flatten(2)
        scale = self.gamma((flat.var(-1) + 1e-6).sqrt())[:, :, None, None]
        shift = self.beta(flat.mean(-1))[:, :, None, None]
        return scale * nn.functional.group_norm(x, 32, eps=1e-6) + shift


class _Upsample(nn.Module):
    """Twice the sides; the channels are those of a pixel before its places (depth to space)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, 4 * width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x).unflatten(1, (2, 2, -1))  # rows, columns, channels
        return y.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


class _Decoder(nn.Module):
    def __init__(self, widths: list[int], depth: int, dim: int):
        super().__init__()
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid_block = _blocks(widths[-1], widths[-1], depth)
        self.up, self.adaptive = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[min(i + 1, len(widths) - 1)]
            self.adaptive.append(_Adaptive(dim, before))
            level = nn.Module()
            level.block = _blocks(before, width, depth)
            if i:
                level.upsample = _Upsample(width)
            self.up.append(level)
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        x = _through(self.mid_block, self.conv_in(codes))
        level: Any
        for adaptive, level in zip(reversed(self.adaptive), reversed(self.up), strict=True):
            x = _through(level.block, adaptive(x, codes))
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(nn.functional.silu(self.norm_out(x)))


def _through(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def _refuse(checkpoint: Checkpoint) -> str | None:
    return lacking(
        checkpoint.state, "encoder.mid_block.0.conv1.weight", "decoder.adaptive.0.gamma.weight"
    )


def _load(checkpoint: Checkpoint) -> Tokenizer:
    state = {
        name: tensor
        for name, tensor in averaged(checkpoint.state).items()
        if name.startswith(("encoder.", "decoder."))
    }
    levels = numbers(state, r"encoder\.down\.(\d+)\.")
    widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in levels]
    first = state["encoder.conv_in.weight"].shape[0]
    depth = len(numbers(state, r"encoder\.mid_block\.(\d+)\."))
    bits = state["encoder.conv_out.weight"].shape[0]
    model = nn.Module()
    model.encoder = _Encoder(widths, first, depth, bits)
    model.decoder = _Decoder(widths, depth, bits)
    fill(model, state, "Open-MAGVIT2's network")
    settings = {"widths": widths, "first": first, "depth": depth, "bits": bits}
    traits = Traits("open-magvit2", 2 ** (len(levels) - 1))
    quantizer = LFQ(bits, bits)
    return Tokenizer(model.encoder, quantizer, model.decoder, traits, settings)


FAMILIES = (Family("open-magvit2", _refuse, _load),)
