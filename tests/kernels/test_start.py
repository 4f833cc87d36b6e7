"""Starting a kernel for the second time: what is told apart, and that Triton is not asked again."""

from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from ptxvm import gpu  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from sage_diffusion.kernels import start  # noqa: E402
from sage_diffusion.kernels.start import start_kernel  # noqa: E402


@triton.jit
def _axpy(p_x, p_y, n, a, BLOCK: tl.constexpr, SQUARE: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x + o, mask=o < n, other=0.0).to(tl.float32)
    if SQUARE:
        x = x * x
    y = tl.zeros_like(x)
    if p_y is not None:
        y = tl.load(p_y + o, mask=o < n, other=0.0)
    tl.store(p_x + o, (a * x + y).to(p_x.dtype.element_ty), mask=o < n)


@pytest.fixture
def asked():
    """How often Triton looked at a launch's arguments."""
    count = []
    run = JITFunction.run

    def counted(self, *args, **kwargs):
        count.append(self)
        return run(self, *args, **kwargs)

    with mock.patch.object(JITFunction, "run", counted):
        yield count


def axpy(x, y, a, square=False, n=None):
    want = a * (x.float() ** 2 if square else x.float()) + (0 if y is None else y)
    n = len(x) if n is None else n
    start_kernel(_axpy, (2,), x, y, n, a, BLOCK=64, SQUARE=square, num_warps=1)
    torch.testing.assert_close(x[:n], want[:n].to(x.dtype))


def test_triton_is_asked_once_a_variant(asked):
    storage = torch.randn(200)
    y = torch.randn(100)
    variants = [
        lambda: axpy(torch.randn(100), y, 2.0),
        lambda: axpy(torch.randn(100), y, 2.0, square=True),
        lambda: axpy(torch.randn(100), None, 2.0),
        lambda: axpy(torch.randn(100).half(), y, 2.0),
        lambda: axpy(storage[1:101], y, 2.0),  # no longer aligned to 16 bytes
        lambda: axpy(torch.randn(100), y, 2.0, n=96),  # 16 divides it
        lambda: axpy(torch.randn(100), y, 2.0, n=1),
        lambda: axpy(torch.randn(100), y, 2, n=96),  # a whole number
    ]
    with gpu(89) as driver:
        for number, variant in enumerate(variants, 1):
            for _ in range(3):
                variant()
            assert len(asked) == number
        axpy(torch.randn(100), torch.randn(100), -0.5)  # values change nothing
        assert len(asked) == len(variants)
        assert driver.launches[-1] == ("_axpy", (2, 1, 1))
    with gpu(80):
        variants[0]()
    assert len(asked) == len(variants) + 1


@triton.jit
def _scaled(p_x, BLOCK: tl.constexpr, BY: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_x + o, tl.load(p_x + o) * BY)


def test_a_constant_that_is_a_float_has_a_kernel_of_its_own():
    with gpu(89):
        for by in (2.0, 3.0, 2.0):
            x = torch.ones(32)
            start_kernel(_scaled, (1,), x, BLOCK=32, BY=by, num_warps=1)
            assert (x == by).all()


def test_the_table_does_not_grow_without_end(asked, monkeypatch):
    monkeypatch.setattr(start, "_KEPT", 12)
    with gpu(90):
        for n in range(2, 22):
            axpy(torch.randn(100), None, 1.5, n=n)
        assert len(start.table_of(_axpy)) <= 12
        known = len(asked)
        axpy(torch.randn(100), None, 1.5, n=21)
    assert known == 20 and len(asked) == known


def test_what_is_no_compiled_kernel_of_cuda_goes_through_triton(asked, monkeypatch):
    class Interpreted:
        calls = 0

        def __getitem__(self, grid):
            assert grid == (3,)

            def run(*args, **options):
                self.calls += 1
                assert (args, options) == ((1,), {"X": 2})

            return run

    kernel = Interpreted()
    start_kernel(kernel, (3,), 1, X=2)
    assert kernel.calls == 1
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with gpu(120):
        for _ in range(3):
            axpy(torch.randn(100), None, 2.0)
    assert len(asked) == 3
