"""Fixtures of every test."""

import functools

import pytest
import torch

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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
