"""Predicted bounds: the cost model on machine code, our kernels' goals, other people's files."""

import json
import sys
import zipfile
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from sage_diffusion import cli
from sage_diffusion.adapt.costs import MEASURED, card_costs, relative_cost
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.kernels.versions import TRITON
from sage_diffusion.speed import cost, cost_sass
from sage_diffusion.speed.cost_compile import compile_attention
from sage_diffusion.speed.cost_sass import Function, bound, functions, macs, main_loop, opcode
from sage_diffusion.speed.gpus import GPUS


def test_cycles_of_a_loop():
    """Every pipe by hand: 4 schedulers, 64 integer lanes, 16 special ones, 128 shared bytes."""
    loop = [
        "IMMA.16864.S4.S4.SAT R0, R4.ROW, R8.COL, R12",
        "@!P0 QMMA.16832.F16.E4M3.E4M3 R0, R4.ROW, R8.COL, RZ",
        "MUFU.EX2 R1, R1",
        "FFMA R0, R1, R2, R3",
        "IMAD R0, R1, R2, R3",
        "LOP3.LUT R0, R1, R2, RZ, 0xc0, !PT",
        "LDSM.16.M88.4 R0, [R1]",
        "LDG.E.128 R0, [R2.64]",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
    ]
    got = bound(loop, GPUS["rtx4090"])
    assert got.macs == {"i4": 16 * 8 * 64, "f8/f16": 16 * 8 * 32}
    assert got.cycles == {
        "issue": 9 / 4,
        "tensor": 8192 / 2048 + 4096 / 1024,
        "mufu": 2.0,
        "fma": 0.25 + 0.5,
        "alu": 0.5,
        "shared": 32 * 16 / 128,
        "global": 32 * 16 / 64,
    }
    assert not got.unknown
    assert bound(["FROB R1"], GPUS["a100"]).unknown == {"FROB": 1}
    assert bound(loop[:1], GPUS["h100"]).cycles["tensor"] == float("inf")


@pytest.mark.parametrize(
    "op,want",
    [
        ("HMMA.16816.F32", (2048, "f16/f32")),
        ("HMMA.16816.F16", (2048, "f16/f16")),
        ("IMMA.16832.S8.S8.SAT", (4096, "i8")),
        ("QMMA.16832.F32.E4M3.E4M3", (4096, "f8/f32")),
        ("QGMMA.64x128x32.F16.E4M3.E4M3", (64 * 128 * 32, "f8/f16")),
        ("OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X", (8192, "f4")),
        ("FFMA", (0, "")),
    ],
)
def test_tensor_core_work(op, want):
    assert macs(op) == want


def test_what_older_toolkits_print(monkeypatch, tmp_path):
    """CUDA 12.8 adds scheduling to Blackwell's instructions, and leaves loops through BREAK."""
    lines = (
        "        /*0000*/ IMMA.16832.S8.S8.SAT R0, R4.ROW, R8.COL, R0   &req={0,1}  ?WAIT5;",
        "        /*0010*/ BREAK.RELIABLE B0 ;",
        "        /*0020*/ @P0 BRA 0x0                 &req={4,1}       ?trans6;",
    )
    printed = ["Function k:\n REG:40\n", "Function : k\n" + "\n".join(lines)]
    monkeypatch.setattr(cost_sass, "_run", lambda command: printed.pop(0))
    (function,) = functions(tmp_path)
    assert function.loops == ((0, 2),) and function.code[2] == "@P0 BRA 0x0"
    found = bound(main_loop(function), GPUS["rtx5090"])
    assert found.work == 16 * 8 * 32 and not found.unknown


def test_main_loop_is_the_innermost_with_the_work():
    code = ["MOV R0, R1", "IMMA.16864.S4.S4.SAT R0", "IADD3 R0", "@P0 BRA 0x10", "BRA 0x0"]
    function = Function("f", tuple(code), ((1, 3), (0, 4)), 32, 0)
    assert main_loop(function) == tuple(code[1:4])
    assert opcode("@!P0 IMAD.MOV.U32 R1, RZ, RZ, R2") == "IMAD.MOV.U32"


#: Of what the kernels must not lose again Triton before 3.9 may lose 2 % of the bound (2.2 % at
#: int4/int8 and head dim 64, where each instruction counts: eight moves and a barrier), some of the
#: room below it, and a few registers outside the main loop.
OLDER = TRITON < (3, 9)
SLACK, ROOM = (1.025, 0.07) if OLDER else (1.0, 0.0)

