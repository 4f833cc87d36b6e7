"""Verification of the kernels of a packed past: right ones, faults, and a process that dies."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from sage_diffusion.kernels.kv import gluon, triton
from sage_diffusion.verify import packed_past, places


def test_right_kernels_on_the_emulator():
    found = packed_past.verify(places.emulated("sm_89"))
    assert [v.kernel for v in found] == list(packed_past.NAMES.values())
    assert [(v.status, v.reason, v.cases) for v in found] == [
        ("right", "", 6),
        ("right", "", 1),
        ("right", "", 2),
    ]
    assert all(0 < v.twin < 1e-3 for v in found[1:])


@pytest.fixture
def here():
    """The CPU as a card; kernels are replaced by the twin in Torch, right or wrong."""
    return dataclasses.replace(places.emulated("sm_80"), running=places.contextlib.nullcontext)


def test_faults_are_found(monkeypatch, here):
    twin = packed_past.reference.decode
    packing = packed_past.layout.pack_checked
    monkeypatch.setattr(triton, "pack", packing)
    monkeypatch.setattr(triton, "unpack", packed_past.layout.unpack)
    monkeypatch.setattr(triton, "merge", lambda out, lse: (out, lse))
    monkeypatch.setattr(gluon, "decode", twin)
    monkeypatch.setattr(triton, "decode", twin)
    assert [v.status for v in packed_past.verify(here)] == ["right"] * 3

    monkeypatch.setattr(triton, "pack", lambda codes, width: packing(codes, width) ^ 1)
    monkeypatch.setattr(gluon, "decode", lambda *args: [x * 1.01 for x in twin(*args)])
    monkeypatch.setattr(triton, "decode", lambda *args: 1 / 0)
    words, fast, plain = packed_past.verify(here)
    assert (words.status, words.reason) == ("wrong", "words of width 8 differ")
    assert fast.status == "wrong" and "from the twin, log-sum-exp" in fast.reason
    assert (plain.status, plain.reason) == ("failed", "division by zero")


def test_a_card_that_is_not_there_fails_every_kernel(here):
    card = dataclasses.replace(here, emulated=False, device=torch.device("cuda:7"))
    found = packed_past.verify(card)
    assert [v.status for v in found] == ["failed"] * 3
    assert all("its process ended with code 1" in v.reason for v in found)
