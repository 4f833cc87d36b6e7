"""Processes of their own, on machines without a card: what a worker says, and how it ends."""

import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from sage_diffusion import AttentionSpec
from sage_diffusion.verify import places, run, worker
from sage_diffusion.verify.cases import CARD_CASES, EMULATED_CASES, FAR_CASES
from sage_diffusion.verify.kernels import Kernel, find
from sage_diffusion.verify.places import Place
from sage_diffusion.verify.run import Verdict, combine

PLACE = Place("a card", torch.device("cpu"), (8, 9))
KERNELS = [
    Kernel("triton", AttentionSpec.parse(name)) for name in ("int8/fp16", "int8/int8", "int8/fp8")
]


def serving(tmp_path, script):
    """A worker's command: ``script`` gets the job as ``job``, and ``say`` for a right kernel."""
    path = tmp_path / "worker.py"
    path.write_text(
        "import json, os, sys, time\njob = json.load(sys.stdin)\n"
        "def say(backend, spec, status='right', lost=False):\n"
        "    verdict = dict(kernel=backend + ' ' + spec, status=status, reason='', head_dims=[],\n"
        "                   cases=3, twin=0.0, exact=0.01, left_out=[])\n"
        "    print('verdicts: ' + json.dumps({'verdicts': [verdict], 'lost': lost}), flush=True)\n"
        "print('what a library prints')\n"
        'print(\'verdicts: {"ready": "a card"}\', flush=True)\n' + script
    )
    return lambda: [sys.executable, str(path)]


def found(tmp_path, script, patience=60.0):
    lists = worker.isolated(PLACE, KERNELS, patience, serving(tmp_path, script))
    return [verdict for verdicts in lists for verdict in verdicts]


def test_every_kernel_of_a_worker_that_lives(tmp_path):
    verdicts = found(tmp_path, "for kernel in job['kernels']: say(*kernel)")
    assert [v.kernel for v in verdicts] == [k.name for k in KERNELS]
    assert verdicts[0] == Verdict("triton int8/fp16", "right", "", (), 3, 0.0, 0.01)


def test_a_kernel_that_kills_its_process_takes_no_other_with_it(tmp_path):
    script = """
for backend, spec in job['kernels']:
    if spec == 'int8/int8':
        print('Fatal Python error: Segmentation fault', file=sys.stderr, flush=True)
        os._exit(139)
    say(backend, spec)
"""
    first, dead, last = found(tmp_path, script)
    assert (first.status, last.status) == ("right", "right")
    assert (dead.kernel, dead.status) == ("triton int8/int8", "failed")
    assert dead.head_dims == (64, 128, 256)
    assert "ended with code 139: Fatal Python error: Segmentation fault" in dead.reason


def test_after_a_lost_card_a_new_process_goes_on(tmp_path):
    script = """
for backend, spec in job['kernels']:
    lost = spec == 'int8/fp16'
    say(backend, spec, 'failed' if lost else 'right', lost)
    if lost:
        sys.exit(3)
"""
    assert [v.status for v in found(tmp_path, script)] == ["failed", "right", "right"]


def test_a_kernel_that_hangs_is_ended(tmp_path):
    script = """
for backend, spec in job['kernels']:
    if spec == 'int8/int8':
        time.sleep(600)
    say(backend, spec)
"""
    _, hung, last = found(tmp_path, script, patience=2.0)
    assert hung.status == "failed" and "no result after 2 seconds: it hangs" in hung.reason
    assert last.status == "right"


def test_a_worker_that_does_not_start_is_no_kernels_fault(tmp_path):
    """A card whose memory is full must not switch every kernel off."""
    path = tmp_path / "worker.py"
    path.write_text("import sys; sys.exit('CUDA error: out of memory')")
    start = lambda: [sys.executable, str(path)]  # noqa: E731
    message = r"a card can't be used by another process: its process ended with code 1: CUDA error"
    with pytest.raises(places.PlaceError, match=message):
        list(worker.isolated(PLACE, KERNELS, 60.0, start))


