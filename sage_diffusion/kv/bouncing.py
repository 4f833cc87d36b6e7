"""A world whose truth is known: a coloured digit that bounces and passes behind a wall.

Frames are 32 x 32 pixels.  The digit moves two pixels a frame along x and 0 or two along y, and
bounces off the border; a wall covers the right 18 columns, so that the digit is out of sight for
11 frames of every 24.  What comes out again must be the digit that went in, at the place where it
would be: memory is tested without a judge.

    clips = sample_clips(64, seed=7, split="test")
    vote(frames[:, 31])      # which digit and colour, and where, by the nearest template
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SIDE = 32
SPRITE = 8
#: The first column that the wall covers.
WALL = 14
#: A digit at ``x >= WALL`` is hidden, at ``x <= WALL - SPRITE`` it is seen whole.
STEP = 2
FRAMES = 32
#: Every clip begins with 1 .. 4 frames without the digit, so that the first frame never shows it.
FIRST_HIDDEN = 4

_GLYPHS = (
    "0111110 1100011 1100011 1100011 1100011 1100011 0111110",
    "0011100 0111100 0001100 0001100 0001100 0001100 0111111",
    "1111110 0000011 0000011 0111110 1100000 1100000 1111111",
    "1111110 0000011 0000011 0011110 0000011 0000011 1111110",
    "1100011 1100011 1100011 1111111 0000011 0000011 0000011",
    "1111111 1100000 1100000 1111110 0000011 0000011 1111110",
    "0111110 1100000 1100000 1111110 1100011 1100011 0111110",
    "1111111 0000011 0000110 0001100 0011000 0011000 0011000",
    "0111110 1100011 1100011 0111110 1100011 1100011 0111110",
    "0111110 1100011 1100011 0111111 0000011 0000011 0111110",
)
_COLOURS = ((1.0, 0.25, 0.2), (0.25, 0.9, 0.3), (0.35, 0.5, 1.0), (1.0, 0.85, 0.2))
DIGITS, COLOURS = len(_GLYPHS), len(_COLOURS)
_TEST_SHARE = 8


@dataclass(frozen=True)
class Clips:
    """Starting points of N clips; every tensor is ``[N]`` of int64.

    Attributes:
        digit: 0 .. 9.
        colour: 0 .. 3.
        hidden: frames before the digit first shows, 1 .. 4.
        y: of the digit's upper border in frame 0, an even number 0 .. 24.
        speed: along y, -2, 0 or 2 pixels a frame.
    """

    digit: Tensor
    colour: Tensor
    hidden: Tensor
    y: Tensor
    speed: Tensor

    def __len__(self) -> int:
        return len(self.digit)

    def __getitem__(self, index: slice | Tensor) -> Clips:
        return replace(self, **{name: value[index] for name, value in vars(self).items()})

    @property
    def identity(self) -> Tensor:
        """Digit and colour as one number, ``[N]``."""
        return self.digit * COLOURS + self.colour

    def place(self, frame: int) -> tuple[Tensor, Tensor]:
        """Left and upper border of the digit in pixels, ``[N]`` each, whether it is seen or not."""
        reach = SIDE - SPRITE
        # x falls from behind the wall: it is WALL - STEP in frame `hidden`.
        x = _reflect(WALL - STEP - STEP * (frame - self.hidden), reach)
        return x, _reflect(self.y + self.speed * frame, reach)

    def visible(self, frame: int) -> Tensor:
        """How many columns of the digit are left of the wall, ``[N]``, 0 .. 8."""
        return (WALL - self.place(frame)[0]).clamp(0, SPRITE)


def _reflect(position: Tensor, reach: int) -> Tensor:
    position = position.remainder(2 * reach)
    return torch.minimum(position, 2 * reach - position)


def sample_clips(count: int, seed: int, split: str = "train") -> Clips:
    """Random clips; a start is in one split only, one of eight is a test.

    Raises:
        ValueError: a split other than ``"train"`` and ``"test"``.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    random = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    have = 0
    while have < count:
        draw = torch.stack(
            [
                torch.randint(high, (2 * count,), generator=random)
                for high in (DIGITS, COLOURS, FIRST_HIDDEN, (SIDE - SPRITE) // STEP + 1, 3)
            ]
        )
        key = torch.tensor([7, 11, 3, 5, 1]) @ draw
        draw = draw[:, (key % _TEST_SHARE == 0) == (split == "test")]
        found.append(draw)
        have += draw.shape[1]
    digit, colour, hidden, y, speed = torch.cat(found, 1)[:, :count]
    return Clips(digit, colour, hidden + 1, y * STEP, (speed - 1) * STEP)


def _sprites() -> tuple[Tensor, Tensor]:
    """Colours ``[40, 3, 8, 8]`` in -1 .. 1 and masks ``[40, 1, 8, 8]`` of 0 and 1."""
    rows = [[[int(c) for c in row] for row in glyph.split()] for glyph in _GLYPHS]
    ink = torch.zeros(DIGITS, SPRITE, SPRITE)
    ink[:, :7, :7] = torch.tensor(rows, dtype=torch.float32)
    ink = ink.repeat_interleave(COLOURS, 0)[:, None]
    colours = torch.tensor(_COLOURS).repeat(DIGITS, 1)[:, :, None, None]
    return ink * colours * 2 - 1, ink


def empty_scene() -> Tensor:
    """The background and the wall, ``[3, 32, 32]``: dark blue, and bricks."""
    scene = torch.tensor([-0.9, -0.9, -0.75])[:, None, None].repeat(1, SIDE, SIDE)
    rows, columns = torch.arange(SIDE)[:, None], torch.arange(SIDE)[None]
    mortar = (rows % 4 == 3) | ((columns + 4 * (rows // 4 % 2)) % 8 == 7)
    brick, joint = torch.tensor([0.1, -0.35, -0.5]), torch.tensor([-0.5, -0.55, -0.55])
    wall = torch.where(mortar, joint[:, None, None], brick[:, None, None])
    scene[:, :, WALL:] = wall[:, :, WALL:]
    return scene


def render(clips: Clips, frames: int = FRAMES) -> Tensor:
    """The clips as pictures, ``[N, frames, 3, 32, 32]`` in -1 .. 1."""
    colours, ink = _sprites()
    colours, ink = colours[clips.identity], ink[clips.identity]
    scene = empty_scene()
    pictures = scene.repeat(len(clips), frames, 1, 1, 1)
    ahead = torch.arange(SPRITE)
    index = torch.arange(len(clips))[:, None, None]
    for frame in range(frames):
        x, y = clips.place(frame)
        rows = (y[:, None] + ahead)[:, :, None].expand(-1, SPRITE, SPRITE)
        columns = (x[:, None] + ahead)[:, None].expand(-1, SPRITE, SPRITE)
        under = pictures[index, frame, :, rows, columns].permute(0, 3, 1, 2)
        shown = ink * (columns < WALL)[:, None]
        mixed = shown * colours + (1 - shown) * under
        pictures[index, frame, :, rows, columns] = mixed.permute(0, 2, 3, 1)
    return pictures


@dataclass(frozen=True)
class Vote:
    """What a judge that knows the physics sees in one frame of N clips.

    Attributes:
        identity: of the nearest template at the best place, ``[N]``.
        x, y: that place in pixels, ``[N]``.
    """

    identity: Tensor
    x: Tensor
    y: Tensor


def vote(pictures: Tensor, visible: int = SPRITE) -> Vote:
    """The nearest template and its place, by squared error over the whole frame.

    Every digit in every colour is tried at every place that shows enough of it.

    Args:
        pictures: one frame of N clips, ``[N, 3, 32, 32]`` in -1 .. 1.
        visible: smallest number of columns that a place must leave visible, 1 .. 8.
    """
    colours, ink = _sprites()
    scene = empty_scene()
    # |picture - drawn|^2 = |picture - scene|^2 + a term under the ink alone: keep that term.
    best = torch.full((len(pictures),), float("inf"))
    identity, left, top = (torch.zeros(len(pictures), dtype=torch.int64) for _ in range(3))
    for x in range(min(WALL - visible, SIDE - SPRITE) + 1):
        shown = ink * (torch.arange(x, x + SPRITE) < WALL)
        for y in range(SIDE - SPRITE + 1):
            window = (..., slice(y, y + SPRITE), slice(x, x + SPRITE))
            seen, under = pictures[window][:, None], scene[window]
            # [N, 40]: sum of ink * ((seen - colour)^2 - (seen - under)^2)
            gain = (shown * (colours**2 - under**2)).sum((1, 2, 3))
            gain = gain + 2 * (seen * (shown * (under - colours))).sum((2, 3, 4))
            error, index = gain.min(1)
            closer = error < best
            best = torch.where(closer, error, best)
            identity = torch.where(closer, index, identity)
            left = torch.where(closer, x, left)
            top = torch.where(closer, y, top)
    return Vote(identity, left, top)
