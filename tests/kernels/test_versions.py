"""What stands in for newer versions of Triton, compiled and run by whichever is installed."""

import pytest
import torch

pytest.importorskip("triton")

import triton
from ptxvm import gpu
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language import arange, load, store

from sage_diffusion.kernels import versions
from sage_diffusion.kernels.attention.gluon_layouts import partial_layout
from sage_diffusion.kernels.versions import _inline_asm, distributed_type, to_e4m3


@triton.jit
def _convert(p_x, p_out):
    at = arange(0, 256)
    store(p_out + at, to_e4m3(load(p_x + at)))


@pytest.mark.parametrize("cc", [89, 90, 120])
def test_e4m3_is_rounded_once(cc):
    """Just above the middle of two codes, by less than half's last bit; and beyond the largest."""
    codes = torch.arange(126, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (codes[1:] + codes[:-1]) / 2
    x = torch.cat((middle * (1 + 2**-20), middle * (1 - 2**-20), torch.tensor([448.0, 1e4])))
    x = torch.cat((x, -x))[:256].contiguous()
    x = torch.nn.functional.pad(x, (0, 256 - x.numel()))
    assert not torch.equal(
        x.half().to(torch.float8_e4m3fn).float(), x.to(torch.float8_e4m3fn).float()
    )
    out = torch.empty(256, dtype=torch.float8_e4m3fn)
    with gpu(cc):
        _convert[(1,)](x, out)
    assert torch.equal(out.float(), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())


@gluon.constexpr_function
def _sum_and_first(outputs, inputs):
    """Of a thread's registers of x: the sum times a scalar, and the first plus its row's y."""
    sums, firsts = outputs
    x, y, factor = inputs
    lines = ["{ .reg .f32 t;"]
    for row in range(2):
        own = [name for i, name in enumerate(x) if i % 4 // 2 == row]
        lines.append(f"mov.f32 t, {own[0]};")
        lines += [f"add.rn.f32 t, t, {name};" for name in own[1:]]
        lines.append(f"mul.rn.f32 {sums[row]}, t, {factor[0]};")
    for i, name in enumerate(firsts):
        lines.append(f"add.rn.f32 {name}, {x[i]}, {y[i % 4 // 2]};")
    return "\n".join([*lines, "}"])


@gluon.jit
def _kernel(p_x, p_y, p_sums, p_out, factor, num_warps: gl.constexpr):
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1], [16, 8])
    part: gl.constexpr = partial_layout(num_warps)
    rows = gl.arange(0, 16 * num_warps, gl.SliceLayout(1, mma))
    at = rows[:, None] * 16 + gl.arange(0, 16, gl.SliceLayout(0, mma))[None, :]
    x = gl.load(p_x + at)
    y = gl.load(p_y + rows)  # the same in the four threads of a row
    types: gl.constexpr = (distributed_type(gl.float32, [16 * num_warps, 4], part), x.type)
    sums, out = _inline_asm(
        _sum_and_first, ("=&f", "=&f", "f", "f", "f"), [x, y, factor], types, is_pure=True
    )
    gl.store(p_out + at, out)
    four = gl.arange(0, 16 * num_warps, gl.SliceLayout(1, part))[:, None] * 4
    gl.store(p_sums + four + gl.arange(0, 4, gl.SliceLayout(0, part))[None, :], sums)


def test_assembly_gets_the_registers_of_one_thread():
    """Operands of three layouts and a scalar, results of two; a thread has 2 columns of each 8."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 16, generator=g), torch.randn(64, generator=g)
    sums, out = torch.empty(64, 4), torch.empty(64, 16)
    with gpu(80):
        _kernel[(1,)](x, y, sums, out, 3.0, num_warps=4)
    assert torch.equal(out, x + y[:, None])
    want = x.reshape(64, 2, 4, 2).sum((1, 3)) * 3
    torch.testing.assert_close(sums, want)


@gluon.jit
def _repeats(p_x, num_warps: gl.constexpr):
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1], [16, 8])
    x = gl.load(p_x + gl.arange(0, 16 * num_warps, gl.SliceLayout(1, mma)))
    _inline_asm(_sum_and_first, ("=f", "f"), [x], x.type, is_pure=True)


def test_a_result_that_repeats_values_is_refused():
    with gpu(80), pytest.raises(triton.CompilationError) as caught:
        _repeats[(1,)](torch.zeros(64), num_warps=4)
    assert "must not repeat values" in str(caught.value.__cause__ or caught.value)


def test_the_version_is_the_installed_one():
    assert ".".join(map(str, versions.TRITON)) == ".".join(triton.__version__.split(".")[:2])
    assert (versions.inline_asm is _inline_asm) == (versions.TRITON < (3, 9))
