"""The benchmark: on the CPU, by the twin and a fake clock."""

import ast
import contextlib
import json
import types

import pytest
import torch

from sage_diffusion import LADDER, AttentionSpec, cli
from sage_diffusion.attend import backends
from sage_diffusion.kernels.attention import reference
from sage_diffusion.speed import bench, timing
from sage_diffusion.speed.bench import Contestant, contestants, measure
from sage_diffusion.speed.timing import Card, CudaTimer, Timing

CPU = {"device": "cpu", "dtype": torch.float32, "heads": 2}


class FakeTimer:
    """Every call takes 1, 2 or 9 milliseconds."""

    def __init__(self):
        self.calls = 0

    def __call__(self, call):
        self.calls += 1
        call()
        return Timing((9.0, 1.0, 2.0), 3 * 2**20)


def entrant(run, spec="int8/fp8", refuse=lambda call: None):
    return Contestant(AttentionSpec.parse(spec), "mine", refuse, run)


def exact(q, k, v, is_causal):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def out_of_memory(q, k, v, is_causal):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")


@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_hold_speed_memory_and_accuracy(is_causal):
    told = []
    result = measure(
        contestants(["fp16", "int8/fp8"], ["sdpa", "reference"]),
        FakeTimer(),
        lengths=(64, 128),
        head_dims=(64,),
        is_causal=is_causal,
        tell=told.append,
        **CPU,
    )
    assert result.rows == told and not result.refused
    names = [(row.spec, row.backend, row.length) for row in result.rows]
    assert names == [
        (spec, backend, length)
        for length in (64, 128)
        for spec, backend in [("fp16", "sdpa"), ("int8/fp8", "reference")]
    ]
    for row in result.rows:
        assert (row.status, row.milliseconds, row.peak_mib) == ("measured", 2.0, 3.0)
        work = 4 * 2 * row.length**2 * 64 / (2 if is_causal else 1)
        assert row.tops == pytest.approx(work / 2e-3 / 1e12)
        assert (row.relative_l1 == 0) if row.spec == "fp16" else 0.01 < row.relative_l1 < 0.05


@pytest.mark.parametrize(
    ("wrong", "distance"),
    [
        (lambda q, k, v, c: exact(q, k, v, c) * 1.3, pytest.approx(0.3, abs=1e-3)),
        (lambda q, k, v, c: exact(q, k, v, c) * torch.nan, None),
    ],
)
def test_a_wrong_result_is_not_timed(wrong, distance):
    timer = FakeTimer()
    entrants = [entrant(wrong), entrant(exact)]
    bad, good = measure(entrants, timer, lengths=(64,), head_dims=(64,), **CPU).rows
    assert (bad.status, bad.milliseconds, bad.tops) == ("wrong result", None, None)
    assert bad.relative_l1 == distance and "not timed: relative L1" in bad.reason
    assert good.status == "measured" and timer.calls == 1


def test_what_fails_is_a_row_and_the_run_goes_on():
    def broken(q, k, v, is_causal):
        raise RuntimeError("No available kernel.\nAborting execution.")

    entrants = [
        entrant(out_of_memory),
        entrant(broken),
        entrant(exact, refuse=lambda call: "needs a GPU"),
        entrant(exact),
    ]
    result = measure(entrants, FakeTimer(), lengths=(64,), head_dims=(64,), **CPU)
    assert [(row.status, row.reason) for row in result.rows] == [
        ("out of memory", "CUDA out of memory"),
        ("failed", "No available kernel. Aborting execution."),
        ("measured", None),
    ]
    assert result.refused == {("int8/fp8", "mine", 64): "needs a GPU"}


def compiler_failures():
    """What Triton's compiler raises, as it raises it."""
    errors = pytest.importorskip("triton.runtime.errors")
    from triton.compiler.errors import CompilationError

    return {
        "no such dot": CompilationError("x = 1", ast.parse("x = 1").body[0], "no such dot"),
        "shared memory": errors.OutOfResources(200000, 101376, "shared memory"),
        "ptxas": errors.PTXASError("ptxas exited with 255"),
    }


def test_a_kernel_that_does_not_compile_is_a_row():
    failures = compiler_failures()
    assert not any(isinstance(error, RuntimeError) for error in failures.values())

    def raising(error):
        def run(q, k, v, is_causal):
            raise error

        return run

    entrants = [*(entrant(raising(error)) for error in failures.values()), entrant(exact)]
    rows = measure(entrants, FakeTimer(), lengths=(64,), head_dims=(64,), **CPU).rows
    assert [row.status for row in rows] == ["failed", "failed", "failed", "measured"]
    assert all(says in row.reason for says, row in zip(failures, rows[:3], strict=True))


