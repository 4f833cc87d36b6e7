"""Global and shared memory: bounds, races, asynchronous copies, ldmatrix."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import torch

from .formats import SINT, UINT, WIDTH, split_operands
from .lanes import Lanes, PTXError


@dataclass
class Memory:
    """Global memory: the arrays passed in, each at its own guarded address."""

    base: list = field(default_factory=list)
    bufs: list = field(default_factory=list)
    next: int = 1 << 20
    storages: dict = field(default_factory=dict)

    def add(self, arr, skew=0):
        """Map an array and return its address."""
        if not arr.flags.c_contiguous:
            raise ValueError("kernel arguments must be contiguous")
        view = arr.reshape(-1).view(np.uint8)
        at = self.next + skew
        self.base.append(at)
        self.bufs.append(view)
        self.next = ((at + view.size + 0xFFFF) // 0x10000 + 1) * 0x10000
        return at

    def add_tensor(self, x):
        """Map a CPU tensor's storage, shared by its views, and return the address of element 0.

        The address keeps the tensor's alignment, which is what the kernel was specialized on.
        """
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.storages:
            raw = torch.zeros(0, dtype=torch.uint8).set_(storage).numpy()
            self.storages[storage.data_ptr()] = self.add(raw, storage.data_ptr() % 16)
        return self.storages[storage.data_ptr()] + x.data_ptr() - storage.data_ptr()


class MemoryOps(Lanes):
    """Loads, stores and copies."""

    def _space(self, op):
        known = ("global", "shared", "param", "local", "const")
        return next((s.split("__")[0] for s in op if s.split("__")[0] in known), "global")

    def _gather(self, space, addr, n):
        out = np.zeros((self.T, n), np.uint8)
        idx = np.nonzero(self.mask)[0]
        if space == "shared":
            where = self._in_shared("read", addr[idx], n)
            if self.check_races and idx.size:
                w = self.writer[where]
                if ((w >= 0) & (w // 32 != (idx // 32)[:, None])).any():
                    raise PTXError(
                        "race: shared memory read before a barrier after another warp wrote it"
                    )
                self.reader[where] = idx[:, None]
                self.check_landed(where, "a load reads")
            out[idx] = self.smem[where]
            return out
        if off_all := idx.size:
            lo = addr[idx]
            for b, buf in zip(self.mem.base, self.mem.bufs, strict=True):
                sel = (lo >= b) & (lo < b + buf.size + 0x8000)
                if sel.any():
                    off = lo[sel].astype(np.int64) - b
                    if off.max() + n > buf.size:
                        raise PTXError(
                            f"global read out of bounds: byte {int(off.max()) + n - 1}"
                            f" of {buf.size}"
                        )
                    out[idx[sel]] = buf[off[:, None] + np.arange(n)]
                    off_all -= int(sel.sum())
            if off_all:
                raise PTXError("global read at a wild address")
        return out

    def _scatter(self, space, addr, data):
        n = data.shape[1]
        idx = np.nonzero(self.mask)[0]
        if not idx.size:
            return
        if space == "shared":
            where = self._in_shared("write", addr[idx], n)
            if self.check_races:
                self._check_read(where, idx)
                self.check_landed(where, "a store writes")
                w = self.writer[where]
                clash = (w >= 0) & (w // 32 != (idx // 32)[:, None])
                if (clash & (self.smem[where] != data[idx])).any():
                    raise PTXError(
                        "race: shared memory overwritten before a barrier after another warp"
                        " had written it"
                    )
                self.writer[where] = idx[:, None]
                self.unfenced[where] = True
            self.smem[where] = data[idx]
            return
        left = idx.size
        lo = addr[idx]
        for b, buf in zip(self.mem.base, self.mem.bufs, strict=True):
            sel = (lo >= b) & (lo < b + buf.size + 0x8000)
            if sel.any():
                off = lo[sel].astype(np.int64) - b
                if off.max() + n > buf.size:
                    raise PTXError(
                        f"global write out of bounds: byte {int(off.max()) + n - 1} of {buf.size}"
                    )
                buf[off[:, None] + np.arange(n)] = data[idx[sel]]
                left -= int(sel.sum())
        if left:
            raise PTXError("global write at a wild address")

    def _in_shared(self, what, addr, n):
        """Bytes of shared memory, a row of ``n`` for every address."""
        off = addr.astype(np.int64)
        if off.size and (off.min() < 0 or off.max() + n > self.shared_bytes):
            raise PTXError(
                f"shared {what} out of bounds at {int(off.max())} of {self.shared_bytes}"
            )
        return off[:, None] + np.arange(n)

    def _check_read(self, where, threads):
        """Nobody else may still be reading what these threads write, a row of ``where`` each."""
        if self.products.read[where].any():
            raise PTXError("race: shared memory overwritten before wgmma.wait_group")
        w = self.reader[where]
        if ((w >= 0) & (w // 32 != (threads // 32)[:, None])).any():
            raise PTXError(
                "race: shared memory overwritten before a barrier after another warp had read it"
            )

    def op_ld(self, i):
        ty = i.op[-1]
        if "param" in i.op:
            name = i.args[1].strip("[]")
            self.write(
                i.args[0],
                np.full(self.T, self.param[name] & ((1 << WIDTH[ty]) - 1), UINT[WIDTH[ty]]),
                ty if ty[0] not in "f" else f"b{WIDTH[ty]}",
            )
            return
        vec = next((int(o[1]) for o in i.op if re.fullmatch(r"v[248]", o)), 1)
        w = WIDTH[ty] // 8
        data = self._gather(self._space(i.op), self.address(i.args[1]), w * vec)
        dst = split_operands(i.args[0].strip("{} "))
        for k, d in enumerate(dst):
            bits = np.ascontiguousarray(data[:, k * w : (k + 1) * w]).view(UINT[8 * w])[:, 0]
            if ty in ("s8", "s16"):
                bits = bits.view(SINT[8 * w]).astype(np.int32).view(np.uint32)
            self._set(d, bits)

    def op_st(self, i):
        ty = i.op[-1]
        w = WIDTH[ty]
        src = split_operands(i.args[1].strip("{} "))
        data = np.concatenate(
            [
                np.ascontiguousarray(self.raw(s, w).astype(UINT[w]))
                .view(np.uint8)
                .reshape(self.T, w // 8)
                for s in src
            ],
            1,
        )
        self._scatter(self._space(i.op), self.address(i.args[0]), data)

    op_ldu = op_ld

    def op_cp(self, i):
        if "bulk" in i.op:
            self.copy_tile(i)
            return
        if "commit_group" in i.op:
            self.groups.append(self.open)
            self.open = []
            return
        if "wait_group" in i.op or "wait_all" in i.op:
            keep = 0 if "wait_all" in i.op else int(i.args[0], 0)
            if "wait_all" in i.op:
                self.groups.append(self.open)
                self.open = []
            while len(self.groups) > keep:
                for addr, data, mask in self.groups.pop(0):
                    self.mask = mask
                    self._scatter("shared", addr, data)
            return
        n = int(i.args[2], 0)
        dst, src = self.address(i.args[0]), self.address(i.args[1])
        data = np.zeros((self.T, n), np.uint8)
        size = self.raw(i.args[3], 32) if len(i.args) > 3 else np.full(self.T, n, np.uint32)
        issue = self.mask
        for s in np.unique(size[issue]) if issue.any() else []:
            self.mask = issue & (size == s)
            if s:
                data[self.mask, : int(s)] = self._gather("global", src, int(s))[self.mask]
        self.mask = issue
        threads = np.nonzero(issue)[0]
        if self.check_races and threads.size:  # may land from now on
            self._check_read(self._in_shared("write", dst[threads], n), threads)
        self.open.append((dst, data, issue))  # lands at the wait, the latest legal moment

    def op_ldmatrix(self, i):
        num = next(int(o[1]) for o in i.op if re.fullmatch(r"x[124]", o))
        dst, trans = split_operands(i.args[0].strip("{} ")), "trans" in i.op
        addr = self.address(i.args[1])
        lane = np.arange(self.T) & 31
        warp0 = np.arange(self.T) & ~31
        for m in range(num):
            # Threads 8m .. 8m+7 of a warp hold the addresses of the rows of matrix m.
            if not trans:
                a = addr[warp0 + 8 * m + (lane >> 2)] + ((lane & 3) * 4).astype(np.uint64)
                self._set(
                    dst[m], np.ascontiguousarray(self._gather("shared", a, 4)).view(np.uint32)[:, 0]
                )
            else:
                lo = self._gather(
                    "shared",
                    addr[warp0 + 8 * m + 2 * (lane & 3)] + ((lane >> 2) * 2).astype(np.uint64),
                    2,
                )
                hi = self._gather(
                    "shared",
                    addr[warp0 + 8 * m + 2 * (lane & 3) + 1] + ((lane >> 2) * 2).astype(np.uint64),
                    2,
                )
                self._set(
                    dst[m], np.ascontiguousarray(np.concatenate([lo, hi], 1)).view(np.uint32)[:, 0]
                )

    def op_stmatrix(self, i):
        num = next(int(o[1]) for o in i.op if re.fullmatch(r"x[124]", o))
        src, trans = split_operands(i.args[1].strip("{} ")), "trans" in i.op
        addr = self.address(i.args[0])
        lane, warp0 = np.arange(self.T) & 31, np.arange(self.T) & ~31
        for m in range(num):
            v = np.ascontiguousarray(self.raw(src[m], 32)).view(np.uint8).reshape(-1, 4)
            if not trans:
                self._scatter(
                    "shared",
                    addr[warp0 + 8 * m + (lane >> 2)] + ((lane & 3) * 4).astype(np.uint64),
                    v,
                )
            else:
                for h in range(2):
                    self._scatter(
                        "shared",
                        addr[warp0 + 8 * m + 2 * (lane & 3) + h]
                        + ((lane >> 2) * 2).astype(np.uint64),
                        v[:, 2 * h : 2 * h + 2],
                    )
