"""Fixtures of every test."""

import functools

import pytest
import torch

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``make compiled`` says which Triton it put on the path."""
    parser.addoption("--triton", help="stop if another version of Triton is imported")
    parser.addoption("--pipeline-runs", type=int, default=24, help="of test_diffusers_many_runs.py")


def pytest_configure(config: pytest.Config) -> None:
    wanted = config.getoption("--triton")
    if wanted is not None:
        import triton

        if triton.__version__ != wanted:
            raise pytest.UsageError(f"triton must be {wanted}, found {triton.__version__}")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN (or the largest integer), so that an unwritten output cannot pass."""

    def poison(make):
        @functools.wraps(make)
        def poisoned(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.device.type == "meta" or not out.numel():
                return out
            if out.dtype.is_floating_point and out.element_size() == 1:
                out.view(torch.uint8).fill_(0x7F)  # NaN of E4M3 and of E5M2
            elif out.dtype.is_floating_point:
                out.fill_(float("nan"))
            elif out.dtype in _INTEGERS:
                out.fill_(torch.iinfo(out.dtype).max)
            return out

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
