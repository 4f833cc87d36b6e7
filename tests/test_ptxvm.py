"""The machine that the kernels' tests stand on, against Torch."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ptxvm import Machine, PTXError, compile_for, gpu

from sage_diffusion.kernels.tiles import multiply_up, subtract_up
from sage_diffusion.kernels.versions import fence_copies

FLOATS = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
}


@triton.jit
def _softmax(X, Y, n, stride, BLOCK: tl.constexpr):
    i, o = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(X + i * stride + o, mask=o < n, other=-float("inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(Y + i * n + o, e / tl.sum(e, 0), mask=o < n)


@pytest.mark.parametrize("n", [1, 63, 256])
def test_launch_of_a_strided_view(n):
    x, y = torch.randn(3, n + 5)[:, 3 : n + 3], torch.full((3, n), float("nan"))
    with gpu(89) as card:
        _softmax[(3,)](x, y, n, x.stride(0), BLOCK=256)
    assert card.launches == [("_softmax", (3, 1, 1))]
    torch.testing.assert_close(y, x.softmax(1), rtol=1e-5, atol=1e-6)


@triton.jit
def _finite_or_zero(X, Y, N: tl.constexpr):
    x = tl.load(X + tl.arange(0, N))
    tl.store(Y + tl.arange(0, N), tl.where(x == -float("inf"), 0.0, x))


def test_packed_comparison():
    """Two halves are compared by one instruction, which sets two predicates."""
    x = torch.randn(256, generator=torch.Generator().manual_seed(0)).half()
    x[::3] = -torch.inf
    y = torch.empty_like(x)
    with gpu(89):
        _finite_or_zero[(1,)](x, y, N=256)
    assert torch.equal(y, torch.where(x.isneginf(), 0.0, x))


@triton.jit
def _matmul(A, B, C, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], C.dtype.element_ty)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        in_a, in_b = (m[:, None] < M) & (k[None, :] < K), (n[None, :] < N) & (k[:, None] < K)
        a = tl.load(A + m[:, None] * K + k[None, :], mask=in_a, other=0.0)
        b = tl.load(B + n[None, :] * K + k[:, None], mask=in_b, other=0.0)
        fence_copies()
        acc = tl.dot(a, b, acc, out_dtype=C.dtype.element_ty)
    tl.store(C + m[:, None] * N + n[None, :], acc, mask=(m[:, None] < M) & (n[None, :] < N))


@pytest.mark.parametrize(
    "cc,kind,warps",
    [
        (80, "i8", 4),
        (80, "bf16", 8),
        (89, "fp8e4nv", 4),
        (90, "i8", 8),
        (90, "fp16", 4),
        (90, "fp8e4nv", 4),
        (120, "fp8e4nv", 8),
    ],
)
def test_tensor_cores(cc, kind, warps):
    m, n, k = 75, 70, 160
    g = torch.Generator().manual_seed(0)
    if kind == "i8":
        a, b = (torch.randint(-127, 128, (s, k), dtype=torch.int8, generator=g) for s in (m, n))
        want = a.int() @ b.int().T
    else:
        a, b = (torch.randn(s, k, generator=g).to(FLOATS[kind]) for s in (m, n))
        want = a.float() @ b.float().T
    c = torch.zeros(m, n, dtype=want.dtype)
    with gpu(cc):
        _matmul[(2, 2)](a, b, c, m, n, k, BM=64, BN=64, BK=64, num_warps=warps)
    torch.testing.assert_close(c, want, rtol=1e-4, atol=1e-3)


@triton.jit
def _scaled_dot(A, SA, B, SB, C, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k, g = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K // 2), tl.arange(0, K // 16)
    a = tl.load(A + m[:, None] * (K // 2) + k[None, :])
    b = tl.load(B + n[None, :] * (K // 2) + k[:, None])
    sa = tl.load(SA + m[:, None] * (K // 16) + g[None, :])
    sb = tl.load(SB + n[:, None] * (K // 16) + g[None, :])
    tl.store(C + m[:, None] * N + n[None, :], tl.dot_scaled(a, sa, "e2m1", b, sb, "e2m1"))


def test_block_scaled_fp4():
    m, n, k = 64, 64, 128
    g = torch.Generator().manual_seed(0)
    level = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    level = torch.cat([level, -level])
    a, b = (torch.randint(0, 16, (r, k), generator=g) for r in (m, n))
    sa, sb = ((torch.rand(r, k // 16, generator=g) * 4 + 0.1).to(FLOATS["fp8e4nv"]) for r in (m, n))
    packed = [(x[:, ::2] | x[:, 1::2] << 4).to(torch.uint8) for x in (a, b)]
    c = torch.zeros(m, n)
    with gpu(120):
        _scaled_dot[(1,)](packed[0], sa, packed[1], sb, c, M=m, N=n, K=k)
    fa, fb = (x.float().repeat_interleave(16, 1) for x in (sa, sb))
    torch.testing.assert_close(c, (level[a] * fa) @ (level[b] * fb).T, rtol=1e-5, atol=1e-3)


@triton.jit
def _copy(X, Y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(Y + o, tl.load(X + o))


def test_out_of_bounds_is_caught():
    for x, y in ((128, 100), (100, 128)):
        with gpu(89), pytest.raises(PTXError, match="out of bounds"):
            _copy[(1,)](torch.zeros(x), torch.zeros(y), BLOCK=128)


def test_alignment_is_specialized_as_at_run_time():
    signature = {"X": "*fp32", "Y": "*fp32"}
    wide = compile_for(_copy, signature, {"BLOCK": 512}, 89).asm["ptx"]
    narrow = compile_for(_copy, signature, {"BLOCK": 512}, 89, aligned=False).asm["ptx"]
    assert "ld.global.v4" in wide and "ld.global.v4" not in narrow
    x, y = torch.randn(520), torch.zeros(512)
    with gpu(89):  # the launcher finds out that this view is not aligned
        _copy[(1,)](x[1:], y, BLOCK=512)
    assert torch.equal(x[1:513], y)


@triton.jit
def _divide(X, Y, Z, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x, y = tl.load(X + o), tl.load(Y + o)
    tl.store(Z + o, tl.div_rn(x, y) if EXACT else x / y)


def test_approximate_division_is_never_exact():
    """PTX lets div.full err in the last place: bit-exact kernels must not use it."""
    x, y = torch.rand(128) + 1, torch.rand(128) + 1
    exact, fast = torch.zeros(128), torch.zeros(128)
    with gpu(80):
        _divide[(1,)](x, y, exact, BLOCK=128, EXACT=True)
        _divide[(1,)](x, y, fast, BLOCK=128, EXACT=False)
    assert torch.equal(exact, x / y)
    assert (fast != exact).all()
    torch.testing.assert_close(fast, exact, rtol=1e-6, atol=0)


@triton.jit
def _round_up(X, Y, Z, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(Z + o, subtract_up(multiply_up(tl.load(X + o), tl.load(Y + o)), 8.0))


def test_rounding_up():
    """Never below the exact result, and no further from it than the next number."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(128, generator=g) * 2**12 for _ in range(2))
    x[:2], y[:2] = torch.tensor([-3.3e38, 2.0]), torch.tensor([1.0, 3.0])
    z = torch.zeros(128)
    with gpu(80):
        _round_up[(1,)](x, y, z, BLOCK=128)
    exact = x.double() * y.double() - 8
    above = torch.nextafter(torch.nextafter(exact.float(), x * 0 + torch.inf), x * 0 + torch.inf)
    assert (z.double() >= exact).all() and (z <= above).all() and z[1] == -2.0


