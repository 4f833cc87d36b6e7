"""Where the Gluon attention kernel's tensors lie, in shared memory and in registers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..formats import TILE_N


@gluon.constexpr_function
def swizzle(words):
    """Shared memory of rows of 32-bit words from which ``ldmatrix`` reads without conflicts."""
    rows = max(1, 32 // words)  # per 128 bytes
    return gl.SwizzledSharedLayout(4, rows, max(1, 8 // rows), [1, 0])


@gluon.constexpr_function
def copy_layout(words, warps):
    """16 bytes a thread, rows of ``words`` contiguous."""
    threads = min(32, words // 4)
    return gl.BlockedLayout([1, 4], [32 // threads, threads], [warps, 1], [1, 0])


@gluon.constexpr_function
def lane_layout(warps):
    """A tile's columns (see ``column_order``) by the four threads that share a row of scores."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8]],
        lane_bases=[[1, 0], [2, 0], [0, 0], [0, 0], [0, 0]],
        warp_bases=[[0, 0]] * (warps.bit_length() - 1),
        block_bases=[],
        shape=[4, TILE_N // 4],
    )


@gluon.constexpr_function
def scale_layout(dim, warps):
    """Scales of V's channels (``permute.channel_order``), words of two, as :func:`lane_layout`."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1 << i] for i in range((dim // 8).bit_length() - 1)],
        lane_bases=[[1, 0], [2, 0], [0, 0], [0, 0], [0, 0]],
        warp_bases=[[0, 0]] * (warps.bit_length() - 1),
        block_bases=[],
        shape=[4, dim // 8],
    )


@gluon.constexpr_function
def partial_layout(warps):
    """``[BM, 4]``: a thread's own part of its rows' sums; four threads share a row."""
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    warp_bits = [[16 << i, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout([[8, 0]], lanes, warp_bits, [], [16 * warps, 4])


@gluon.constexpr_function
def thread_layout(warps):
    """``[threads, 4]``: four words of every thread's own."""
    return gl.BlockedLayout([1, 4], [32, 1], [warps, 1], [1, 0])


@gluon.constexpr_function
def micro_layout(words, warps, operand):
    """Where ``mma`` looks for the scales of Q's rows (operand 0) or of K's (1), a word each 64.

    Of K thread t of four has the rows of every fourth n8 tile, from the t-th.
    """
    word_bits = [[0, 1 << i] for i in range(words.bit_length() - 1)]
    if operand == 0:  # thread 0 of four has row g, thread 1 row g + 8
        lanes = [[8, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
        warp_bits = [[16 << i, 0] for i in range(warps.bit_length() - 1)]
        return gl.DistributedLinearLayout(word_bits, lanes, warp_bits, [], [16 * warps, words])
    lanes = [[8, 0], [16, 0], [1, 0], [2, 0], [4, 0]]
    warp_bits = [[0, 0]] * (warps.bit_length() - 1)
    tile_bits = [*word_bits, [32, 0]]
    return gl.DistributedLinearLayout(tile_bits, lanes, warp_bits, [], [TILE_N, words])


@gluon.constexpr_function
def p_micro_layout(warps):
    """Of P's rows the same as Q's; threads 2 and 3 of four, which ``mma`` ignores, as a column."""
    lanes = [[8, 0], [0, 1], [1, 0], [2, 0], [4, 0]]
    warp_bits = [[16 << i, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout([], lanes, warp_bits, [], [16 * warps, 2])


@gluon.constexpr_function
def channel_micro_layout(dim, warps):
    """Where ``mma`` looks for the scales of V's channels, a word each, as of K's rows."""
    return gl.DistributedLinearLayout(
        reg_bases=[[32 << i] for i in range((dim // 32).bit_length() - 1)],
        lane_bases=[[8], [16], [1], [2], [4]],
        warp_bases=[[0]] * (warps.bit_length() - 1),
        block_bases=[],
        shape=[dim],
    )
