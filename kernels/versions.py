"""What differs between Triton's versions.  Everything else in this package is the same for all.

=====  ==========================================================================================
since
=====  ==========================================================================================
3.7    ``gl.barrier``, before that ``gl.thread_barrier``
3.7    fences between copies to shared memory and ``wgmma`` in loops of plain Triton
3.8    ``async_copy.async_load``, before that ``async_copy_global_to_shared``
3.9    one rounding from float32 to E4M3 on sm_89, where the way went through half
3.9    ``gl.inline_asm``; :func:`_inline_asm` is what the kernels use of it
=====  ==========================================================================================

Traps that the kernels avoid for the sake of older versions: before 3.7 a jit function can't return
None, and before 3.9 a constexpr function can't unpack nested tuples and ``gl.zeros`` takes no shape
of a tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

#: (3, 6) for 3.6.0
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))

async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

#: Type of a tensor with a layout.
distributed_type = _core.distributed_type

_NO_FENCE, _TWO_ROUNDINGS = tl.constexpr(TRITON < (3, 7)), tl.constexpr(TRITON < (3, 9))


@triton.constexpr_function
def _is(major, minor):
    """Whether an NVIDIA card of this compute capability is compiled for."""
    target = tl.target_info.current_target()
    return target is not None and (target.backend, target.arch) == ("cuda", 10 * major + minor)


@triton.jit
def fence_copies():
    """Before a product whose operand was copied to shared memory, once the copy is there.

    ``wgmma`` reads shared memory through a proxy of its own, for which copies must be fenced.
    """
    if _NO_FENCE and _is(9, 0):
        tl.inline_asm_elementwise(
            "fence.proxy.async.shared::cta; mov.b32 $0, 0;", "=r", [], tl.int32, False, 1
        )


@triton.jit
def to_e4m3(x):
    """float32 -> E4M3, to nearest even, saturating."""
    if _TWO_ROUNDINGS and _is(8, 9):
        return tl.inline_asm_elementwise(
            "{ .reg .b16 h<2>; cvt.rn.satfinite.e4m3x2.f32 h0, $2, $1; "
            "cvt.rn.satfinite.e4m3x2.f32 h1, $4, $3; mov.b32 $0, {h0, h1}; }",
            "=r,f,f,f,f",
            [x],
            dtype=tl.float8e4nv,
            is_pure=True,
            pack=4,
        )
    return x.to(tl.float8e4nv)


# ---------------------------------------------------------------------- inline assembly
class _Bits(NamedTuple):
    """Which bit of a tensor's flat index each bit of a warp, lane and register is, lowest first.

    None where a bit makes no difference: warps, lanes or registers hold the same value.
    """

    warp: list[int | None]
    lane: list[int | None]
    register: list[int | None]


class _Frame(NamedTuple):
    """The one shape and layout of all operands: a dim of 2 for each bit, the highest first."""

    warp: int
    register: int

    @property
    def shape(self) -> list[int]:
        return [2] * (self.warp + 5 + self.register)

    @property
    def layout(self) -> Any:
        def bases(count: int, last: int) -> list[list[int]]:
            return [[int(j == last - i) for j in range(len(self.shape))] for i in range(count)]

        return gl.DistributedLinearLayout(
            reg_bases=bases(self.register, self.warp + 4 + self.register),
            lane_bases=bases(5, self.warp + 4),
            warp_bases=bases(self.warp, self.warp - 1),
            block_bases=[],
            shape=self.shape,
        )


def _plain(x: Any) -> Any:
    """Without Triton's wrappers of constants and tuples."""
    if isinstance(x, tl.constexpr):
        return _plain(x.value)
    if isinstance(x, (tuple, list, tl.tuple)):
        return [_plain(one) for one in x]
    return x


def _bits(kind: Any, semantic: Any) -> _Bits:
    """Of a :data:`distributed_type` whose layout moves no two bits at once (no swizzling)."""
    shape = _plain(kind.shape)
    linear = _plain(semantic.to_linear_layout(_plain(kind.layout), shape))
    below = [0] * len(shape)  # bits of the dims after each
    for i in reversed(range(len(shape) - 1)):
        below[i] = below[i + 1] + shape[i + 1].bit_length() - 1

    def bit(base: list[int]) -> int | None:
        moved = [i for i, step in enumerate(base) if step and step < shape[i]]
        if not moved:
            return None
        (i,) = moved
        return below[i] + base[i].bit_length() - 1

    groups = (linear.warp_bases, linear.lane_bases, linear.reg_bases)
    return _Bits(*([bit(base) for base in bases] for bases in groups))