def test_inputs_that_do_not_fit():
    def make(batch, heads, length, *rest):
        if length == 128:
            out_of_memory(None, None, None, None)
        return bench.inputs(batch, heads, length, *rest)

    rows = measure(
        [entrant(exact)], FakeTimer(), lengths=(64, 128, 256), head_dims=(64,), make=make, **CPU
    ).rows
    assert [row.status for row in rows] == ["measured", "out of memory", "measured"]
    assert "no memory for the inputs" in rows[1].reason


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", LADDER[1:])
def test_a_budget_is_what_the_twin_reaches_on_the_same_inputs(name, is_causal):
    """Of other rows than it was measured on; what drops K's scales or a third of V is beyond it."""
    spec = AttentionSpec.parse(name)
    q, k, v = bench.inputs(1, 2, 700, 64, torch.device("cpu"), torch.float16)
    allowed, want = bench.budget(spec, q, k, v, is_causal), exact(q, k, v, is_causal)
    twin = reference.attention(q, k, v, spec, is_causal=is_causal)[0]
    assert 0.5 * allowed < bench.distance(twin, want) < 0.8 * allowed
    flat = k / k.abs().amax(-1, keepdim=True)
    for wrong in (exact(q, flat, v, is_causal), exact(q, k, v, is_causal) * 1.3):
        assert bench.distance(wrong, want) > allowed


def test_who_takes_part():
    default = contestants(["fp16", "int8/fp8"])
    assert [(str(c.spec), c.backend) for c in default] == [
        ("fp16", "sdpa-flash"),
        ("fp16", "sdpa-cudnn"),
        ("fp16", "sdpa-efficient"),
        *(
            ("int8/fp8", name)
            for name in ("gluon", "hopper", "triton", "sageattention", "comfy_kitchen")
        ),
    ]
    with pytest.raises(ValueError, match=r"backend must be one of gluon, .*, got 'auto'"):
        contestants(["fp16"], ["auto"])


def test_sdpa_is_held_to_one_kernel():
    q, k, v = bench.inputs(1, 1, 8, 16, torch.device("cpu"), torch.float32)
    flash, cudnn, _ = contestants(["fp16"])
    assert torch.allclose(flash.run(q, k, v, False), exact(q, k, v, False), atol=1e-6)
    with pytest.raises(RuntimeError, match="No viable backend"):
        cudnn.run(q, k, v, False)


class FakeGpu:
    """Stands for ``torch.cuda``; a cycle takes a microsecond, a call 400 ms and its host 3 ms.

    Attributes:
        log: what was done; of a sleep its milliseconds.
    """

    def __init__(self, monkeypatch, wakes_after=6.0):
        self.log, self.now, self.wakes_after, self.slept = [], 0.0, wakes_after, 0.0
        monkeypatch.setattr(timing.torch, "cuda", self)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self):
        self.log.append("call")
        self.now += 0.003

    def Event(self, enable_timing):
        def record():
            self.log.append("event")

        return types.SimpleNamespace(
            record=record,
            query=lambda: self.slept < self.wakes_after,
            elapsed_time=lambda end: self.slept if self.log[-3] == self.slept else 400.0,
        )

    def _sleep(self, cycles):
        self.slept = cycles / 1000
        self.log.append(self.slept)

    def synchronize(self, device):
        self.log.append("wait")

    def device(self, device):
        return contextlib.nullcontext()

    def get_device_properties(self, device):
        return types.SimpleNamespace(L2_cache_size=2**26)

    def reset_peak_memory_stats(self, device):
        self.slept = 0.0

    def memory_allocated(self, device):
        return 100

    def max_memory_allocated(self, device):
        return 350

    def timer(self, **options):
        found = CudaTimer(torch.device("cpu"), **options)
        found._flush = types.SimpleNamespace(zero_=lambda: self.log.append("flush"))
        self.log.clear()
        return found


def test_the_gpu_timer(monkeypatch):
    """Warm-up, one run for the memory; then each run behind a flush of the cache and a sleep."""
    gpu = FakeGpu(monkeypatch)
    assert CudaTimer(torch.device("cpu"))._flush.numel() == 2**27
    found = gpu.timer(repeats=20, warmup=2, seconds=2.0)(gpu.call)
    assert found == Timing((400.0,) * 5, 250, pytest.approx(3.0), gaps=False)  # two seconds
    assert gpu.log[:7] == ["call", "call", "wait", "event", "call", "event", "wait"]
    sleep = pytest.approx(6.1, abs=1e-3)  # twice the host's time of the run for the memory
    assert gpu.log[7:] == ["flush", sleep, "event", "call", "event", "wait"] * 5


