"""Judging a compressed past of a small Llama against the exact one."""

import pytest
import torch
from test_transformers_kv_calibration import ids, llama

from sage_diffusion.integrations.transformers.kv_evaluate import Passage, judge, passage
from sage_diffusion.kv.evaluate import agreement, needle_prompt
from sage_diffusion.kv.methods.kivi import Kivi
from sage_diffusion.kv.methods.lossless import Lossless
from sage_diffusion.kv.methods.prefixkv import PrefixKV


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def text(model, tmp_path_factory):
    return passage(model, ids(256), 224, tmp_path_factory.mktemp("kept"))


def judged(model, text, method):
    return judge(model, text, method, sink=8, window=24, scored=31)


def test_an_exact_past_agrees_with_itself(model, text):
    found = judged(model, text, Lossless()).agreement
    assert found.kl < 1e-9 and found.top1 == 1
    assert found.perplexity == pytest.approx(found.exact_perplexity)


def test_fewer_bits_agree_less_and_are_counted(model, text):
    rows = [judged(model, text, Kivi(bits, bits, group=16)) for bits in (8, 4, 2)]
    # 16 channels fill words of 32, and have a step and a zero of 16 bits each.
    assert [row.bits.body for row in rows] == pytest.approx([18, 10, 6])
    errors = [row.agreement.kl for row in rows]
    assert errors == sorted(errors) and errors[0] > 0
    assert rows[0].bits.all_in(4096) == pytest.approx((18 * (4096 - 32) + 16 * 32) / 4096)


def test_eviction_is_judged_by_attending(model, text):
    half, most = (judged(model, text, PrefixKV(kept)).agreement.kl for kept in (0.5, 0.95))
    assert half > most > 0


def test_a_kept_passage_is_read_again(model, tmp_path, monkeypatch):
    made = passage(model, ids(100), 80, tmp_path)
    monkeypatch.setattr(type(model), "forward", None)
    again = passage(model, ids(100), 80, tmp_path)
    for name in ("k", "v", "q", "logits"):
        assert torch.equal(getattr(made, name), getattr(again, name))
    assert isinstance(again, Passage) and again.prefix == 80


def test_agreement_is_a_divergence_from_the_exact():
    exact = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 0.0]])
    other = torch.tensor([[0.0, 1.0, 2.0], [0.0, 2.0, 0.0]])
    found = agreement(other, exact, torch.tensor([2, 0]))
    p, q = exact[1].softmax(0), other[1].softmax(0)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum()) / 2, rel=1e-5)
    assert found.top1 == 0.5 and found.perplexity > found.exact_perplexity


def test_a_needle_lies_at_its_depth():
    got = needle_prompt(torch.zeros(10, dtype=torch.int64), torch.tensor([7, 8]), 0.3)
    assert got.tolist() == [0, 0, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0]
