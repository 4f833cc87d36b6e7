"""The registers of one CTA: one array lane per thread, and how operands are read and written."""

from __future__ import annotations

import re

import numpy as np

from .formats import UINT, WIDTH, decode, encode, split_operands


class PTXError(RuntimeError):
    """The program did something that a GPU would fault or race on."""


class Unsupported(NotImplementedError):
    """The program uses an instruction that this machine does not model."""


class Products:
    """``wgmma`` products that nobody has waited for yet.

    They are computed at once; what they read and write is kept, so that whoever touches it too
    early is caught.

    Attributes:
        pending: registers that are being written.
        read: how many products read each byte of shared memory.
    """

    def __init__(self, shared_bytes):
        self.pending = set()
        self.read = np.zeros(shared_bytes, np.int32)
        self.open = set(), []
        self.groups = []

    def writes(self, registers):
        self.pending.update(registers)
        self.open[0].update(registers)

    def renames(self, source, targets):
        """A register that is being written gets other names, as LLVM does before the wait."""
        for registers, _ in (*self.groups, self.open):
            if source in registers:
                registers.update(targets)
        self.pending.update((source, *targets))

    def reads(self, where, warpgroup):
        where = np.unique(where)
        self.read[where] += 1
        self.open[1].append((where, warpgroup))

    def commit(self):
        self.groups.append(self.open)
        self.open = set(), []

    def wait(self, keep):
        """All but the latest groups are done; returns what they read."""
        done = self.groups[: len(self.groups) - keep]
        self.groups = self.groups[len(done) :]
        read = [entry for group in done for entry in group[1]]
        for where, _ in read:
            self.read[where] -= 1
        self.pending = set().union(self.open[0], *(group[0] for group in self.groups))
        return read


class Lanes:
    """State that every group of instructions works on."""

    T: int  # threads
    R: dict  # register name -> bits, one per thread
    mask: np.ndarray  # threads whose predicate is true
    every: np.ndarray  # all of them
    special: dict  # %tid.x and friends
    products: Products
    param: dict  # name -> value

    def read(self, a, ty):
        """Operand string -> value array of PTX type `ty`."""
        return decode(self.raw(a, WIDTH[ty], ty), ty)

    def raw(self, a, width, ty=None):
        T = self.T
        if a in self.products.pending:
            raise PTXError(f"race: {a} is read before wgmma.wait_group")
        r = self.R.get(a)
        if r is not None:
            return r if width == 1 or r.dtype == bool else r.astype(UINT[width], copy=False)
        if a.startswith("{"):
            parts = [
                self.raw(p, width // len(split_operands(a[1:-1])), None)
                for p in split_operands(a[1:-1])
            ]
            w = width // len(parts)
            out = np.zeros(T, UINT[width])
            for i, p in enumerate(parts):
                out |= p.astype(UINT[width]) << UINT[width](i * w)
            return out
        if a in self.special:
            return self.special[a].astype(UINT[max(width, 8)])
        if a.startswith("%"):  # undef
            return np.zeros(T, bool if width == 1 else UINT[width])
        if a.startswith("-") and a[1:].startswith("%"):
            raise Unsupported("negated operand")
        if re.match(r"^0[fF][0-9a-fA-F]{8}$", a):
            v = int(a[2:], 16)
            return np.full(
                T,
                np.array(np.uint32(v)).view(np.float32).astype(np.float64).view(np.uint64)
                if width == 64
                else v,
                UINT[width],
            )
        if re.match(r"^0[dD][0-9a-fA-F]{16}$", a):
            return np.full(T, int(a[2:], 16), np.uint64)
        if re.match(r"^-?(0x[0-9a-fA-F]+|\d+)U?$", a):
            v = int(a.rstrip("U"), 0)
            if width == 1:
                return np.full(T, bool(v))
            return np.full(T, v & ((1 << width) - 1), UINT[width])
        if a in self.param:  # its address, which only a tensor map's is needed of
            return np.full(T, self.param[a], UINT[width])
        if re.match(r"^[A-Za-z_$][\w$]*$", a):  # a symbol: shared memory starts at 0
            return np.zeros(T, UINT[width])
        raise Unsupported(f"operand {a!r}")

    def write(self, a, value, ty):
        bits = encode(value, ty)
        if a == "_":
            return
        if a.startswith("{"):
            parts = split_operands(a[1:-1])
            w = WIDTH[ty] // len(parts)
            for i, p in enumerate(parts):
                self._set(
                    p,
                    ((bits >> bits.dtype.type(i * w)) & bits.dtype.type((1 << w) - 1)).astype(
                        UINT[w]
                    ),
                )
            return
        self._set(a, bits)

    def _set(self, a, bits):
        if a == "_":
            return
        if a in self.products.pending:
            raise PTXError(f"race: {a} is written before wgmma.wait_group")
        if bits.shape != (self.T,):
            bits = np.broadcast_to(bits, (self.T,))
        if self.mask is self.every or self.mask.all():
            self.R[a] = bits  # registers are replaced, never written to
            return
        old = self.R.get(a)
        old = np.zeros(self.T, bits.dtype) if old is None else old.astype(bits.dtype)
        self.R[a] = np.where(self.mask, bits, old)

    def address(self, a):
        m = re.match(r"^\[\s*([%\w.$]+)\s*(?:\+\s*(-?\w+))?\s*\]$", a)
        if not m:
            raise Unsupported(f"address {a!r}")
        name = m.group(1)
        narrow = name in self.R and self.R[name].dtype == np.uint32
        base = self.raw(name, 32 if narrow else 64).astype(np.uint64)
        return (base.astype(np.int64) + int(m.group(2) or "0", 0)).astype(np.uint64)
