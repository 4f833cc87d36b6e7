"""What a kernel's machine code costs: its main loop, and the cycles that each pipe needs for it.

The machine code is what ``cuobjdump`` (in the ``triton`` wheel) prints; nothing is executed.  The
main loop is the backward branch round the most tensor-core work.  For every execution pipe of one
SM the cycles of one trip are added up; the slowest pipe bounds the kernel from below: real time is
longer (latency, bank conflicts, memory), never shorter.  So the figures rank kernels and name the
pipe to relieve.  They are predicted bounds, not timings.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from sage_diffusion.speed.gpus import Gpu

#: Schedulers of an SM (one warp instruction a clock each), lanes of the integer pipe and of the
#: special-function units, bytes a clock of shared memory and of the L1's outer side.
SCHEDULERS, INTEGER_LANES, SPECIAL_LANES, SHARED_BYTES, GLOBAL_BYTES = 4, 64, 16, 128, 64
WARP = 32


@dataclass(frozen=True)
class Function:
    """One kernel's machine code.

    Attributes:
        name: mangled.
        code: instructions in order, without addresses.
        loops: first and last index of every backward branch's body.
        registers: per thread.
        spills: instructions that read or write spilled registers.
    """

    name: str
    code: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]
    registers: int
    spills: int


@dataclass(frozen=True)
class Bound:
    """Cycles of one SM for one trip of the main loop by one warp, per pipe, and its work."""

    cycles: dict[str, float]
    macs: dict[str, float]
    unknown: dict[str, int]

    @property
    def work(self) -> float:
        """Multiply-accumulates of a trip."""
        return sum(self.macs.values())


def tool(name: str) -> str:
    """Path of a CUDA binary utility in the ``triton`` wheel.  Imports nothing.

    Raises:
        FileNotFoundError: triton is not installed, or its wheel lacks the tool.
    """
    found = util.find_spec("triton")
    folders = (found.submodule_search_locations if found else None) or ["triton"]
    for folder in folders:
        path = Path(folder) / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return str(path)
    raise FileNotFoundError(
        f"{name} must be in the triton wheel (pip install triton), found no {path}"
    )


def functions(
    path: Path, arch: str | None = None, wanted: Callable[[str], bool] = lambda name: True
) -> list[Function]:
    """Every kernel of a cubin or shared library, or those that are wanted.

    Args:
        path: the file.
        arch: "sm_89", the code to look at if there is code for several; sm_90 finds sm_90a too.
        wanted: whether to disassemble the kernel of this mangled name.

    Raises:
        ValueError: the file holds no device code.
    """
    choice = ["-arch", arch] if arch else []
    usage = _run([tool("cuobjdump"), "-res-usage", *choice, str(path)])
    registers = {
        name: int(count)
        for name, count in re.findall(r"Function (\S+):\s*\n?\s*REG:(\d+)", usage)
        if wanted(name)
    }
    if not registers and arch == "sm_90":
        return functions(path, "sm_90a", wanted)
    if not registers:
        return []
    text = _run([tool("cuobjdump"), "-sass", *choice, "-fun", ",".join(registers), str(path)])
    found = re.search(r"code for (sm_\d+)", text)
    if arch and found and found[1] != re.sub(r"\D+$", "", arch):
        return []  # a bare cubin: cuobjdump prints it whatever architecture was asked for
    parts = re.split(r"^\s*Function : (\S+)\s*$", text, flags=re.M)
    return [
        _parse(name, body, registers[name])
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
        if name in registers
    ]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    if done.returncode or "does not contain device code" in text:
        raise ValueError(f"{command[-1]} must hold machine code for a GPU: {text.strip()[:300]}")
    return text


def _parse(name: str, body: str, registers: int) -> Function:
    code: list[str] = []
    index: dict[int, int] = {}
    branches: list[tuple[int, int]] = []
    for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^/]*?)\s*;", body):
        text = re.sub(r"\s{2,}[&?].*", "", text)  # CUDA 12.8 prints Blackwell's scheduling too
        index[int(address, 16)] = len(code)
        branch = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)$", text)
        if branch:
            branches.append((len(code), int(branch[1], 16)))
        code.append(text)
    # Behind the exit lies what is seldom run, such as waiting for a copy; its way back is no loop.
    end = max((i for i, text in enumerate(code) if text == "EXIT"), default=len(code))
    loops = tuple(
        (index[target], at)
        for at, target in branches
        if target in index and index[target] < at and not index[target] < end < at
    )
    return Function(name, tuple(code), loops, registers, sum(map(is_spill, code)))


def is_spill(instruction: str) -> bool:
    """Whether it reads or writes a register that was spilled."""
    return opcode(instruction).split(".")[0] in ("LDL", "STL")


def opcode(instruction: str) -> str:
    """``"@!P0 IMAD.MOV.U32 R1, RZ, .."`` -> ``"IMAD.MOV.U32"``."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


_SHAPES = {
    "16816": 16 * 8 * 16,
    "16832": 16 * 8 * 32,
    "16864": 16 * 8 * 64,
    "1688": 16 * 8 * 8,
    "8816": 8 * 8 * 16,
    "8832": 8 * 8 * 32,
    "1684": 16 * 8 * 4,
    "168256": 16 * 8 * 256,
}


