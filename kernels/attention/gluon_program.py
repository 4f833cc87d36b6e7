"""What a program of the Gluon attention kernel works on: its head, rows, keys and mask."""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..formats import TILE_N
from ..tiles import adding_up
from ..versions import NATIVE_ASSEMBLY, inline_asm
from .gluon_asm import add_bf16, add_fp16, add_fp32, program_after
from .gluon_layouts import lane_layout, scale_layout

_TILE_N, _HALF_MAX = gl.constexpr(TILE_N), gl.constexpr(65504.0)
_NAN = gl.constexpr(tl.PropagateNan.ALL)


@gluon.jit
def _once(x):
    """The value itself, in one register: the compiler would compute it anew after the loop."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)


@gluon.jit
def extent(
    start_m,
    first,
    stop,
    k_len,
    BM: gl.constexpr,
    STEP: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """Steps without a check, and keys, both counted from the step ``first``."""
    skipped = first * (STEP * _TILE_N)
    end = gl.minimum(k_len - skipped, (stop - first) * (STEP * _TILE_N))
    whole = gl.maximum(end, 0) // (STEP * _TILE_N)
    if CAUSAL:
        whole = gl.minimum(whole, gl.maximum(start_m - skipped + 1, 0) // (STEP * _TILE_N))
        end = gl.minimum(end, start_m - skipped + BM)
    return whole, end


@gluon.jit
def to_output(x, p_out):
    """As :func:`..tiles.to_output`."""
    if p_out.dtype.element_ty == gl.float16:
        x = gl.maximum(x, -_HALF_MAX, propagate_nan=_NAN)
        x = gl.minimum(x, _HALF_MAX, propagate_nan=_NAN)
    return x.to(p_out.dtype.element_ty)


@gluon.jit
def multiply_up(x, y):
    """As :func:`..tiles.multiply_up`."""
    asm: gl.constexpr = "mul.rp.f32 $0, $1, $2;"
    return gl.inline_asm_elementwise(asm, "=f,f,f", [x, y], gl.float32, True, 1)


@gluon.jit
def subtract_up(x, y: gl.constexpr):
    """As :func:`..tiles.subtract_up`."""
    asm: gl.constexpr = adding_up(-y)
    return gl.inline_asm_elementwise(asm, "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def lane_columns(num_warps: gl.constexpr):
    """Where a lane's columns stand in a list of a tile's columns, [4, 16].

    Made anew for every list: of a common one the compiler adds the lane's part in every tile.
    """
    layout: gl.constexpr = lane_layout(num_warps)
    lane = gl.arange(0, 4, gl.SliceLayout(1, layout))
    lane = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [lane], gl.int32, False, 1)
    return lane[:, None] * 16 + gl.arange(0, 16, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def lane_scales(dim: gl.constexpr, num_warps: gl.constexpr):
    """Where a lane's words stand in a tile's list of V's scales, [4, dim / 8]."""
    layout: gl.constexpr = scale_layout(dim, num_warps)
    lane = gl.arange(0, 4, gl.SliceLayout(1, layout))
    word = gl.arange(0, dim // 8, gl.SliceLayout(0, layout))
    return lane[:, None] * 4 + (word // 4 * 16 + word % 4)[None, :]


@gluon.jit
def program_number():
    """The program's number.

    Read from the hardware each time: what follows from it, kept from the kernel's begin to its end,
    would cost registers in the loop, which has none to spare.
    """
    return gl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r", [], gl.int32, False, 1)


@gluon.jit
def program_at_end(pointers):
    """The same after a loop that advanced these pointers, before which nobody can know it.

    Before Triton 3.9 assembly takes no pointers: there ptxas may read it early, for an instruction
    or two in the loop.
    """
    if NATIVE_ASSEMBLY:
        return inline_asm(program_after, ("=r", "l"), [pointers], gl.int32, is_pure=False)
    return program_number()


@gluon.jit
def place(program, blocks, heads, group, CAUSAL: gl.constexpr):
    """Which head and which query block a program has."""
    i_m = program % blocks
    if CAUSAL:
        i_m = blocks - 1 - i_m  # the longest first
    i_bh = program // blocks
    i_b, i_h = i_bh // heads, i_bh % heads
    i_bkv = i_b * (heads // group) + i_h // group
    return i_bh.to(gl.int64), i_b.to(gl.int64), i_h.to(gl.int64), i_bkv.to(gl.int64), i_m


@gluon.constexpr_function
def _words_of_tile(mask):
    """Of a warp, in the packed mask."""
    return {"bool": 32, "fp32": 1024}.get(mask, 512)


@gluon.jit
def mask_span(p_span, tiles, STEP: gl.constexpr, num_warps: gl.constexpr):
    """First step that a row of the program sees, and the one after the last."""
    first, stop = tiles, 0
    for i in gl.static_range(num_warps):
        first = gl.minimum(first, gl.load(p_span + 2 * i) // STEP)
        stop = gl.maximum(stop, gl.cdiv(gl.load(p_span + 2 * i + 1), STEP))
    return _once(first), _once(stop)


@gluon.jit
def mask_words(p_mask, i_group, tiles, first, MASK: gl.constexpr, num_warps: gl.constexpr):
    """Where a lane's words of the mask stand for the tile ``first``, 16 bytes each."""
    WORDS: gl.constexpr = _words_of_tile(MASK)
    VECTOR: gl.constexpr = 1 if MASK == "bool" else 4
    layout: gl.constexpr = gl.BlockedLayout([VECTOR], [32], [num_warps], [0])
    o_w = gl.arange(0, 32 * VECTOR * num_warps, layout)
    p_mask += (i_group * tiles + first) * WORDS
    return p_mask + (o_w // (32 * VECTOR) * tiles * WORDS + o_w % (32 * VECTOR))


@gluon.jit
def add_mask(s, p_mask, MASK: gl.constexpr):
    """Scores plus an additive mask, and where its next tile lies."""
    WORDS: gl.constexpr = _words_of_tile(MASK)
    words = ()
    for i in gl.static_range(WORDS // 128):
        words = words + (gl.load(p_mask + i * 128),)  # type: ignore[assignment]  # noqa: RUF005
    asm: gl.constexpr = add_fp32 if MASK == "fp32" else add_bf16 if MASK == "bf16" else add_fp16
    operands = (s,) + words  # noqa: RUF005
    s = inline_asm(asm, _constraints(WORDS // 128), operands, s.type, is_pure=True)
    return s, p_mask + WORDS


@gluon.constexpr_function
def _constraints(chunks):
    return ("=&f", "f", *["r"] * chunks)
