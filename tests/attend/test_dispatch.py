import dataclasses

import pytest
import torch
import torch.nn.functional as F

from sage_diffusion import LADDER, AttentionSpec, BackendUnavailable, attention, machine
from sage_diffusion.attend import backends, providers
from sage_diffusion.attend.backends import select
from sage_diffusion.attend.calls import AttentionCall


def qkv(heads=4, kv_heads=2, q_len=70, k_len=50, dim=40, dtype=torch.float32):
    torch.manual_seed(0)
    q = torch.randn(2, heads, q_len, dim, dtype=dtype)
    k, v = (torch.randn(2, kv_heads, k_len, dim, dtype=dtype) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", LADDER)
def test_every_spec_of_the_ladder_runs_on_the_cpu(spec, dtype):
    q, k, v = qkv(dtype=dtype)
    out = attention(q, k, v, spec)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    assert out.shape == q.shape and out.dtype == dtype
    cosine = F.cosine_similarity(out.double().flatten(), exact.flatten(), 0)
    assert cosine > (0.98 if spec.startswith(("int4", "fp4")) else 0.999)


def test_log_sum_exp_is_natural_and_of_the_true_scores():
    q, k, v = qkv(heads=2)
    k = k + 3.0  # smooth_k takes this away and must give it back
    _, lse = attention(q, k, v, "int8/fp8", return_lse=True)
    exact = torch.logsumexp(q.double() @ k.double().transpose(2, 3) / 40**0.5, -1)
    torch.testing.assert_close(lse.double(), exact, rtol=0, atol=0.05)
    assert lse.dtype == torch.float32 and lse.shape == (2, 2, 70)


@pytest.mark.parametrize("spec", ["int8/fp16", "int8/int8", "int4/fp8-fast", "fp4/fp4"])
def test_masks_of_every_broadcastable_shape(spec):
    q, k, v = qkv()
    for shape in [
        (50,),
        (1, 50),
        (70, 50),
        (4, 1, 50),
        (2, 1, 1, 50),
        (2, 4, 70, 50),
        (2, 1, 70, 1),
    ]:
        torch.manual_seed(1)
        keep = torch.rand(shape) > 0.3
        bias = torch.where(keep, torch.randn(shape), float("-inf"))
        for mask in (keep, bias, bias.half()):
            out, lse = attention(q, k, v, spec, mask=mask, return_lse=True)
            exact, true_lse = attention(q, k, v, "fp16", mask=mask, return_lse=True)
            assert F.cosine_similarity(out.flatten(), exact.flatten(), 0) > 0.98
            empty = torch.isneginf(true_lse)
            assert torch.equal(torch.isneginf(lse), empty)
            assert not out[empty].any()


def test_a_fully_masked_row_gives_zero_and_a_row_of_finfo_min_the_mean():
    q, k, v = qkv(q_len=3)
    mask = torch.ones(3, 50, dtype=torch.bool)
    mask[1] = False
    for spec in LADDER[1:]:
        assert not attention(q, k, v, spec + "+smooth_v" * ("fp8" in spec), mask=mask)[
            :, :, 1
        ].any()
    bias = torch.zeros(3, 50)
    bias[1] = torch.finfo(torch.float32).min
    out = attention(q, k, v, "int8/fp16", mask=bias)[:, :, 1]
    torch.testing.assert_close(out, v.mean(2).repeat_interleave(2, 1), rtol=0, atol=1e-3)


def test_causal_follows_pytorch_and_joins_a_mask():
    q, k, v = qkv(heads=2)
    out = attention(q, k, v, "int8/fp8", is_causal=True)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert F.cosine_similarity(out.flatten(), exact.flatten(), 0) > 0.999
    keep = torch.rand(70, 50) > 0.2
    both = attention(q, k, v, "int8/fp8", is_causal=True, mask=keep)
    joined = attention(q, k, v, "int8/fp8", mask=keep & torch.ones(70, 50).bool().tril())
    assert torch.equal(both, joined)


@pytest.mark.parametrize("spec", LADDER[1:])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e4, 3e38])
def test_finite_in_gives_finite_out(spec, size):
    q, k, v = (x * size for x in qkv())
    v = v.clamp(-1e30, 1e30)
    assert attention(q, k, v, spec).isfinite().all()


@pytest.mark.parametrize("spec", LADDER)
def test_no_input_is_changed(spec):
    tensors = qkv()
    before = [x.clone() for x in tensors]
    attention(*tensors, spec)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_strided_inputs():
    q, k, v = (torch.randn(2, 50, 4, 40).transpose(1, 2) for _ in range(3))
    assert not q.is_contiguous()
    for spec in LADDER:
        out = attention(q, k, v, spec)
        # The means of strided tensors are summed in another order: a code may differ by one.
        same = attention(*(x.contiguous() for x in (q, k, v)), spec)
        assert F.cosine_similarity(out.flatten(), same.flatten(), 0) > 0.9999


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"q must have shape \[B, H, L, D\], got \(4, 70, 40\)"),
        (lambda q, k, v: (q, k[..., :8], v), r"k must have shape .* B=2, D=40, got"),
        (lambda q, k, v: (q, k, v[:, :, :9]), "v must have k's shape"),
        (lambda q, k, v: (q[:, :3], k, v), "multiple of k's, got 3 and 2"),
        (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), "must not be empty"),
        (lambda q, k, v: (q, k.to("meta"), v), "on one device"),
    ],
)
def test_wrong_shapes_say_what_must_hold(change, message):
    with pytest.raises(ValueError, match=message):
        attention(*change(*qkv()), "int8/fp8")


