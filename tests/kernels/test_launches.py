"""How many launches a call takes: counted, not run, and the table of ``docs/kernels.md``."""

from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from recording import FakeCards, Launches, recorded
from torch._subclasses.fake_tensor import FakeTensorMode

from sage_diffusion import AttentionSpec, Rope
from sage_diffusion.attend import backends
from sage_diffusion.attend.calls import Call
from sage_diffusion.kernels.attention import gluon_support, tuning
from sage_diffusion.machine import triton_version

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"

#: Kernels that every quantized call starts: the sample, Q, K and V, the attention.
ALWAYS = 3

#: And delta-S of a smoothed Q.
DELTA_S = 1

#: By backend, card and spec, of 24 heads, 4096 tokens, head dim 128.
CALLS = {
    ("triton", "sm_89", "int8/fp16"): ALWAYS,
    ("triton", "sm_89", "int8/int8"): ALWAYS,
    ("triton", "sm_89", "int8/fp8"): ALWAYS,
    ("triton", "sm_89", "int8/fp8-fast"): ALWAYS,
    ("triton", "sm_100", "fp4/fp8-fast"): ALWAYS + DELTA_S,
    ("triton", "sm_100", "fp4/fp4"): ALWAYS + DELTA_S,
    ("hopper", "sm_90", "int8/fp8"): ALWAYS,
    ("gluon", "sm_89", "int8/int8"): ALWAYS,
    ("gluon", "sm_89", "int8/fp8-fast"): ALWAYS,
    ("gluon", "sm_89", "int4/int8"): ALWAYS + DELTA_S,
    ("gluon", "sm_89", "int4/int8-tile_v"): ALWAYS + DELTA_S,
    ("gluon", "sm_89", "int4/fp8-fast"): ALWAYS + DELTA_S,
    ("gluon", "sm_120", "fp4/fp8-fast"): ALWAYS + DELTA_S,
    ("gluon", "sm_120", "fp4/fp4"): ALWAYS + DELTA_S,
}


def launches(
    backend: str,
    arch: str,
    spec: str,
    tokens: int = 4096,
    dtype: torch.dtype = torch.float16,
    device: str = "meta",
    **options,
) -> Launches:
    """Of one call; its tensors have no values, so whoever looked at one would fail."""
    if backend != "triton" and triton_version() < gluon_support.TRITON_VERSION:
        pytest.skip("this Triton has no Gluon that the kernels are written in")
    record = next(b for b in backends.BACKENDS if b.name == backend)
    q, k, v = (torch.empty(1, 24, tokens, 128, dtype=dtype, device=device) for _ in range(3))
    return_lse = options.pop("return_lse", False)
    compute = backends.load(record)
    with mock.patch.object(tuning, "architecture", lambda device: arch), recorded() as found:
        compute(Call(q, k, v, **options), AttentionSpec.parse(spec), return_lse)
    return found


@pytest.mark.parametrize(("backend", "arch", "spec"), CALLS)
def test_launches_of_a_call(backend, arch, spec):
    found = launches(backend, arch, spec)
    joined = ["aminmax"] if spec.endswith("-tile_v") else []
    assert (len(found.triton), found.torch) == (CALLS[backend, arch, spec], joined)
    row = f"| {backend} | `{spec}` | {len(found.triton)} | {len(joined)} |"
    assert row in DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize(("backend", "arch", "spec"), CALLS)
def test_one_part_of_the_statistics_is_joined_by_nobody(backend, arch, spec):
    assert launches(backend, arch, spec, tokens=128).torch == []


def test_what_an_option_adds():
    def more(call, **options):
        plain, found = launches(*call), launches(*call, **options)
        triton = list(found.triton)
        for name in plain.triton:
            triton.remove(name)
        torch_ = list(found.torch)
        for name in plain.torch:
            torch_.remove(name)
        return triton, torch_

    keys = torch.empty(1, 1, 1, 4096, dtype=torch.bool, device="meta")
    rows = torch.empty(1, 1, 4096, 4096, dtype=torch.bool, device="meta")
    plain, int4 = ("triton", "sm_89", "int8/fp8"), ("gluon", "sm_89", "int4/fp8-fast")
    assert more(plain, mask=keys) == more(plain, mask=rows) == ([], [])
    unaligned = torch.empty(1, 1, 4096, 4097, dtype=torch.bool, device="meta")[..., 1:]
    assert more(plain, mask=unaligned) == ([], ["constant_pad_nd"])
    assert more(plain, scale=-0.1) == ([], ["neg"])
    assert more(int4, mask=keys) == ([], [])  # joins delta-S
    assert more(("gluon", "sm_89", "int8/int8"), mask=keys) == (["_bias_kernel"], [])
    assert more(int4, mask=rows) == (["_pack_kernel"], [])
    assert more(int4, is_causal=True) == ([], [])


def test_delta_s_of_a_long_call_comes_in_parts():
    found = launches("gluon", "sm_89", "int4/fp8-fast", tokens=32768)
    assert found.triton.count("_bias_kernel") == found.triton.count("attention_kernel") == 13
    assert found.torch == []


KINDS = [
    {},
    {"dtype": torch.float32, "is_causal": True, "scale": -0.1, "return_lse": True},
    {"mask": torch.bool, "rope_q": True, "rope_k": True},
    {"mask": torch.float32, "return_lse": True},
    {"key_mask": torch.float16, "rope_k": True},
]


def options_of(kind, device):
    """Masks and tables of a kind of call, as tensors."""
    options = dict(kind)
    for name in ("mask", "key_mask"):
        if name in options:
            rows = 4096 if name == "mask" else 1
            dtype = options.pop(name)
            options["mask"] = torch.empty(1, 1, rows, 4096, dtype=dtype, device=device)
    for name in ("rope_q", "rope_k"):
        if options.get(name):
            tables = (torch.empty(4096, 128, device=device) for _ in range(2))
            options[name] = Rope(*tables)
    return options


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize(("backend", "arch", "spec"), CALLS)
def test_the_host_waits_for_nothing(backend, arch, spec, kind):
    found = launches(backend, arch, f"{spec}+smooth_v", **options_of(KINDS[kind], "meta"))
    assert found.triton and found.waits == []


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize(("backend", "arch", "spec"), CALLS)
def test_every_launch_is_on_its_tensors_card(backend, arch, spec, kind):
    """The second card of two, and the first one is current."""
    options = {**KINDS[kind], "return_lse": False}  # that part is Torch's, which looks itself
    with FakeTensorMode():
        found = launches(backend, arch, spec, device="cuda:1", **options_of(options, "cuda:1"))
    assert found.triton and found.elsewhere == []
    assert FakeCards.current == 0
