import dataclasses
import math
from importlib import metadata

import pytest
import torch

from sage_diffusion import AttentionSession, AttentionSpec, PrecisionPlan, Rule
from sage_diffusion.accuracy.compare import (
    Generation,
    LayerAccuracy,
    compare,
    end_to_end,
    reference_run,
)
from sage_diffusion.accuracy.metrics import tensor_metrics
from sage_diffusion.attend.rows import exact_attention

STEPS, LAYERS = 4, ("blocks.0", "blocks.1")


def qkv(seed: int = 0, q_len: int = 70, k_len: int = 90, heads: int = 4, kv_heads: int = 2):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, heads, q_len, 32), (2, kv_heads, k_len, 32), (2, kv_heads, k_len, 32))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def sample(session: AttentionSession, skip: tuple[str, int] | None = None) -> Generation:
    """A toy sampler: two layers of self-attention integrate a latent over four steps."""
    x = torch.randn(2, 2, 80, 32, generator=torch.Generator().manual_seed(0))
    latents = []
    session.start(STEPS)
    for step in range(STEPS):
        session.begin_step(step)
        for name in LAYERS:
            if (name, step) != skip:
                x = x + 0.5 * session.layer(name)(x, x, x)
        latents.append(x.clone())
    session.finish()
    return Generation(torch.sigmoid(x[:, :1]), tuple(latents), ("one", "two"))


def test_observer_measures_the_output_that_ran() -> None:
    q, k, v = (x.half() for x in qkv())
    observer = LayerAccuracy()
    session = AttentionSession("int4/fp8-fast", observers=[observer])
    with session.at(0.25, step=3, branch="uncond"):
        out = session.attend("blocks.0", q, k, v, is_causal=True)
    (row,) = observer.rows
    expected = tensor_metrics(out, exact_attention(q, k, v, is_causal=True))
    assert (row.cosine, row.rel_l1, row.rmse, row.max_abs) == tuple(expected)
    assert 0.01 < row.rel_l1 < 0.3
    assert (row.layer, row.step, row.progress, row.branch) == ("blocks.0", 3, 0.25, "uncond")
    assert str(row.spec) == "int4/fp8-fast"


def test_sampled_rows_estimate_the_whole_call_and_are_drawn_anew() -> None:
    q, k, v = qkv(q_len=200, k_len=60, heads=2)
    whole, some = LayerAccuracy(), LayerAccuracy(rows=48, seed=3)
    session = AttentionSession("int4/fp8-fast", observers=[whole, some])
    for _ in range(2):
        session.attend("a", q, k, v)
    first, second = some.rows
    assert first.rel_l1 == pytest.approx(whole.rows[0].rel_l1, rel=0.1)
    assert first.rel_l1 != whole.rows[0].rel_l1 and first.rel_l1 != second.rel_l1
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        LayerAccuracy(rows=0)


def test_compare_reports_each_call_and_the_result() -> None:
    plan = PrecisionPlan(
        AttentionSpec.parse("int4/fp8-fast"),
        (Rule("fp16", "*.1", 0.0, 0.5), Rule("int8/fp8", "*", 0.5, 1.0)),
    )
    report = compare(sample, plan)
    assert len(report.rows) == STEPS * len(LAYERS) == report.summary["calls"]
    specs = {key: str(rows[0].spec) for key, rows in report.cells().items()}
    assert specs["blocks.1", 0] == "fp16" and specs["blocks.0", 0] == "int4/fp8-fast"
    assert specs["blocks.1", 3] == specs["blocks.0", 3] == "int8/fp8"
    by_spec = {str(row.spec): row.rel_l1 for row in report.rows}
    assert by_spec["fp16"] == 0 < by_spec["int8/fp8"] < by_spec["int4/fp8-fast"]
    end = report.end_to_end
    assert end.labels == ("one", "two") and len(end.latent_cosine) == STEPS
    assert all(15 < value < 60 for value in end.psnr) and all(0.5 < x < 1 for x in end.ssim)
    assert end.latent_cosine[0] > 0.99 and end.latent_cosine[-1] < 1
    assert report.environment["backends"] == "native, reference"
    assert report.environment["torch"] == metadata.version("torch")
    assert report.plan == plan and report.name == "int4/fp8-fast with rules"
    assert [picture.label for picture in report.pictures] == ["one", "two"]
    assert report.variants[0].psnr == end.mean_psnr
    assert "blocks.1" in report.to_html() and "blocks.1" in report.to_markdown()


def test_compare_of_fp16_is_exact() -> None:
    report = compare(sample, "fp16")
    assert report.quantized == () and set(report.end_to_end.psnr) == {math.inf}
    assert set(report.end_to_end.ssim) == {1.0}


def test_compare_is_deterministic_and_takes_a_reference() -> None:
    runs = []

    def counted(session: AttentionSession) -> Generation:
        runs.append(str(session.plan.default))
        return sample(session)

    exact = reference_run(counted)
    first = compare(counted, "int8/fp8", reference=exact, rows=16)
    second = compare(counted, "int8/fp8", rows=16)
    assert first == second
    assert runs == ["fp16", "int8/fp8", "fp16", "int8/fp8"]


def test_cells_that_a_cache_skips_stay_unknown() -> None:
    def cached(session: AttentionSession) -> Generation:
        return sample(session, skip=("blocks.1", 2))

    report = compare(cached, "int8/fp8")
    assert ("blocks.1", 2) not in report.cells() and ("blocks.1", 1) in report.cells()
    assert "blocks.1, step 2: did not run" in report.to_html()


def test_a_call_that_fell_back_is_no_quantized_row() -> None:
    observer = LayerAccuracy()
    session = AttentionSession("int8/fp8", observers=[observer])
    q, k, v = qkv()
    q.requires_grad_()
    session.attend("a", q, k, v)
    assert [str(row.spec) for row in observer.rows] == ["fp16"]
    assert session.summary().declined


def test_compare_without_any_call_or_with_unequal_runs_is_an_error() -> None:
    with pytest.raises(ValueError, match="no attention call reached the session"):
        compare(lambda session: Generation(), "int8/fp8")
    exact = Generation(torch.zeros(1, 3, 16, 16), (torch.ones(1, 4),))
    with pytest.raises(ValueError, match="same pictures, got None and"):
        end_to_end(Generation(None, exact.latents), exact)
    with pytest.raises(ValueError, match="same steps, got 0 and 1"):
        end_to_end(dataclasses.replace(exact, latents=()), exact)


def test_tiny_pictures_have_no_ssim() -> None:
    exact = Generation(torch.zeros(1, 3, 8, 8))
    found = end_to_end(Generation(torch.full((1, 3, 8, 8), 0.1)), exact)
    assert found.ssim == (None,) and found.psnr == pytest.approx((20.0,))
    assert found.mean_ssim is None and found.labels == ("0",)
