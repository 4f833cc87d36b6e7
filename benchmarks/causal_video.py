"""Does a video model remember? One table and one picture of what a KV cache in few bits keeps.

    python -m benchmarks.causal_video                            all rows over 64 clips
    python -m benchmarks.causal_video exact k2v2 --clips 8       some, quickly
    python -m benchmarks.causal_video --memory                   bytes alone, of a clip, in seconds

The bundled causal video model sees unseen clips until the digit has passed behind the wall (25
frames), and draws the 7 frames in which it comes out again; every row has the same noise.  A judge
that knows the physics votes by the nearest template: is it the same digit in the same colour, and
where it should be?  Finished rows are kept in ``--out`` and not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sage_diffusion.files import write_text
from sage_diffusion.integrations.diffusers.causal_video import ASSETS, TOKENS, CausalVideo
from sage_diffusion.integrations.diffusers.kv import WanKVCache
from sage_diffusion.kv.bouncing import FRAMES, Clips, render, sample_clips, vote
from sage_diffusion.kv.methods.kivi import Kivi
from sage_diffusion.kv.methods.video import Video

#: Frames that the model is shown: in the last of them every clip's digit is behind the wall.
SEEN = 25
#: Columns of a digit that must be seen for a vote.
VISIBLE = 6
STEPS = 2

_HISTORY: dict[str, Any] = {"sink": TOKENS, "recent": TOKENS, "span": 4 * TOKENS}


def _history(method: Any) -> Callable[[CausalVideo], WanKVCache]:
    """Everything is kept: the first and the newest frame exact, the others by a method."""
    return lambda model: model.cache(method=method, **_HISTORY)


#: Row -> its cache.  Groups of 64: a head's channels, or a frame's tokens of one channel.
ROWS: dict[str, Callable[[CausalVideo], WanKVCache]] = {
    "exact": lambda model: model.cache(),
    "window 4": lambda model: model.cache(4),
    "window 8": lambda model: model.cache(8),
    "first + 7": lambda model: model.cache(8, sink=TOKENS),
    "k8v8": _history(Kivi(8, 8, 64)),
    "k4v4": _history(Kivi(4, 4, 64)),
    "k3v3": _history(Kivi(3, 3, 64)),
    "k3v2": _history(Kivi(3, 2, 64)),
    "k2v2": _history(Kivi(2, 2, 64)),
    "video 2 bit": _history(Video(2, centroids=16, span=4 * TOKENS)),
    "k1v1": _history(Kivi(1, 1, 64)),
}


@dataclass(frozen=True)
class Row:
    """One cache over all clips.

    Attributes:
        frames: kept at the end, the newest included.
        bits: bytes kept, all of them, of an element of all frames' K and V; exact is 16.
        kept, peak: bytes of a clip at the end; the peak has what decoding a layer allocates.
        identity, place: share of the votes for the digit and colour that went behind the wall, and
            for these at the very pixel.
        pixels: mean distance of the voted place, of the larger axis.
        psnr: dB to the exact cache's pictures, the frames after the wall; infinite for itself.
        seconds: of CPU for all clips.
    """

    name: str
    clips: int
    frames: float
    bits: float
    kept: int
    peak: int
    identity: float
    place: float
    pixels: float
    psnr: float
    seconds: float


def transient(cache: WanKVCache) -> int:
    """Most bytes that decoding a layer allocates on top of what the cache holds."""
    layer = cache.layers[0]
    cache.scratch.fill(layer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        cache.scratch.fill(layer)
    held = most = 0
    for event in found.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def run(model: CausalVideo, name: str, clips: Clips, batch: int = 16) -> tuple[Row, Tensor]:
    """A row, without its PSNR, and the frames that were drawn ``[N, 7, 3, 32, 32]``."""
    drawn, seconds = [], 0.0
    cache = ROWS[name](model)
    kept = size = 0
    frames = 0.0
    for start in range(0, len(clips), batch):
        part = clips[start : start + batch]
        pictures = render(part, SEEN)
        before = time.process_time()
        found = model.continue_clips(pictures, FRAMES - SEEN, cache, steps=STEPS, seed=start)
        seconds += time.process_time() - before
        drawn.append(found)
        size, kept, frames = len(part), cache.nbytes, cache.tokens / TOKENS
    peak = cache.peak_bytes + transient(cache)
    frames_drawn = torch.cat(drawn)
    votes = judged(frames_drawn, clips)
    width = model.transformer.patch_embedding.out_channels
    elements = len(cache.layers) * 2 * FRAMES * TOKENS * width
    row = Row(
        name,
        len(clips),
        frames,
        8 * kept / size / elements,
        kept // size,
        peak // size,
        *votes,
        math.nan,
        seconds,
    )
    return row, frames_drawn


def judged(drawn: Tensor, clips: Clips) -> tuple[float, float, float]:
    """Identity, identity with place, and distance, over the frames that show enough of a digit."""
    same, exact, distance = [], [], []
    for frame in range(SEEN, FRAMES):
        chosen = clips.visible(frame) >= VISIBLE
        if not chosen.any():
            continue
        found = vote(drawn[chosen, frame - SEEN], VISIBLE)
        x, y = (place[chosen] for place in clips.place(frame))
        far = torch.maximum((found.x - x).abs(), (found.y - y).abs())
        right = found.identity == clips.identity[chosen]
        same.append(right)
        exact.append(right & (far == 0))
        distance.append(far)
    a, b, c = (torch.cat(each).float().mean().item() for each in (same, exact, distance))
    return a, b, c


def psnr(found: Tensor, want: Tensor) -> float:
    """dB; pictures have a range of 2."""
    error = (found - want).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| cache | frames kept | bits, all in | KiB a clip | peak, KiB | identity | + place | "
        "pixels off | dB to exact | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.name} | {r.frames:.0f} | {r.bits:.2f} | {r.kept / 1024:.0f} | "
            f"{r.peak / 1024:.0f} | {r.identity:.0%} | {r.place:.0%} | {r.pixels:.1f} | "
            f"{r.psnr:.1f} | {r.seconds:.0f} |"
        )
    return "\n".join(lines)


def memory_table(names: Sequence[str]) -> str:
    """Markdown: bytes of a clip of 32 frames of random K and V, beside what the peak may be."""
    lines = [
        "| cache | bits, all in | kept, KiB | + one layer | + a tile | = peak | at most |",
        "|---|---|---|---|---|---|---|",
    ]
    model = CausalVideo.bundled()
    layers, random = len(model.transformer.blocks), torch.Generator().manual_seed(0)
    heads = model.transformer.config.num_attention_heads
    exact = 2 * 2 * layers * FRAMES * TOKENS * heads * model.transformer.config.attention_head_dim
    for name in names:
        cache = ROWS[name](model)
        for _ in range(FRAMES):
            for layer in range(layers):
                shape = (1, TOKENS, heads, model.transformer.config.attention_head_dim)
                k, v = (torch.randn(shape, generator=random).bfloat16() for _ in "kv")
                cache.update(layer, k, v)
        tile, share = transient(cache), cache.nbytes / exact
        peak, most = cache.peak_bytes + tile, (share + 1 / layers + 0.05) * exact
        cells = (cache.nbytes, cache.scratch.nbytes, tile, peak, most)
        text = " | ".join(f"{count / 1024:.0f}" for count in cells)
        lines.append(f"| {name} | {16 * share:.2f} | {text} |")
    return "\n".join(lines)


def picture(pictures: dict[str, Tensor], clips: Clips, shown: int = 4) -> Image.Image:
    """Frames after the wall: the truth, then each row, for a few clips side by side."""
    truth = render(clips[:shown])[:, SEEN:]
    rows = {"truth": truth, **{name: found[:shown] for name, found in pictures.items()}}
    zoom, left, label = 1, 92, 16
    frames = FRAMES - SEEN
    width = left + shown * (frames * 32 * zoom + 8)
    canvas = Image.new("RGB", (width, label + len(rows) * (32 * zoom + 4)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for index, (name, found) in enumerate(rows.items()):
        top = label + index * (32 * zoom + 4)
        draw.text((6, top + 9), name, fill="black", font=font)
        for clip in range(min(shown, len(found))):
            strip = found[clip].clamp(-1, 1).permute(1, 2, 0, 3).flatten(2)  # [3, 32, frames * 32]
            data = ((strip + 1) * 127.5).byte().permute(1, 2, 0).contiguous()
            canvas.paste(Image.fromarray(data.numpy()), (left + clip * (frames * 32 + 8), top))
    seen = f"frames {SEEN} .. {FRAMES - 1} of {shown} clips: the digit leaves the wall"
    draw.text((left, 1), seen, fill="black", font=font)
    return canvas.resize((2 * canvas.width, 2 * canvas.height), Image.Resampling.NEAREST)


@dataclass(frozen=True)
class Card:
    """A card for predicted bounds: bytes and BF16 operations a second."""

    name: str
    bandwidth: float
    operations: float


CARDS = (Card("RTX 4090", 1.008e12, 165e12), Card("H100 SXM", 3.35e12, 989e12))


def predicted_overhead(card: Card, bits: float, frames: int, history: int = 32_760) -> float:
    """Time that decoding into scratch adds to a block of Wan 2.1 1.3B, as a share of the block.

    Bounds: the block's products at the card's peak; for each layer the packed history is read and
    the scratch written once (attention reads it as it would read the exact cache).
    """
    width, feed, frame = 1536, 8960, 1560
    rows = frames * frame
    products = rows * (2 * (4 + 2) * width**2 + 4 * width * feed) + 4 * rows * history * width
    moved = 2 * history * width * (bits / 8 + 2)
    return moved / card.bandwidth / (products / card.operations)


def predictions(bits: float) -> str:
    """Lines of text."""
    lines = []
    for card in CARDS:
        one, three = (predicted_overhead(card, bits, frames) for frames in (1, 3))
        lines.append(
            f"predicted bound, {card.name}, {bits:.2f} bits, 32,760 tokens: a block of 1 frame "
            f"+{one:.1%}, of 3 frames +{three:.1%}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)} [default: all]")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--memory", action="store_true", help="bytes alone, without the model")
    parser.add_argument("--model", type=Path, default=ASSETS)
    parser.add_argument("--out", type=Path, default=Path("out/causal_video"))
    args = parser.parse_args(arguments)
    names = args.rows or list(ROWS)
    for name in names:
        if name not in ROWS:
            parser.error(f"a row must be one of {', '.join(ROWS)}, got {name!r}")
    if args.memory:
        print(memory_table(names))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    model = CausalVideo.bundled(args.model)
    clips = sample_clips(args.clips, seed=64, split="test")
    rows, pictures = [], {}
    for name in dict.fromkeys(["exact", *names]):
        file = args.out / f"{name.replace(' ', '_')}_{args.clips}.pt"
        if file.is_file():
            held = torch.load(file, weights_only=True)
            row, drawn = Row(**held["row"]), held["drawn"].float()
        else:
            row, drawn = run(model, name, clips)
            torch.save({"row": asdict(row), "drawn": drawn.bfloat16()}, file)
        pictures[name] = drawn
        found = psnr(drawn.bfloat16().float(), pictures["exact"].bfloat16().float())
        rows.append(Row(**{**asdict(row), "psnr": found}))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    text = table(rows)
    print(f"\n{len(clips)} unseen clips, {STEPS} steps a frame\n\n{text}\n")
    print(predictions(2.5))
    write_text(args.out / "table.md", text + "\n")
    write_text(args.out / "rows.json", json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    picture(pictures, clips).save(args.out / "causal_video.png")


if __name__ == "__main__":
    main()