@triton.jit
def _centre(X, M, Y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(Y + o, tl.load(X + o).to(tl.float32) - tl.load(M + o))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_arithmetic(dtype):
    """sm_120 subtracts a float32 from a half value in one instruction."""
    x, mean, y = torch.randn(512).to(dtype), torch.randn(512), torch.zeros(512)
    with gpu(120):
        _centre[(1,)](x, mean, y, BLOCK=512)
    assert torch.equal(y, x.float() - mean)


@triton.jit
def _dot_of_bytes(A, B, C, N: tl.constexpr, KIND: tl.constexpr):
    o = tl.arange(0, N)
    asm: tl.constexpr = f"dp4a.{KIND} $0, $1, $2, $3;"
    operands = (tl.load(A + o), tl.load(B + o), tl.load(C + o))
    c = tl.inline_asm_elementwise(asm, "=r,r,r,r", operands, tl.int32, is_pure=True, pack=1)
    tl.store(C + o, c)


@pytest.mark.parametrize("kind", ["s32.s32", "s32.u32", "u32.u32"])
def test_dot_of_bytes(kind):
    """Four products of bytes, each operand with its own sign; the sum wraps around."""
    dtypes = [torch.int8 if sign == "s32" else torch.uint8 for sign in kind.split(".")]
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (128, 4), generator=g).to(dtype) for dtype in dtypes)
    c = torch.randint(-(2**31), 2**31, (128,), generator=g).int()
    c[0], c[1], a[:2], b[:2] = 2**31 - 1, -(2**31), 127, 127
    want = (c.long() + (a.long() * b.long()).sum(1)).int()
    with gpu(80):
        _dot_of_bytes[(1,)](a.view(torch.int32), b.view(torch.int32), c, N=128, KIND=kind)
    assert torch.equal(c, want)


@triton.jit
def _histogram(X, H, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + o, mask=o < n, other=0)
    tl.atomic_add(H + x, 1, mask=o < n)


def test_atomics():
    x, h = torch.randint(0, 7, (300,), dtype=torch.int32), torch.zeros(7, dtype=torch.int32)
    with gpu(89):
        _histogram[(2,)](x, h, 300, BLOCK=256)
    assert torch.equal(h, torch.bincount(x, minlength=7).int())


