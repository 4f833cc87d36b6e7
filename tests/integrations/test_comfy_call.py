"""Every form in which ComfyUI calls attention, without ComfyUI."""

from types import SimpleNamespace

import pytest
import torch

from sage_diffusion.attend.layer import AttentionRefused
from sage_diffusion.integrations.comfy import ModelAttention
from sage_diffusion.integrations.comfy.call import UnknownCall, parse_call
from sage_diffusion.integrations.comfy.model import FULL_PRECISION
from sage_diffusion.plan import PrecisionPlan, Rule

B, H, L, D = 2, 4, 160, 16


def tensor(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def host(
    q,
    k,
    v,
    heads,
    mask=None,
    attn_precision=None,
    skip_reshape=False,
    skip_output_reshape=False,
    **kwargs,
):
    """What ComfyUI's own attention computes of the same arguments."""
    if not skip_reshape:
        dim = q.shape[-1] // heads
        q, k, v = (x.reshape(x.shape[0], x.shape[1], -1, dim).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
        mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, scale=kwargs.get("scale"), enable_gqa=kwargs.get("enable_gqa", False)
    )
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def wrap_attn(override):
    """ComfyUI's wrapper: the override is asked where the caller passes `transformer_options`."""

    def call(*args, **kwargs):
        kwargs["_inside_attn_wrapper"] = True
        return override(host, *args, **kwargs)

    return call


def flat(heads=H, length=L, seed=0, dtype=torch.float32):
    return tensor(B, length, heads * D, seed=seed, dtype=dtype)


def split(heads=H, length=L, seed=0):
    return tensor(B, heads, length, D, seed=seed)


def transposed(seed):
    """Not contiguous, as Flux's and HunyuanVideo's values are."""
    x = tensor(B, L, H, D, seed=seed).transpose(1, 2)
    assert not x.is_contiguous()
    return x


OPTIONS = {"transformer_options": {"block_type": "double", "block_index": 0}}
CALLS = {
    "UNet: flat, heads positional, precision named": (
        (flat(), flat(seed=1), flat(seed=2), H),
        {"attn_precision": None},
    ),
    "SD3: flat, heads named, v with heads": (
        (flat(), flat(seed=1), tensor(B, L, H, D, seed=2)),
        {"heads": H},
    ),
    "Wan cross-attention: fewer keys": (
        (flat(), flat(length=77, seed=1), flat(length=77, seed=2)),
        {"heads": H},
    ),
    "Flux: heads first": (
        (split(), split(seed=1), transposed(2), H),
        {"skip_reshape": True},
    ),
    "HunyuanVideo refiner: nothing contiguous": (
        (transposed(0), transposed(1), transposed(2), H),
        {"skip_reshape": True, "mask": None},
    ),
    "heads first in and out": (
        (split(), split(seed=1), split(seed=2), H),
        {"skip_reshape": True, "skip_output_reshape": True},
    ),
    "flat in, heads first out": (
        (flat(), flat(seed=1), flat(seed=2), H),
        {"skip_output_reshape": True},
    ),
    "everything positional": (
        (split(), split(seed=1), split(seed=2), H, None, None, True, False),
        {},
    ),
    "scale": ((flat(), flat(seed=1), flat(seed=2), H), {"scale": 0.5}),
    "grouped queries, heads first": (
        (split(), split(2, seed=1), split(2, seed=2), H),
        {"skip_reshape": True, "enable_gqa": True},
    ),
    "grouped queries, flat": (
        (flat(), flat(2, seed=1), flat(2, seed=2), H),
        {"enable_gqa": True},
    ),
    "mask of keys": (
        (flat(), flat(seed=1), flat(seed=2), H, tensor(1, L, seed=3)),
        {},
    ),
    "mask of queries and keys": (
        (flat(), flat(seed=1), flat(seed=2), H),
        {"mask": tensor(L, L, seed=3)},
    ),
    "mask with batch": (
        (flat(), flat(seed=1), flat(seed=2), H),
        {"mask": tensor(B, L, L, seed=3)},
    ),
    "mask with batch, one row": (
        (flat(), flat(seed=1), flat(seed=2), H),
        {"mask": tensor(B, 1, L, seed=3)},
    ),
    "mask with heads": (
        (flat(), flat(seed=1), flat(seed=2), H),
        {"mask": tensor(B, H, L, L, seed=3)},
    ),
    "boolean mask": (
        (flat(), flat(seed=1), flat(seed=2), H),
        {"mask": tensor(B, 1, L, L, seed=3) > -1},
    ),
    "bfloat16": (
        (*(flat(seed=i, dtype=torch.bfloat16) for i in range(3)), H),
        {},
    ),
}


@pytest.fixture(params=CALLS, ids=str)
def call(request):
    args, kwargs = CALLS[request.param]
    return args, kwargs | OPTIONS


def total(attention):
    return attention.report().summary


def test_quantized_calls_equal_the_hosts_within_the_spec(call):
    args, kwargs = call
    attention = ModelAttention("int8/fp16")
    out = wrap_attn(attention.override)(*args, **kwargs)
    exact = host(*args, **kwargs)
    assert out.shape == exact.shape
    assert out.dtype == exact.dtype
    error = float((out - exact).float().norm() / exact.float().norm())
    # bfloat16 itself costs 2 to 3 parts in a thousand on both sides
    assert 0 < error < 0.02
    assert total(attention).specs == {"int8/fp16": 1}
    assert not total(attention).declined


def test_calls_left_alone_are_the_hosts_own_bit_for_bit(call):
    args, kwargs = call
    attention = ModelAttention("fp16")
    assert torch.equal(wrap_attn(attention.override)(*args, **kwargs), host(*args, **kwargs))
    assert total(attention).specs == {"fp16": 1}


def test_watched_calls_left_alone_are_the_hosts_own_too(call):
    events = []
    watch = SimpleNamespace(observe=events.append)
    args, kwargs = call
    attention = ModelAttention("fp16", observers=[watch])
    assert torch.equal(wrap_attn(attention.override)(*args, **kwargs), host(*args, **kwargs))
    event = events[-1]
    assert event.q.shape == (B, H, L, D)
    assert event.out.shape == (B, H, L, D)


def test_a_call_that_must_stay_precise_is_left_alone_even_in_strict():
    attention = ModelAttention("int8/fp16", strict=True)
    args = (flat(), flat(seed=1), flat(seed=2), H)
    out = wrap_attn(attention.override)(*args, low_precision_attention=False, **OPTIONS)
    assert torch.equal(out, host(*args))
    assert total(attention).declined == {FULL_PRECISION: 1}


class Container:
    """A wrapper of newer versions, which this pack has not asked for."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_a_call_of_an_unknown_form_goes_to_the_host_as_it_came():
    seen = []

    def newer(q, *args, **kwargs):
        seen.append(q)
        return q.tensor

    attention = ModelAttention("int8/fp16")
    box = Container(flat())
    assert attention.override(newer, box, box, box, H, **OPTIONS) is box.tensor
    assert seen == [box]
    assert total(attention).declined == {"q, k and v must be tensors, got Container": 1}
    with pytest.raises(AttentionRefused, match="must be tensors"):
        ModelAttention("int8/fp16", strict=True).override(newer, box, box, box, H)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((flat(), flat(), flat()), {}, "heads must be a positive int, got None"),
        ((flat(), flat(), flat(), 3), {}, "multiple of its 3 heads, got 64"),
        ((flat(), tensor(B, L, 70), flat(), H), {}, "k's width must be heads of 16, got 70"),
        ((split(), split(), split(), H), {}, "must have shape"),
        ((flat(), flat(), flat(), H), {"skip_reshape": True}, "must have 4 dims"),
        ((flat(), flat(2), flat(2), H), {}, "4 heads without enable_gqa, got 2"),
        ((flat(), flat(), flat(), H, 3.0), {}, "mask must be a tensor or None, got float"),
    ],
)
def test_what_is_wrong_with_a_call_is_said(args, kwargs, message):
    with pytest.raises(UnknownCall, match=message):
        parse_call(args, kwargs)


def test_views_are_taken_not_copies():
    q = flat()
    call = parse_call((q, q, q, H), {})
    assert call.q.data_ptr() == q.data_ptr()
    assert call.q.shape == (B, H, L, D)


def test_min_tokens_and_cross_attention_are_left_alone():
    plan = PrecisionPlan("fp16", (Rule("int8/fp16", min_tokens=128),))
    attention = ModelAttention(plan)
    short = flat(length=77, seed=1)
    wrap_attn(attention.override)(flat(), short, short, H, **OPTIONS)
    assert total(attention).specs == {"fp16": 1}
    crossing = ModelAttention("int8/fp16", keep_cross=True)
    wrap_attn(crossing.override)(flat(), short, short, H, **OPTIONS)
    assert total(crossing).specs == {"fp16": 1}


def test_the_previous_override_gets_what_is_left_alone_with_every_argument():
    seen = []

    def previous(func, *args, **kwargs):
        seen.append((args, kwargs))
        return func(*args, **kwargs)

    attention = ModelAttention("fp16")
    attention.previous = previous
    args = (flat(), flat(seed=1), flat(seed=2), H)
    wrap_attn(attention.override)(*args, scale=0.3, low_precision_attention=False, **OPTIONS)
    (given, named), *_ = seen
    assert given == args
    assert named["scale"] == 0.3
    assert named["low_precision_attention"] is False
    assert named["_inside_attn_wrapper"] is True


@pytest.mark.parametrize(
    ("queries", "keys", "context", "cross"),
    [
        (64, 64, 77, False),
        (64, 77, 77, True),  # a UNet's smallest maps have fewer tokens than a prompt
        (256, 77, 77, True),
        (256, 32, 77, True),  # tokens of a reference picture
        (64, 192, 77, False),  # a cached or causal past and the queries' own
        (77, 77, 77, False),
        (64, 192, None, True),
    ],
)
def test_cross_attention_means_other_tokens(queries, keys, context, cross):
    q, k = torch.zeros(1, queries, 32), torch.zeros(1, keys, 32)
    assert parse_call((q, k, k, 2), {}).cross(context) == cross


def test_keys_of_another_batch_are_cut_like_the_queries():
    """HyperTile cuts the queries into tiles and leaves keys and values whole."""
    q, k = flat().reshape(2 * B, L // 2, -1), flat(seed=1)
    call = parse_call((q, k, k, H), {})
    assert call.k.shape == call.v.shape == (2 * B, H, L // 2, D)
    ours = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v)
    sliced = k.view(2 * B, -1, H, D).transpose(1, 2)  # as ComfyUI's own functions read them
    theirs = torch.nn.functional.scaled_dot_product_attention(call.q, sliced, sliced)
    assert torch.equal(call.to_host(ours), theirs.transpose(1, 2).flatten(2))
