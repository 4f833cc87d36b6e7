"""Run a compiled Triton or Gluon kernel's PTX on the CPU, one CTA at a time.

Every thread of a CTA runs in lock step on NumPy arrays.  This checks *what was compiled*: register
layouts, inline assembly, tensor-core fragments, predicates, bounds and missing barriers, which
Triton's interpreter, stopping at the Python source, cannot see.  It says nothing about time.

Covers what Triton emits for sm_75 .. sm_90 and sm_120, with the hazards of asynchronous copies and
products.  Of TMA and mbarriers it knows what one CTA's copies of tiles need; tcgen05 is not
modelled.  An unknown instruction stops with :class:`Unsupported`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch

from .arithmetic import ArithmeticOps
from .bits import BitOps
from .bulk import BulkOps, TensorMap
from .formats import WIDTH, encode, split_operands
from .lanes import Products, PTXError, Unsupported
from .memory import Memory, MemoryOps
from .tensor_cores import TensorCoreOps


@dataclass
class Instr:
    op: list  # opcode split at '.'
    args: list  # operand strings; {...} vectors stay one string
    pred: tuple | None  # (register, negated)
    text: str
    line: int
    scope: tuple  # of labels, as braces nest


_INSTR = re.compile(r"^(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)


class Machine(MemoryOps, BulkOps, TensorCoreOps, ArithmeticOps, BitOps):
    """One PTX entry point, ready to launch."""

    def __init__(self, ptx, entry=None, check_races=True):
        self.check_races = check_races
        text = re.sub(r"/\*.*?\*/", "", ptx, flags=re.S)
        m = re.search(r"\.entry\s+(%s)\s*\((.*?)\)(.*?)\{" % (entry or r"[\w$]+"), text, re.S)
        if not m:
            raise ValueError("no .entry in the PTX text")
        self.name = m.group(1)
        self.params = [
            (t, n)
            for t, n in re.findall(
                r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,]*?([\w$]+)(?:\[\d+\])?\s*(?:,|$)",
                m.group(2).strip(),
            )
        ]
        nt = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", m.group(3))
        self.threads = int(nt.group(1)) if nt else 128
        depth, i = 1, m.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            i += 1
        self._load(text[m.end() : i - 1], text[: m.end()].count("\n"))

    def _load(self, body, line0):
        self.code, self.labels = [], {}
        buf, scope, scopes = "", (), 0
        for ln, raw in enumerate(body.splitlines(), line0 + 1):
            line = raw.split("//")[0].strip()
            if not buf and line == "{":
                scope, scopes = (*scope, scopes), scopes + 1
            elif not buf and line == "}" and scope:
                scope = scope[:-1]
            while True:
                m = re.match(r"^(\$?[\w$]+):\s*", line)
                if not m or buf:
                    break
                self.labels[scope, m.group(1)] = len(self.code)
                line = line[m.end() :]
            if not line or (line.startswith(".") and not buf) or (line in "{}" and not buf):
                continue
            buf += " " + line
            while ";" in buf:
                one, buf = buf.split(";", 1)
                one = (
                    one.strip().lstrip("{").strip()
                    if one.strip().startswith("{ ") or one.strip() == "{"
                    else one.strip()
                )
                if one.startswith(".reg") or not one or one == "}":
                    continue
                one = one.lstrip("} \t")
                m = _INSTR.match(one)
                if not m:
                    raise Unsupported(f"line {ln}: {one!r}")
                neg, p, op, rest = m.groups()
                self.code.append(
                    Instr(
                        op.replace("::", "__").split("."),
                        split_operands(rest),
                        (p, bool(neg)) if p else None,
                        one,
                        ln,
                        scope,
                    )
                )
            if buf.strip() in ("", "}", "{"):
                buf = ""

    def _target(self, ins):
        """Where a branch goes: the label of the innermost braces that have it."""
        scope = ins.scope
        while (scope, ins.args[0]) not in self.labels:
            scope = scope[:-1]
        return self.labels[scope, ins.args[0]]

    def launch(self, grid, args, shared=0):
        """Run the whole grid.

        Args:
            grid: CTAs along x, y and z.
            args: contiguous arrays and CPU tensors of any strides (by reference), tensor maps, ints
                and floats, in parameter order; missing trailing pointers (Triton's scratch) become
                null.
            shared: bytes of dynamic shared memory.
        """
        self.mem = Memory()
        vals, self.maps = [], {}
        for a in args:
            if isinstance(a, TensorMap):
                self.maps[len(self.maps) + 1] = a  # any number does as its address
                a = len(self.maps)
            if isinstance(a, torch.Tensor):
                a = self.mem.add_tensor(a)
            vals.append(self.mem.add(a) if isinstance(a, np.ndarray) else a)
        self.param = {}
        for i, (ty, name) in enumerate(self.params):
            v = vals[i] if i < len(vals) else 0
            if ty in ("f32", "f64"):
                v = int(encode(np.array([v]), ty)[0])
            bits = 64 if ty == "b8" else WIDTH.get(ty, 64)  # bytes: a tensor map
            self.param[name] = int(v) & ((1 << bits) - 1)
        self.shared_bytes = max(int(shared), 16)
        for z in range(grid[2] if len(grid) > 2 else 1):
            for y in range(grid[1] if len(grid) > 1 else 1):
                for x in range(grid[0]):
                    with np.errstate(all="ignore"):
                        self._cta((x, y, z), grid)

    def _cta(self, cta, grid):
        T = self.threads
        self.T, self.R, self.every = T, {}, np.ones(T, bool)
        self.smem = np.full(self.shared_bytes, 0xCB, np.uint8)  # poison
        self.writer = np.full(self.shared_bytes, -1, np.int32)  # last writer since a barrier
        self.reader = np.full(self.shared_bytes, -1, np.int32)  # a reader since a barrier
        self.groups, self.open = [], []
        self.unfenced = np.zeros(self.shared_bytes, bool)  # written, unseen by wgmma
        self.products = Products(self.shared_bytes)
        self.barriers, self.flying = {}, np.zeros(self.shared_bytes, bool)
        tid = np.arange(T, dtype=np.uint32)
        g = (*grid, 1, 1)

        def full(v):
            return np.full(T, v, np.uint32)

        self.special = {
            "%tid.x": tid,
            "%tid.y": full(0),
            "%tid.z": full(0),
            "%ntid.x": full(T),
            "%ntid.y": full(1),
            "%ctaid.x": full(cta[0]),
            "%ctaid.y": full(cta[1]),
            "%ctaid.z": full(cta[2]),
            "%nctaid.x": full(g[0]),
            "%nctaid.y": full(g[1]),
            "%nctaid.z": full(g[2]),
            "%laneid": tid & 31,
            "%warpid": tid >> 5,
        }
        pc, steps = 0, 0
        while pc < len(self.code):
            ins = self.code[pc]
            steps += 1
            if steps > 3_000_000:
                raise PTXError("no end after 3 million instructions")
            if ins.pred:
                p = self.R[ins.pred[0]]
                self.mask = ~p if ins.pred[1] else p
            else:
                self.mask = self.every
            name = ins.op[0]
            if name == "bra":
                if ins.pred is None or self.mask.all():
                    pc = self._target(ins)
                    continue
                if self.mask.any():
                    raise Unsupported(f"line {ins.line}: divergent branch: {ins.text}")
                pc += 1
                continue
            if name in ("ret", "exit"):
                if self.mask.all():
                    self.check_left()
                    return
                if self.mask.any():
                    raise Unsupported(f"line {ins.line}: divergent return")
                pc += 1
                continue
            fn = getattr(self, "op_" + name, None)
            if fn is None:
                raise Unsupported(f"line {ins.line}: {ins.text}")
            try:
                fn(ins)
            except (PTXError, Unsupported) as e:
                raise type(e)(f"{self.name}, PTX line {ins.line}: {ins.text}: {e}") from None
            pc += 1