def test_a_worker_without_a_card_says_so():
    job = json.dumps({"device": "cuda:0", "kernels": [["triton", "int8/fp16"]]})
    done = subprocess.run(worker.command(), input=job, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "PlaceError" in done.stderr


def test_a_kernel_that_loses_the_card_is_named(monkeypatch):
    """After such an error no other case is tried, and the process says so."""

    def lost(self, x, case):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(Kernel, "quantize", lambda self, x: None)
    monkeypatch.setattr(run.checks, "check_operands", lambda *arguments: [])
    monkeypatch.setattr(Kernel, "run", lost)
    with pytest.raises(run.CardLost) as caught:
        run.verify_kernel(KERNELS[0], PLACE, EMULATED_CASES[:2], [])
    verdict = caught.value.args[0]
    assert (verdict.kernel, verdict.status) == ("triton int8/fp16", "failed")
    assert "odd lengths, grouped heads: Triton Error [CUDA]: an illegal" in verdict.reason


def test_a_kernel_that_does_not_compile_or_fit(monkeypatch):
    errors = pytest.importorskip("triton.runtime.errors")
    raised = iter(
        [
            errors.OutOfResources(147712, 101376, "shared memory"),
            RuntimeError("PassManager::run failed"),
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB."),
        ]
    )

    def failing(self, x):
        raise next(raised)

    monkeypatch.setattr(Kernel, "quantize", failing)
    verdict, *_ = run.verify_kernel(KERNELS[0], PLACE, EMULATED_CASES[:3], [])
    assert (verdict.status, verdict.head_dims) == ("not compiled", ())
    assert "out of resource: shared memory" in verdict.reason and "(and 1 more)" in verdict.reason
    assert verdict.left_out == (f"{EMULATED_CASES[2].name}: out of memory",)


def test_a_case_that_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(Place, "free_bytes", lambda self: 2**31)
    monkeypatch.setattr(run, "_check", lambda kernel, place, case, tally: tally.count(kernel.name))
    verdict, *_ = run.verify_kernel(KERNELS[0], PLACE, (CARD_CASES[0], *FAR_CASES), [])
    assert (verdict.status, verdict.cases) == ("right", 1)
    assert verdict.left_out[0] == "strides beyond 2^31: needs 4.0 GiB, 2.0 are free"


def test_cases_travel_as_json():
    for case in (*CARD_CASES, *FAR_CASES):
        assert worker.case_of(json.loads(json.dumps(worker.vars_of(case)))) == case


def verified(kernel, case):
    import ptxvm  # noqa: F401

    return run.verify_kernel(kernel, places.emulated("sm_80"), [case], [])[0].status


def test_what_is_compiled_ahead_is_what_is_run(tmp_path, monkeypatch):
    """A worker's machine code is found again: nothing of the kernel is compiled a second time."""
    triton = pytest.importorskip("triton", minversion="3.6")

    monkeypatch.undo()  # the tests' poison; the worker has none
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, case = Kernel("triton", AttentionSpec.parse("int8/int8")), EMULATED_CASES[3]
    worker.compile_ahead("sm_80", [kernel], [case], jobs=1)
    ahead = {path.name for path in tmp_path.rglob("*.cubin")}
    assert "_attention_fwd_kernel.cubin" in ahead
    folders = sorted(os.listdir(tmp_path))
    # As a worker does, in a new process: a function's key in Triton 3.7 hangs on which of the
    # functions that it calls have been hashed before, and other tests did that in this one.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as new:
        assert new.submit(verified, kernel, case).result() == "right"
    assert sorted(os.listdir(tmp_path)) == folders, triton.__version__


def test_what_a_card_runs():
    kernels, refused = find(PLACE)
    assert [k.name for k in kernels if k.backend == "gluon"] or "triton 3.9" in str(refused)
    assert "hopper int8/fp8" in refused and "sm_90" in refused["hopper int8/fp8"]
    assert find(PLACE, ("int8/fp16",), ("triton",))[0] == [KERNELS[0]]
    with pytest.raises(ValueError, match="--backend must be one of gluon, hopper, triton, got 's"):
        find(PLACE, (), ("sdpa",))


def test_a_kernel_that_reads_wrong_codes_is_wrong_too():
    verdicts = [
        Verdict("triton int8/int8", "right", cases=2),
        Verdict("rows int8", "right", cases=2),
        Verdict("value int8", "wrong", "odd: v's codes differ", (64,), 1),
        Verdict("triton int8/fp8", "right", cases=2),
        Verdict("rows int8", "right", cases=2),
    ]
    rows, value, first, second = combine(verdicts, KERNELS)
    assert (rows.kernel, rows.cases, value.status) == ("rows int8", 4, "wrong")
    assert (first.status, first.head_dims) == ("wrong", (64,))
    assert first.reason == "reads what a wrong quantizer wrote, value int8"
    assert second.status == "right"


@pytest.mark.parametrize("part", [0, 1, None])
def test_a_bit_that_moves_in_one_repetition_is_a_race(part):
    """In the output or the log-sum-exp, NaN or not: bits are compared, not numbers."""
    runs = []

    def call():
        runs.append((torch.full((1, 1, 8, 64), torch.nan), torch.zeros(1, 1, 8)))
        if part is not None and len(runs) == 3:
            runs[-1][part].view(torch.uint8)[0, 0, 0] ^= 1
        return runs[-1]

    found = run.checks.check_repeats(KERNELS[0], EMULATED_CASES[0], call, 4)
    assert len(runs) == 5 and len(found) == (part is not None)
    if found:
        assert found[0].kernel == "triton int8/fp16" and "from the first run: a race" in str(found)