#: (card, spec, head dim, cycles, share of the second pipe) under Triton 3.9.
GOALS = [
    # 0.65 and 0.98 before a tile of V had a factor.
    ("rtx4090", "int4/fp8-fast", 128, 192, 0.66),
    ("rtx4090", "int4/fp8-fast", 64, 200, 0.99),
    ("rtx4090", "int8/fp8-fast", 128, 256, 0.58),
    ("rtx4090", "int8/fp8-fast", 64, 256, 0.79),
    # With one scale of a channel of V for all tokens 0.66; 202, 0.96; and 0.60.
    ("rtx3090", "int4/int8", 128, 192, 0.81),
    ("rtx3090", "int4/int8", 64, 222.5, 0.89),
    ("rtx3090", "int8/int8", 128, 256, 0.60),
    ("rtx5090", "int8/fp8-fast", 128, 256, 0.60),
    ("rtx5090", "fp4/fp8-fast", 128, 192, 0.65),
    ("rtx5090", "fp4/fp4", 128, 128, 0.97),
    ("rtx5090", "fp4/fp4", 64, 248, 0.77),
    ("a100", "int8/int8", 128, 153, 1.0),
    ("a100", "int8/int8-tile_v", 128, 147, 0.88),
    ("a100", "int4/int8", 128, 154, 1.0),
    # 125 before outputs and multipliers were kept finite at the edges of half.
    ("a100", "int4/int8-tile_v", 128, 127, 1.0),
    ("h100", "int8/fp8", 128, 74.2, 0.89),
    ("h100", "fp8/fp8", 128, 66.1, 1.0),
]


@pytest.mark.parametrize("gpu,spec,head_dim,cycles,second", GOALS)
def test_goals(gpu, spec, head_dim, cycles, second):
    (got,) = cost.kernel_costs([gpu], [spec], [head_dim])
    assert (got.gpu, got.spec, got.head_dim) == (gpu, spec, head_dim)
    assert got.cycles <= cycles * SLACK and got.second <= second + ROOM
    assert got.spills <= (8 if OLDER else 0) and got.registers <= 255
    if gpu not in MEASURED:  # plans go by times
        prices = card_costs(gpu)
        planned = relative_cost(spec, prices, head_dim) * prices["fp16"]
        assert planned == pytest.approx(got.cycles, rel=0.025 if OLDER else 0.01)  # of plans


@pytest.mark.parametrize(
    "spec,mask,is_causal,second",
    [
        ("int4/fp8-fast", "bool", False, 0.67),
        ("int4/fp8-fast", "bool", True, 0.67),
        ("int4/fp8-fast", "additive", False, 0.83),
        ("int8/fp8-fast", "bool", False, 0.58),
    ],
)
def test_goals_with_masks(spec, mask, is_causal, second):
    """A mask that differs from query to query leaves the tensor cores the slowest pipe."""
    (got,) = cost.kernel_costs(["rtx4090"], [spec], [128], mask=mask, is_causal=is_causal)
    assert got.bound == "tensor" and got.cycles == (192 if "int4" in spec else 256)
    assert got.second <= second + ROOM and got.spills == 0


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    """A compiled kernel as other people's package, and as a bare file."""
    kernel = compile_attention(AttentionSpec.parse("int4/fp8-fast"), 128, (8, 9))
    folder = tmp_path_factory.mktemp("peer")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.cubin)
    wheel = folder / "some_peer-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.write(cubin, "some_peer/kernels.so")
        z.writestr("some_peer/__init__.py", "raise RuntimeError('executed')")
    return kernel, cubin, wheel


def test_machine_code_of_int4(int4):
    kernel, cubin, _ = int4
    (function,) = functions(cubin)
    loop = [opcode(i) for i in main_loop(function)]
    assert sum(op.startswith("IMMA.16864.S4.S4") for op in loop) == 16
    assert sum(op.startswith("QMMA.16832.F16.E4M3") for op in loop) == 32
    assert not any(op.startswith(("STS", "STL", "LDL")) for op in loop)  # P stays in registers
    assert kernel.shared <= 101376


def test_peers_by_path(int4):
    _, cubin, wheel = int4
    ours = cost.kernel_costs(["rtx4090"], ["int4/fp8-fast"], [128])[0]
    for path, package in ((cubin, "kernel"), (wheel, "some_peer")):
        first, second = cost.library_costs(str(path), ["rtx4090", "l40s"])
        assert (first.cycles, first.second, first.registers) == (
            ours.cycles,
            ours.second,
            ours.registers,
        )
        assert (first.spec, first.package) == ("int4/fp8", package)
        assert (first.gpu, second.gpu, second.cycles) == ("rtx4090", "l40s", first.cycles)
    (found,) = cost.library_costs("some-peer", ["rtx4090"], wheels=wheel.parent)
    assert found == cost.library_costs(str(wheel), ["rtx4090"])[0]
    with pytest.raises(cost.CostError, match="no tensor-core kernel for h100 was found"):
        cost.library_costs(str(wheel), ["h100"])


def test_what_is_put_beside_ours():
    def one(spec, cycles, head_dim=128, gpu="rtx4090", second=0.5):
        return cost.KernelCost(gpu, spec, head_dim, cycles, "tensor", second, 0, 128, package="p")

    ours = one("int8/fp8-fast", 256)
    fast, alike, busy = one("int4/int8", 100), one("int8/fp8", 300), one("int4/int8", 100, second=1)
    assert cost.beside(ours, [fast, alike]) is alike
    assert cost.beside(ours, [busy, fast, one("int4/int8", 50, 64)]) is fast
    assert cost.beside(ours, [one("int8/fp8", 1, None), one("int8/fp8", 1, gpu="a100")]) is None