def _spread(x: Any, frame: _Frame, semantic: Any) -> Any:
    """A tensor or scalar in the frame; of what has fewer registers the names are repeated."""
    if not isinstance(x.type, distributed_type):
        return semantic.splat(x, frame.shape, frame.layout)
    warp, lane, register = _bits(x.type, semantic)
    missing = [None] * (frame.register - len(register))
    bits = [*reversed(warp), *reversed(lane), *missing, *reversed(register)]
    present = [bit for bit in bits if bit is not None]
    if present:
        x = semantic.reshape(x, [2] * len(present), False)
        x = semantic.permute(x, [len(present) - 1 - bit for bit in present])
    x = semantic.reshape(x, [1 if bit is None else 2 for bit in bits], False)
    x = semantic.convert_layout(x, frame.layout, assert_trivial=True)
    return semantic.broadcast_impl_shape(x, frame.shape)


def _gather(x: Any, kind: Any, frame: _Frame, semantic: Any) -> Any:
    """The other way round: the first registers, as a tensor of this type."""
    warp, lane, register = _bits(kind, semantic)
    bits = [*reversed(warp), *reversed(lane), *reversed(register)]
    front = frame.warp + 5
    for _ in range(frame.register - len(register)):  # the highest register bit is 0
        rank = len(x.shape)
        x = semantic.permute(x, [*range(front), *range(front + 1, rank), front])
        x = semantic.split(x)[0]
    x = semantic.permute(x, [bits.index(bit) for bit in reversed(range(len(bits)))])
    x = semantic.reshape(x, _plain(kind.shape), False)
    return semantic.convert_layout(x, _plain(kind.layout), assert_trivial=True)


@_core.builtin
def _inline_asm(asm, constraints, args, result_types, is_pure=False, _semantic=None):
    """``gl.inline_asm`` on 32-bit operands and tensors as results, none of which repeats a value.

    Before Triton 3.9 there is only elementwise assembly, whose operands have one shape and layout.
    Every operand gets that shape (:class:`_Frame`) without moving a byte, which
    ``assert_trivial`` proves, and the "element" of the assembly is all of a thread's registers.
    """
    args = [_semantic.to_tensor(x) for x in args]
    several = isinstance(_plain(result_types), list)
    kinds = _plain(result_types) if several else [_plain(result_types)]
    types = [x.type if isinstance(x.type, distributed_type) else None for x in args]
    results = [_bits(kind, _semantic) for kind in kinds]
    for kind, of in zip(kinds, results, strict=True):
        if None in (*of.warp, *of.lane, *of.register):
            raise TypeError(f"a result must not repeat values, got {kind}")
    operands = [*results, *(None if kind is None else _bits(kind, _semantic) for kind in types)]
    registers = [0 if of is None else len(of.register) for of in operands]
    frame = _Frame(len(results[0].warp), max(registers))
    size = 1 << frame.register

    names = [
        tuple(f"${i * size + j}" for j in range(1 << count)) for i, count in enumerate(registers)
    ]
    text = _plain(asm(tuple(names[: len(kinds)]), tuple(names[len(kinds) :])))
    builder = _semantic.builder
    framed = [distributed_type(kind.element_ty, frame.shape, frame.layout) for kind in kinds]
    call = builder.create_inline_asm(
        text,
        ",".join(one for one in _plain(constraints) for _ in range(size)),
        [_spread(x, frame, _semantic).handle for x in args],
        [kind.to_ir(builder) for kind in framed],
        _plain(is_pure),
        size,
    )
    found = [
        _gather(_core.tensor(call.get_result(i), of), kind, frame, _semantic)
        for i, (of, kind) in enumerate(zip(framed, kinds, strict=True))
    ]
    return _core.tuple(found) if several else found[0]


inline_asm = getattr(gl, "inline_asm", None) or _inline_asm

#: Whether assembly takes operands of any width and gives scalars.
NATIVE_ASSEMBLY = tl.constexpr(inline_asm is not _inline_asm)