def test_wrong_types_masks_and_names():
    q, k, v = qkv()
    with pytest.raises(TypeError, match="one dtype"):
        attention(q, k.half(), v, "int8/fp8")
    with pytest.raises(TypeError, match=r"float16, bfloat16 or float32, got torch\.float64"):
        attention(q.double(), k.double(), v.double())
    with pytest.raises(ValueError, match="mask must be broadcastable"):
        attention(q, k, v, mask=torch.ones(3, 50).bool())
    with pytest.raises(TypeError, match="mask must be boolean or floating"):
        attention(q, k, v, mask=torch.ones(50).int())
    with pytest.raises(ValueError, match="the ladder is"):
        attention(q, k, v, "int3/fp8")
    with pytest.raises(ValueError, match="backend must be one of auto"):
        attention(q, k, v, backend="cuda")
    with pytest.raises(RuntimeError, match="forward only"):
        attention(q.requires_grad_(), k, v)
    with pytest.raises(TypeError, match="unexpected keyword"):
        attention(q, k, v, attn_mask=None)


def test_a_named_backend_that_cannot_run_lists_its_reason():
    q, k, v = qkv()
    with pytest.raises(BackendUnavailable, match="triton: needs a CUDA or ROCm device") as caught:
        attention(q, k, v, "int8/fp8", backend="triton")
    assert list(caught.value.reasons) == ["triton"]


def gpu_call(spec, capability=(8, 9), **changes):
    call = AttentionCall.typical(AttentionSpec.parse(spec), "cpu", tokens=1024)
    fields = {"device": "cuda", "dtype": torch.float16, "capability": capability, **changes}
    return dataclasses.replace(call, **fields)


@pytest.fixture
def packages(monkeypatch):
    versions = {}
    monkeypatch.setattr(providers, "installed", versions.get)
    monkeypatch.setattr(machine, "triton_version", lambda: (3, 9))
    select.cache_clear()
    yield versions
    select.cache_clear()


def test_auto_on_a_gpu_takes_our_kernels_and_never_the_twin(packages):
    assert select(gpu_call("int8/fp8")).name == "triton"
    assert select(gpu_call("fp16")).name == "sdpa"
    with pytest.raises(BackendUnavailable, match="reference: only by name") as caught:
        select(gpu_call("int8/fp8", capability=(7, 5)))
    assert set(caught.value.reasons) >= {"triton", "sageattention", "comfy_kitchen", "sdpa"}
    assert select(gpu_call("int8/fp8", capability=(7, 5)), "reference").name == "reference"


def test_turing_is_served_by_a_provider_where_one_is_installed(packages):
    packages["comfy_kitchen"] = "0.2.40"
    spec = "int8/int8-smooth_v-balance-tile_v"
    assert select(gpu_call(spec, capability=(7, 5))).name == "comfy_kitchen"
    assert "not causal" in backends.refusals(gpu_call(spec, is_causal=True))["comfy_kitchen"]
    assert f"{spec}, not int8/int8" in backends.refusals(gpu_call("int8/int8"))["comfy_kitchen"]


def test_sageattention_serves_only_what_equals_the_spec(packages):
    packages["sageattention"] = "1.0.6"
    first = "int8/fp16-rotate-balance+block"
    assert select(gpu_call(first), "sageattention").name == "sageattention"
    refuse = lambda call: backends.refusals(call)["sageattention"]  # noqa: E731
    assert f"computes {first}" in refuse(gpu_call("int8/fp16+block"))
    assert "drops masks" in refuse(gpu_call(first, mask="bool"))
    packages["sageattention"] = "2.2.0"
    assert refuse(gpu_call("int8/fp8-fast-rotate-balance")) is None
    assert "not int8/fp8-fast" in refuse(gpu_call("int8/fp8-fast"))
    assert "sm_89 and sm_120" in refuse(gpu_call("int8/fp8-fast-rotate-balance", capability=(9, 0)))
    assert "not int4/int8" in refuse(gpu_call("int4/int8"))


def test_the_operator_has_a_correct_fake(qkv_shape=(1, 2, 9, 16)):
    q = torch.randn(qkv_shape)
    for return_lse in (False, True):
        torch.library.opcheck(
            torch.ops.sage_diffusion.attention.default,
            (q, q, q, None, "int8/fp8", False, None, "reference", return_lse),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_attention_compiles_without_a_break():
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, "int8/fp8") * 2, fullgraph=True, backend="eager"
    )
    tensors = qkv()
    assert torch.equal(compiled(*tensors), attention(*tensors, "int8/fp8") * 2)