def macs(op: str) -> tuple[int, str]:
    """Multiply-accumulates of one tensor-core instruction per warp (or warpgroup), and its format.

    ``(0, "")`` for every other instruction.
    """
    match = re.match(r"^([A-Z])(G?)MMA\.(?:SP\.|SF\.)*([\dx]+)(.*)", op) or re.match(
        r"^(BF)(G?)MMA\.([\dx]+)(.*)", op
    )
    if not match:
        return 0, ""
    kind, _, shape, rest = match.groups()
    if "x" in shape:
        m, n, k = map(int, shape.split("x"))
        count = m * n * k
    else:
        count = _SHAPES[shape]
    if kind == "I":
        return count, "i4" if ".S4" in rest or ".U4" in rest else "i8"
    if kind == "O" and ("E2M1" in rest or shape == "16864"):
        return count, "f4"
    if kind in "QO":
        return count, "f8/f16" if rest.startswith(".F16") else "f8/f32"
    return count, "f16/f16" if re.match(r"^\.F16(\.|$)", rest) else "f16/f32"


def main_loop(function: Function) -> tuple[str, ...]:
    """Instructions of the loop with the most tensor-core work; all of them if there is no loop."""

    def work(loop: tuple[int, int]) -> int:
        return sum(macs(opcode(i))[0] for i in function.code[loop[0] : loop[1] + 1])

    best = max(function.loops, key=work, default=None)
    if best is None or not work(best):
        return function.code
    full = work(best)
    for loop in function.loops:  # the innermost with (nearly) the same work
        if best[0] <= loop[0] and loop[1] <= best[1] and work(loop) >= 0.9 * full:
            best = loop
    return function.code[best[0] : best[1] + 1]


_FREE = re.compile(
    r"^(U[A-Z]|BAR|BRA|BREAK|NOP|DEPBAR|LDGDEPBAR|LDC|S2|R2UR|WARPSYNC|BSSY|BSYNC|MEMBAR|FENCE|ERRBAR|CCTL"
    r"|WARPGROUP|SYNCS|ELECT|LDL|STL|CALL|RET|EXIT|VOTE|REDUX|NANOSLEEP|ACQBULK|ARRIVES|YIELD)"
)
_INTEGER = re.compile(
    r"^(FMNMX|FSEL|FSET|FSETP|SEL|IADD|ISETP|LOP3|LEA|SHF|PRMT|MOV|IMNMX|VIADD|VIMNMX|PLOP3|POPC|BFE"
    r"|SGXT|FCHK|IABS|CS2R|VABSDIFF|R2P|P2R|F2FP|I2FP|I2IP)"
)
_SPECIAL = re.compile(r"^(MUFU|F2I|I2F|F2F|FRND)\b")
_PACKING = re.compile(r"^F2FP\b")


def bound(loop: Iterable[str], gpu: Gpu) -> Bound:
    """Add up the pipes' cycles of one trip of ``loop``."""
    cycles: defaultdict[str, float] = defaultdict(float)
    work: defaultdict[str, float] = defaultdict(float)
    unknown: Counter[str] = Counter()
    for instruction in loop:
        op = opcode(instruction)
        count, kind = macs(op)
        cycles["issue"] += 1 / SCHEDULERS
        if count:
            share = count / 4 if re.match(r"^[A-Z]+GMMA", op) else count  # of a warpgroup, per warp
            rate = gpu.tensor.get(kind)
            cycles["tensor"] += share / rate if rate else float("inf")
            work[kind] += share
        elif _SPECIAL.match(op) or (_PACKING.match(op) and gpu.packing == SPECIAL_LANES):
            cycles["mufu"] += WARP / SPECIAL_LANES
        elif re.match(r"^(FFMA|FADD|FMUL|IMAD|IDP)", op):
            lanes = INTEGER_LANES if op.startswith("I") else gpu.fp32
            packed = 2 if op.startswith(("FFMA2", "FADD2", "FMUL2")) else 1
            cycles["fma"] += WARP / lanes / packed
        elif re.match(r"^(HADD2|HMUL2|HFMA2|HMNMX2|HSETP2)", op):
            cycles["fma" if gpu.half2 != 64 else "half"] += WARP / gpu.half2
        elif _INTEGER.match(op):
            cycles["alu"] += WARP / INTEGER_LANES
        elif re.match(r"^(LDSM|LDS|STS|STSM|SHFL|MOVM|ATOMS)", op):
            cycles["shared"] += WARP * _bytes(op) / SHARED_BYTES
        elif re.match(r"^(LDG|STG|LDGSTS|UTMALDG|UBLKCP)", op):
            if op.startswith("LDGSTS"):
                cycles["shared"] += WARP * _bytes(op) / SHARED_BYTES
            cycles["global"] += WARP * _bytes(op) / GLOBAL_BYTES
        elif not _FREE.match(op):
            unknown[op] += 1
    return Bound(dict(cycles), dict(work), dict(unknown))


def _bytes(op: str) -> int:
    """Bytes per lane that a memory instruction moves."""
    if op.startswith(("LDSM", "STSM")):
        last = op.rsplit(".", 1)[-1]
        return 4 * int(last) if last.isdigit() else 4
    wide = re.search(r"\.(64|128)\b", op)
    return int(wide[1]) // 8 if wide else 4