def test_bad_input(tmp_path, monkeypatch):
    text = tmp_path / "text.so"
    text.write_text("no machine code")
    with pytest.raises(cost.CostError, match="must hold machine code for a GPU"):
        cost.library_costs(str(text))
    with pytest.raises(cost.CostError, match=r"gpu must be one of rtx2080ti, .*, got 'rtx1'"):
        cost.kernel_costs(["rtx1"])
    with pytest.raises(cost.NoKernelError, match="no kernel of this package runs on rtx2080ti"):
        cost.kernel_costs(["rtx2080ti"])

    def broken(*args, **kwargs):
        raise RuntimeError("ptxas:\nno")

    monkeypatch.setattr("sage_diffusion.speed.cost_compile.compile_attention", broken)
    want = "int8/fp8 at head dim 64 does not compile for sm_89: ptxas: no"
    with pytest.raises(cost.CostError, match=want):
        cost.kernel_costs(["rtx4090"], ["int8/fp8"])
    monkeypatch.setitem(sys.modules, "sage_diffusion.speed.cost_compile", None)
    with pytest.raises(cost.CostError, match="compiling a kernel needs triton"):
        cost.kernel_costs(["rtx4090"])


FIELDS = "gpu spec head_dim cycles bound second spills registers"


def test_command(int4, capsys, monkeypatch):
    _, cubin, wheel = int4
    options = ["cost", "--spec", "int4/fp8-fast", "--head-dim", "128", "--gpu", "rtx4090"]
    assert cli.main([*options, "--against", str(cubin), "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert [k["spec"] for k in kernels] == ["int4/fp8-fast", "int4/fp8"]
    timed = ["tokens", "loop_milliseconds", "call_milliseconds"]
    assert [list(k) for k in kernels] == [FIELDS.split() + timed, [*FIELDS.split(), "package"]]
    assert (kernels[1]["package"], kernels[1]["head_dim"]) == ("kernel", None)
    assert cli.main(options) == 0
    table = capsys.readouterr().out
    assert "Predicted bounds" in table and "int4/fp8-fast" in table and "192" in table
    assert cli.main([*options, "--against", str(cubin)]) == 0
    assert "Of others, with no kernel of ours beside them" in capsys.readouterr().out
    # Names that tell the head dim, as comfy_kitchen's do.
    name = functions(cubin)[0].name
    monkeypatch.setitem(cost._PEERS, "some_peer", ("", "(128)$"))
    monkeypatch.setattr(
        cost, "functions", lambda *args: [replace(f, name=f"{name}128") for f in functions(*args)]
    )
    options += ["--against", "some_peer", "--wheels", str(wheel.parent)]
    assert cli.main(options) == 0
    table = capsys.readouterr().out
    assert "some_peer" in table and "1.00" in table and "Of others" not in table


def test_every_card_by_default(monkeypatch, capsys):
    def costs(gpus, specs, head_dims, **variant):
        (name,) = gpus
        if name == "rtx2080ti":
            raise cost.NoKernelError("no kernel of this package runs on rtx2080ti: too old")
        return [
            cost.KernelCost(name, "int8/int8", d, 256, "tensor", 0.6, 0, 128) for d in (64, 128)
        ]

    monkeypatch.setattr(cost, "kernel_costs", costs)
    assert cli.main(["cost", "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    cards = [name for name in GPUS if name != "rtx2080ti"]
    assert [k["gpu"] for k in kernels] == [name for name in cards for _ in range(2)]
    assert all(k["call_milliseconds"] > k["loop_milliseconds"] > 0 for k in kernels)
    assert cli.main(["cost", "--json", "--tokens", "32768"]) == 0
    long = json.loads(capsys.readouterr().out)["kernels"]
    assert all(k["tokens"] == 32768 for k in long)
    for few, many in zip(kernels, long, strict=True):
        share = [k["call_milliseconds"] / k["loop_milliseconds"] for k in (few, many)]
        assert 1 < share[1] < share[0]
    assert cli.main(["cost"]) == 0
    assert "runs on rtx2080ti: too old" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options,message",
    [
        (["--gpu", "rtx2080ti"], "Triton needs sm_80 or newer"),
        (["--gpu", "rtx1"], "gpu must be one of rtx2080ti"),
        (["--spec", "int5"], "'int5' is not an attention spec"),
        (["--mask", "causal"], "mask must be bool or additive, got 'causal'"),
        (["--download"], "--wheels, --download and --match need --against"),
        (["--against", "missing.whl"], "missing.whl must be a file, there is none"),
        (["--against", __file__], "must hold machine code for a GPU"),
    ],
)
def test_errors_are_one_document(options, message, capsys):
    assert cli.main(["cost", *options, "--json"]) == 1
    assert message in json.loads(capsys.readouterr().out)["error"]