def test_a_run_that_was_not_queued_in_time_is_repeated(monkeypatch):
    gpu = FakeGpu(monkeypatch, wakes_after=20.0)
    found = gpu.timer(repeats=3, warmup=0)(gpu.call)
    assert found.milliseconds == (400.0,) * 3 and not found.gaps
    sleeps = [x for x in gpu.log if isinstance(x, float)]
    assert sleeps == pytest.approx([6.1, 12.2, 24.4, 24.4, 24.4], abs=1e-2)


def test_gaps_that_no_sleep_covers_are_reported(monkeypatch):
    gpu = FakeGpu(monkeypatch, wakes_after=1e9)  # the call itself waits for the GPU
    assert gpu.timer(repeats=3, warmup=0)(gpu.call).gaps
    assert max(x for x in gpu.log if isinstance(x, float)) == timing.LONGEST_SLEEP

    def timer(call):
        call()
        return Timing((1.0,), None, 0.5, gaps=True)

    (row,) = measure([entrant(exact)], timer, lengths=(64,), head_dims=(64,), **CPU).rows
    assert (row.status, row.host_milliseconds, row.reason) == ("measured", 0.5, bench.GAPS)


@pytest.fixture
def titles(monkeypatch):
    """Titles of the figures that are drawn."""
    from matplotlib.figure import Figure

    found, draw = [], Figure.suptitle
    monkeypatch.setattr(
        Figure, "suptitle", lambda self, text: (found.append(text), draw(self, text))[1]
    )
    return found


def test_command_with_a_gpu(monkeypatch, capsys, tmp_path, titles):
    card = Card("Tiny GPU", torch.device("cpu"), FakeTimer())
    monkeypatch.setattr(timing, "find_card", lambda: card)
    options = ["bench", "--spec", "int8/fp8", "--spec", "fp16", "--length", "64", "--heads", "1"]
    options += ["--backend", "reference", "--backend", "sdpa", "--head-dim", "64"]
    options += ["--backend", "triton"]
    assert cli.main([*options, "--json", "--out", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "bench.json").read_text()) == report
    assert (report["label"], report["gpu"]) == ("measured", "Tiny GPU")
    assert [row["backend"] for row in report["rows"]] == ["reference", "sdpa"]
    assert report["refused"][0]["reason"].startswith("needs a CUDA or ROCm device")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert titles == ["Tiny GPU: attention (measured)"]
    assert cli.main(options) == 0
    printed = capsys.readouterr().out
    assert "relative L1" in printed and "2.000" in printed and "Refused" in printed


def test_command_without_a_gpu_predicts(capsys, tmp_path, titles):
    pytest.importorskip("triton")
    options = ["bench", "--spec", "int8/int8", "--length", "1024", "--length", "2048"]
    options += ["--head-dim", "64", "--backend", "triton", "--backend", "sageattention"]
    options += ["--gpu", "a100", "--heads", "8"]
    assert cli.main([*options, "--json", "--out", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["label"] == "predicted bound" and "nothing was run" in report["note"]
    one, two = report["rows"]
    assert one["status"] == two["status"] == "predicted bound"
    assert 100 < one["tops"] == two["tops"] < 1000
    assert two["milliseconds"] == pytest.approx(4 * one["milliseconds"])
    assert one["milliseconds"] == pytest.approx(4 * 8 * 1024**2 * 64 / one["tops"] / 1e9)
    assert two["milliseconds"] < two["call_milliseconds"] < 4 * one["call_milliseconds"]
    assert one["peak_mib"] is None and 0 < one["relative_l1"] < 0.03
    assert titles == ["a100: attention (predicted bound)"]
    assert cli.main(options) == 0
    printed = capsys.readouterr().out
    assert "TOPS <=" in printed and "call ms" in printed and "(predicted bound)" in printed


def test_a_wrong_name_is_answered_with_every_right_one(capsys):
    assert cli.main(["bench", "--backend", "nobody"]) == 1
    shown = capsys.readouterr().err
    assert all(name in shown for name in (*backends.names()[1:], *bench.SDPA_KERNELS))


def test_command_says_why_there_is_nothing(capsys):
    pytest.importorskip("triton")
    options = ["bench", "--gpu", "a100", "--spec", "int8/fp8", "--backend", "triton"]
    assert cli.main([*options, "--head-dim", "64", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert "int8/fp8 on triton: fp8 needs sm_89 or newer, found sm_80" in error
    assert cli.main(["bench", "--gpu", "rtx1"]) == 1
    assert "gpu must be one of" in capsys.readouterr().err
