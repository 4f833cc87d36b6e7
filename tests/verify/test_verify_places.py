"""Machines on which nothing can be verified: one line that says what to do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sage_diffusion import cli
from sage_diffusion.verify import places, procedure, record
from sage_diffusion.verify.cases import CARD_CASES, EMULATED_CASES, FAR_CASES, REPEATED, inputs
from sage_diffusion.verify.places import Place, PlaceError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def with_cuda(monkeypatch):
    """A PyTorch with CUDA, whose driver answers as told."""

    def driver(answer, cards=0):
        def init():
            if answer:
                raise RuntimeError(answer)

        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    return driver


@pytest.mark.parametrize(
    "said",
    [
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU",
        "The NVIDIA driver on your system is too old (found version 11040). Please update",
        "No CUDA GPUs are available",
    ],
)
def test_without_a_card_or_driver(with_cuda, capsys, said, tmp_path):
    with_cuda(said)
    path = tmp_path / "out.json"
    assert cli.main(["verify", "--json", str(path)]) == 1
    printed = capsys.readouterr().err
    assert printed == f"sage-diffusion: no card can be used: {said}\n" and not path.exists()


@pytest.mark.parametrize("device", ["cuda:2", "cpu", "gpu0", "mps"])
def test_a_card_that_is_not_there(with_cuda, device):
    with_cuda("", cards=2)
    with pytest.raises(PlaceError, match=f"must be one of cuda:0, cuda:1, got '{device}'"):
        places.card(device)


def test_a_torch_for_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(PlaceError, match="is a build for the CPU: install one with CUDA"):
        places.card()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--emulate", "sm_75"], "--emulate must be one of sm_80, sm_86, sm_89, sm_90, sm_120"),
        (["--emulate", "sm_90", "--device", "cuda:1"], "--emulate takes no --device"),
        (["--emulate", "sm_80", "--spec", "int3/int8"], "is not an attention spec"),
        (["--emulate", "sm_80", "--backend", "cuda"], "--backend must be one of gluon, hopper"),
        (["--emulate", "sm_80", "--spec", "fp4/fp4"], "no kernel for emulated sm_80: gluon fp4"),
    ],
)
def test_wrong_options(capsys, options, message):
    pytest.importorskip("triton")
    assert cli.main(["verify", *options]) == 1
    assert message in capsys.readouterr().err


def test_the_emulator_needs_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(places, "ROOT", tmp_path)
    with pytest.raises(PlaceError, match="needs a checkout of the repository"):
        places.emulated("sm_89")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "Triton is not installed: pip install 'triton"),
        ("import no_such_module", "Triton does not import (No module named 'no_such_module'): pip"),
        ("raise ImportError('libcuda.so: wrong ELF class')", "does not import (libcuda.so: wrong"),
        ("raise AttributeError('x')", "does not import (x): pip install --force-reinstall 'trit"),
    ],
)
def test_without_a_triton_that_imports(tmp_path, module, message):
    code = "import sys\n"
    if module is None:
        code += "sys.modules['triton'] = None\n"
    else:
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton" / "__init__.py").write_text(module)
        code += f"sys.path.insert(0, {str(tmp_path)!r})\n"
    code += "from sage_diffusion.verify import procedure\nprocedure.check_triton()\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("sage_diffusion.verify.places.PlaceError: ") and message in last


def test_the_triton_that_belongs_to_torch(monkeypatch):
    requirements = ["numpy", 'triton==3.6.0; platform_system == "Linux"']
    monkeypatch.setattr(procedure.metadata, "requires", lambda name: requirements)
    assert procedure._needed_triton() == "triton==3.6.0"
    monkeypatch.setattr(procedure.metadata, "requires", lambda name: None)
    assert procedure._needed_triton() == "triton"


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("Failed to find C compiler. Please specify via CC", "; install one (apt install gcc)"),
        ("CUDA error: the provided PTX was compiled with an unsupported toolchain", "; update the"),
        ("out of memory", ""),
    ],
)
def test_a_first_kernel_that_does_not_run(monkeypatch, said, hint):
    pytest.importorskip("triton")
    from sage_diffusion.kernels.quantize import triton as quantize

    def failing(x):
        raise RuntimeError(said)

    here = Place("a card", torch.device("cpu"), (8, 9))
    monkeypatch.setattr(places, "card", lambda device: here)
    monkeypatch.setattr(quantize, "token_mean", failing)
    with pytest.raises(PlaceError) as caught:
        procedure.ready_card()
    assert str(caught.value).startswith(f"Triton can't run a kernel on a card: {said}{hint}")


def test_it_needs_no_package_beyond_the_dependencies(tmp_path):
    code = """
import sys
for name in ("diffusers", "scipy", "matplotlib", "transformers", "safetensors", "pytest"):
    sys.modules[name] = None
from sage_diffusion import cli
sys.exit(cli.main(["verify", "--help"]) or cli.main(["verify", "--emulate", "sm_80",
    "--spec", "int8/int8", "--backend", "gluon", "--json", "out.json"]))
"""
    pytest.importorskip("triton", minversion="3.6")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert any(line.startswith("gluon int8/int8          right") for line in lines), done.stdout
    text = (tmp_path / "out.json").read_text()
    assert "/" + str(ROOT).split("/")[1] not in text and str(Path.home()) not in text


def test_no_folder_is_told():
    for path in ("/home/ann/.cache/x/y.py", r"C:\Users\Ann\x y\y.py", "~/secret/y.py", "/y.py"):
        assert "nn" not in record.scrubbed({"a": [f"error in {path}:3"]})["a"][0]
    kept = "gluon int4/fp8-fast: 1/2 of P V, https://pytorch.org/get-started and a/b"
    assert record.scrubbed(kept) == kept
    assert record.scrubbed('File "/usr/lib/python3/x.py", line 1') == 'File "x.py", line 1'


def test_every_case_fits_a_small_card_but_the_far_ones():
    assert max(c.bytes_needed for c in (*CARD_CASES, *REPEATED)) < 2.5 * 2**30
    assert all(case.bytes_needed > 4 * 2**30 for case in FAR_CASES)
    assert FAR_CASES[0].stride * 319 > 2**31
    assert FAR_CASES[1].is_far and not FAR_CASES[0].is_far


@pytest.mark.parametrize("case", EMULATED_CASES, ids=lambda c: c.name)
def test_inputs_are_as_the_case_says(monkeypatch, case):
    monkeypatch.undo()  # the tests' poison would fill the far strides' 4 GB
    x, again = (inputs(case, torch.device("cpu")) for _ in range(2))
    assert x.q.shape == (case.batch, case.heads, case.q_len, case.head_dim)
    assert x.k.shape == x.v.shape == (case.batch, case.kv_heads, case.k_len, case.head_dim)
    assert torch.equal(x.q, again.q) and x.q.isfinite().all() and x.v.isfinite().all()
    assert (x.mask is None) == (not case.mask) and (x.rope is None) == (not case.rope)
    if case.stride:
        assert x.q.stride(2) * (case.q_len - 1) > 2**31
        assert not torch.equal(x.k, x.v)
