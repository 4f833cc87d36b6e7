"""Faults put into the kernels: the command must find each and name the kernel."""

import collections
import contextlib
import gc
import json
import re
from unittest import mock

import pytest

pytest.importorskip("triton", minversion="3.6")

import ptxvm
import ptxvm.device

from sage_diffusion import cli
from sage_diffusion.kernels.attention import gluon_kernel, triton
from sage_diffusion.kernels.quantize import together, triton_fp4, triton_rows, triton_value
from sage_diffusion.verify import procedure
from sage_diffusion.verify.cases import EMULATED_CASES


@contextlib.contextmanager
def fresh(*kernels):
    """Nothing that is compiled already is used, nor later what is compiled now."""
    new = [collections.defaultdict(kernel.create_binder) for kernel in kernels]
    with contextlib.ExitStack() as stack:
        for kernel, caches in zip(kernels, new, strict=True):
            stack.enter_context(mock.patch.object(kernel, "device_caches", caches))
        yield
    with ptxvm.gpu(89):  # which unloads them
        del caches
        new.clear()
        gc.collect()


@contextlib.contextmanager
def edited(function, before, after, *callers):
    """A jit function with another source; ``callers`` are compiled anew too."""
    source = function.src
    assert source.count(before) == 1, f"{before!r} must stand once in {function}"

    def update(text):
        function._unsafe_update_src(text)
        for jit in (function, *callers):
            jit.hash = None

    update(source.replace(before, after))
    with fresh(function, *callers):
        try:
            yield
        finally:
            update(source)


@contextlib.contextmanager
def machine_code(kernel, change):
    """A kernel whose PTX is changed as it is loaded."""

    class Changed(ptxvm.device.Machine):
        def __init__(self, ptx, *args, **kwargs):
            if f".entry {kernel.fn.__name__}(" in ptx:
                changed = change(ptx)
                assert changed != ptx
                ptx = changed
            super().__init__(ptx, *args, **kwargs)

    with fresh(kernel), mock.patch.object(ptxvm.device, "Machine", Changed):
        yield


#: What a program of Q or K is made of, from the inside out.
TOGETHER = (triton_rows._rows_at, triton_rows.rows_program, together._quantize_kernel)


def wrong_scale():
    """Scores of the Gluon kernel 2 % too large."""
    return edited(
        triton_rows._quantize_tile,
        "kept *= COLUMN_FACTOR\n",
        "kept *= COLUMN_FACTOR * 1.02\n",
        *TOGETHER,
    )


def dropped_mask():
    """Every key counts as seen."""
    return edited(
        triton._attend_range,
        "tl.where(seen != 0, s,",
        "tl.where(seen >= 0, s,",
        triton._attention_fwd_kernel,
    )


def swapped_nibble():
    """The lower index in the high nibble."""
    return edited(
        triton_fp4.pack_codes,
        "(low & 15) | ((high & 15) << 4)",
        "(high & 15) | ((low & 15) << 4)",
        triton_rows._quantize_tile,
        *TOGETHER,
        triton_value.value_program,  # V of FP4; or later tests have it from here
    )


def unwritten_row():
    """The last row of an output is not stored."""
    kernel = triton._attention_fwd_kernel
    return edited(
        kernel, "inside = (rows[:, None] < q_len)", "inside = (rows[:, None] < q_len - 1)"
    )


def race():
    """A warp does not wait for what the others copy."""
    return machine_code(
        gluon_kernel.attention_kernel, lambda ptx: re.sub(r"\tbar\.sync[^;]*;", "", ptx)
    )


FAULTS = {
    "wrong scale": (
        wrong_scale,
        "gluon int4/int8",
        r"gluon int4/int8 wrong: .*relative L1 0\.0\d+ from the twin on the same codes exceeds",
    ),
    "dropped mask": (
        dropped_mask,
        "triton int8/fp8",
        r"triton int8/fp8 wrong: boolean mask: a row that sees no key is not zero",
    ),
    "swapped nibble": (
        swapped_nibble,
        "gluon int4/int8",
        r"rows int4 wrong: .*[qk]'s codes differ from the twin's in \d+\.\d+% of their bytes",
    ),
    "unwritten row": (
        unwritten_row,
        "triton int8/fp16",
        r"triton int8/fp16 wrong: .*\d of \d+ rows are not finite or were not written, the first",
    ),
    "race": (
        race,
        "gluon int8/fp8-fast",
        r"gluon int8/fp8-fast failed: .*attention_kernel, PTX line \d+: .*race: shared memory",
    ),
}


@pytest.fixture(autouse=True)
def plain_memory(monkeypatch):
    """Only ``verify``'s own poison, not that of the tests; two cases are enough."""
    monkeypatch.undo()
    chosen = tuple(case for case in EMULATED_CASES if case.name == "boolean mask")
    monkeypatch.setattr(procedure, "EMULATED_CASES", chosen)


def run(capsys, tmp_path, kernel):
    """Exit code, what was printed in one line, and verdict by kernel."""
    backend, spec = kernel.split()
    path = tmp_path / "verdict.json"
    options = ["--emulate", "sm_89", "--backend", backend, "--spec", spec, "--json", str(path)]
    code = cli.main(["verify", *options])
    document = json.loads(path.read_text())
    printed = " ".join(capsys.readouterr().out.split())
    return code, printed, {v["kernel"]: v["status"] for v in document["verdicts"]}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_the_kernel_named(fault, capsys, tmp_path):
    seed, kernel, line = FAULTS[fault]
    with seed():
        code, printed, verdicts = run(capsys, tmp_path, kernel)
    assert code == 1
    assert re.search(line, printed), printed
    assert verdicts[kernel] != "right"
    # Nothing else is blamed, but kernels that read what a wrong quantizer wrote.
    wrong = {name for name, status in verdicts.items() if status != "right"}
    assert wrong == {kernel, "rows int4"} if fault == "swapped nibble" else wrong == {kernel}


@pytest.mark.parametrize("kernel", dict.fromkeys(kernel for _, kernel, _ in FAULTS.values()))
def test_without_a_fault_nothing_is_found(kernel, capsys, tmp_path):
    code, printed, verdicts = run(capsys, tmp_path, kernel)
    assert code == 0, printed
    assert set(verdicts.values()) == {"right"}
