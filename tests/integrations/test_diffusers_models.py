"""Every model class of diffusers that a config can build: all its attention comes through us."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import diffusers
import pytest
import torch
from integrations.tiny_models import MODELS, build
from torch import Tensor, nn

from sage_diffusion import AttentionSession
from sage_diffusion.integrations.diffusers import apply

# Masks its attention by FlexAttention's block masks.
_FLEX = ("AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel")
# Pools text, or kinds of control, by attention in a module without a processor.
_POOLING = {"HunyuanDiT2DModel": 1, "MochiTransformer3DModel": 1, "ControlNetUnionModel": 1}


def made(name: str) -> nn.Module:
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    try:
        return build(name)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])


def outputs(model: nn.Module, name: str) -> list[Tensor]:
    inputs = MODELS[name][1]()  # some models write into theirs
    if "return_dict" in inspect.signature(type(model).forward).parameters:
        inputs["return_dict"] = False
    torch.manual_seed(0)
    with torch.no_grad():
        return list(tensors(model(**inputs)))


def tensors(value: Any):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors(each)


def attention_calls(model: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch) -> int:
    calls: Counter[str] = Counter()
    real = torch.nn.functional.scaled_dot_product_attention

    def counting(*args, **kwargs):
        calls["sdpa"] += 1
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
        outputs(model, name)
    return calls["sdpa"]


@pytest.mark.parametrize("name", list(MODELS))
def test_all_attention_is_routed_and_given_back(name, monkeypatch):
    model = made(name)
    plain = outputs(model, name)
    assert plain and all(out.isfinite().all() for out in plain)
    expected = attention_calls(model, name, monkeypatch) - _POOLING.get(name, 0)

    with apply(model, AttentionSession("fp16")) as patch:
        same = outputs(model, name)
        summary = patch.summary()
    if name in _FLEX:
        assert summary.calls > expected  # FlexAttention never reaches PyTorch's function
    else:
        assert summary.calls == expected > 0
    assert not summary.declined
    for got, wanted in zip(same, plain, strict=True):
        assert torch.equal(got, wanted)

    with apply(model, AttentionSession("int8/fp8")) as patch:
        quantized = outputs(model, name)
        summary = patch.summary()
    if name in _FLEX:
        assert set(summary.declined) == {"a mask of type BlockMask"}
    else:
        assert summary.quantized == summary.calls, summary.declined
    changed = any(not torch.equal(a, b) for a, b in zip(quantized, plain, strict=True))
    assert changed == (summary.quantized > 0)
    for got, wanted in zip(quantized, plain, strict=True):
        error = (got - wanted).norm() / wanted.norm().clamp_min(1e-6)
        assert error < 0.1

    for got, wanted in zip(outputs(model, name), plain, strict=True):
        assert torch.equal(got, wanted)


def test_the_table_covers_the_families():
    assert len(MODELS) >= 84