@pytest.mark.parametrize(
    "missing,message",
    [
        ("wgmma.wait_group.sync.aligned", "is read before wgmma.wait_group"),
        ("fence.proxy.async", "before a fence.proxy.async"),
    ],
)
def test_asynchronous_products(missing, message):
    """Hopper's products run on by themselves: without the fence, or the wait, it is a race."""
    names = {"A": "*i8", "B": "*i8", "C": "*i32", "M": "i32", "N": "i32", "K": "i32"}
    with gpu(90):
        kernel = compile_for(_matmul, names, {"BM": 64, "BN": 64, "BK": 64}, 90)
    ptx, shared = kernel.asm["ptx"], kernel.metadata.shared
    a, b = (torch.randint(-9, 9, (64, 64), dtype=torch.int8) for _ in range(2))
    c = torch.zeros(64, 64, dtype=torch.int32)
    Machine(ptx).launch((1,), [a, b, c, 64, 64, 64], shared=shared)
    assert torch.equal(c, a.int() @ b.int().T)
    assert missing in ptx
    with pytest.raises(PTXError, match=message):
        broken = "".join(line for line in ptx.splitlines(True) if missing not in line)
        Machine(broken).launch((1,), [a, b, c, 64, 64, 64], shared=shared)


def test_missing_barrier_is_a_race():
    ptx = """.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k(.param .u64 k_param_0)
.reqntid 64
{
.reg .b32 %r<9>;
.reg .b64 %rd<4>;
mov.u32 %r1, %tid.x;
shl.b32 %r2, %r1, 2;
st.shared.b32 [%r2], %r1;
xor.b32 %r3, %r2, 128;
ld.shared.b32 %r4, [%r3];
ret;
}"""
    with pytest.raises(PTXError, match="race"):
        Machine(ptx).launch((1,), [np.zeros(1, np.int32)], shared=256)
    fenced = ptx.replace("xor.b32 %r3", "bar.sync 0;\nxor.b32 %r3")
    Machine(fenced).launch((1,), [np.zeros(1, np.int32)], shared=256)


#: One tile of [2, 64] bytes, swizzled, from a matrix to shared memory and out again.
_TILE = """
.visible .entry k(.param .align 64 .b8 k_param_0[128], .param .u64 k_param_1)
.reqntid 64
{
    ld.param.b64 %rd1, [k_param_1];
    mov.b64 %rd2, k_param_0;
    mov.u32 %r1, %tid.x;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared::cta.b64 [1024], 1;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [1024], 128;
    mov.b32 %r2, 64;
    mov.b32 %r3, 3;
    @%p1 COPY [0], [%rd2, {%r2, %r3}], [1024];
    {
        .reg .pred complete;
        waitLoop:
        mbarrier.try_wait.parity.shared.b64 complete, [1024], 0;
        @!complete bra.uni waitLoop;
    }
    shl.b32 %r4, %r1, 1;
    ld.shared.u16 %rs1, [%r4];
    cvt.u64.u32 %rd3, %r4;
    add.s64 %rd4, %rd1, %rd3;
    st.global.u16 [%rd4], %rs1;
    ret;
}
""".replace("COPY", "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes")
_AGAIN = next(line for line in _TILE.splitlines() if "cp.async" in line)


def _copied_tile(text):
    from ptxvm.bulk import TensorMap

    x = np.arange(4 * 100, dtype=np.uint8).reshape(4, 100)
    out = torch.zeros(128, dtype=torch.uint8)
    Machine(text).launch((1,), [TensorMap(x, (2, 64), 64), out], shared=1032)
    return x, out.numpy().reshape(2, 64)


def test_a_copied_tile_is_swizzled_and_zero_outside():
    x, out = _copied_tile(_TILE)
    want = np.zeros((2, 64), np.uint8)
    want[:1, :36] = x[3:, 64:]
    assert np.array_equal(out[0], want[0])  # the first 128 bytes are not flipped
    far = _TILE.replace("%r3, 3;", "%r3, 1;").replace("[0], [%rd2", "[128], [%rd2")
    far = far.replace("ld.shared.u16 %rs1, [%r4];", "ld.shared.u16 %rs1, [%r4+128];")
    x, out = _copied_tile(far)
    pieces = np.zeros((2, 64), np.uint8)
    pieces[:, :36] = x[1:3, 64:]
    assert np.array_equal(out, pieces.reshape(2, 4, 16)[:, [1, 0, 3, 2]].reshape(2, 64))


@pytest.mark.parametrize(
    "old,new,message",
    [
        ("[1024], 128;", "[1024], 256;", "deadlock: 0 arrivals and 128 bytes are missing"),
        ("complete, [1024], 0;", "complete, [1024], 1;", "before its copy was waited for"),
        ("@%p1 mbarrier.init.shared::cta.b64 [1024], 1;", "", "no mbarrier was initialized at"),
        ("@%p1 cp.async", "cp.async", "64 threads start the same copy"),
        ("[0], [%rd2", "[960], [%rd2", "which is no multiple of 128"),
        ("    ret;", f"{_AGAIN}\n ret;", "overwritten before a barrier"),
        ("    ret;", f"bar.sync 0;\n{_AGAIN}\n ret;", "still under way at the end"),
    ],
)
def test_copies_that_nobody_waits_for(old, new, message):
    assert old in _TILE
    text = _TILE.replace(old, new)
    with pytest.raises(PTXError, match=message):
        _copied_tile(text)
