"""Launch configurations of the decode kernels.  Data only: no Triton here."""

from __future__ import annotations

from typing import NamedTuple

from .layout import Width, bits

#: Programs that a multiprocessor shall have, so that loads of one hide behind products of others.
PROGRAMS = 3

#: More splits than this cost more in joining than they bring.
MOST_SPLITS = 256

#: Rows of Q (query heads times queries) of a program; more rows read the codes once more.
MOST_ROWS = 16

NUM_WARPS = 4

#: Rows of Q times bits of a tile of K: what fits into the registers without spills.
_MOST_BITS = 8 * 128 * 128 * 2


class Launch(NamedTuple):
    """A launch configuration.

    Attributes:
        tile: tokens of a warp at a time.
        rows: rows of Q of a program, 8 or 16.
        num_warps: of a program.
    """

    tile: int
    rows: int
    num_warps: int


def launch(dim: int, k: Width, v: Width, rows: int, group: int, gains: int = 1) -> Launch:
    """The configuration for D channels, widths of K and V, rows of Q and tokens a step of K.

    A lane has ``tile * D * bits / 1024`` words of K and of V in registers, and
    ``tile * rows / 32`` scores; ``gains`` are the steps of a token of V.
    """
    block = 8 if rows <= 8 or dim > 128 else 16  # a warp sums all channels of all rows
    tile = 128 if gains == 1 else 8192 // max(dim, 128)
    wide = max(bits(k), bits(v))
    while tile > 16 and (tile * dim * wide * block > _MOST_BITS or tile >= 2 * group):
        tile //= 2
    return Launch(tile, block, NUM_WARPS)


def portable_tile(arch: str) -> int:
    """Tokens of a tile of the kernel in Triton; RDNA's operands take twice the registers."""
    return 16 if arch.startswith("gfx1") else 32


def portable_warps(arch: str, turned: bool) -> int:
    """Warps of the kernel in Triton; with keys that are turned RDNA's registers need more lanes."""
    return 8 if turned and arch.startswith("gfx1") else 4


def shorter(config: Launch, tokens: int, programs: int, processors: int) -> Launch:
    """With smaller tiles where few tokens would leave most of a card idle."""
    tile = config.tile
    while tile > 16 and tokens * programs < tile * config.num_warps * processors:
        tile //= 2
    return config._replace(tile=tile)


def refuse_turn(arch: str, group: int, dim: int) -> str | None:
    """Why the kernel in Triton can't turn keys in groups of so many tokens, or None."""
    tile = portable_tile(arch)
    if arch.startswith("gfx11"):  # each half of a wave holds all of an operand
        return "keys that are turned do not fit into the registers of RDNA 3"
    if group > tile and group % tile:
        return f"tiles of {tile} tokens must divide K's groups, got {group}"
    if dim % 2:
        return f"needs an even head dim, got {dim}"
    return None


def tiles(tokens: int, group: int, tile: int) -> int:
    """Tiles of so many tokens; none goes across the end of a group."""
    each = -(-group // tile)
    full, rest = divmod(tokens, group)
    return full * each + -(-rest // tile)


def splits(count: int, programs: int, processors: int, warps: int) -> int:
    """Parts of the tiles, so that few heads fill a card too."""
    wanted = -(-PROGRAMS * processors // programs)
    return max(1, min(wanted, MOST_SPLITS, -(-count // warps)))
