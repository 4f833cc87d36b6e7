"""Warp shuffles and votes, barriers, bit operations, predicates and atomics."""

from __future__ import annotations

import numpy as np

from .formats import UINT, WIDTH, decode, encode
from .lanes import Lanes, Unsupported

_ATOMICS = {
    "add": lambda old, x: old + x,
    "min": np.minimum,
    "max": np.maximum,
    "exch": lambda old, x: x,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
}


class BitOps(Lanes):
    """Everything that works on bits and on whole warps."""

    def op_shfl(self, i):
        mode = i.op[2]
        dst = i.args[0].split("|")[0]
        v, b = self.raw(i.args[1], 32), self.raw(i.args[2], 32).astype(np.int64)
        lane = np.arange(self.T) & 31
        c = self.raw(i.args[3], 32).astype(np.int64)
        seg, clamp = (c >> 8) & 31, c & 31
        lo = lane & seg
        hi = lo | (clamp & ~seg)
        src = {"bfly": lane ^ b, "idx": lo | (b & ~seg), "up": lane - b, "down": lane + b}[mode]
        ok = src >= hi if mode == "up" else src <= hi
        src = np.where(ok, src, lane)
        self._set(dst, v[(np.arange(self.T) & ~31) + src])

    def op_movmatrix(self, i):
        """The transpose of 8 x 8 halves: lane 4 g + t has row g, columns 2 t and 2 t + 1."""
        if not self.mask.all():
            raise Unsupported("predicated movmatrix")
        halves = np.ascontiguousarray(self.raw(i.args[1], 32)).view(np.uint16).reshape(-1, 8, 8)
        turned = np.ascontiguousarray(halves.transpose(0, 2, 1)).reshape(-1)
        self._set(i.args[0], turned.view(np.uint32))

    def op_redux(self, i):
        v = self.read(i.args[1], i.op[-1]).reshape(-1, 1, 32)
        if "abs" in i.op:
            v = np.abs(v)
        numbers = "NaN" not in i.op  # NaN doesn't count, as in max and min
        # Every thread reduces over the lanes that its mask names.
        members = self.raw(i.args[2], 32).reshape(-1, 32, 1) >> np.arange(32, dtype=np.uint32) & 1
        ufunc, outside = {
            "add": (np.add, 0),
            "min": (np.fmin if numbers else np.minimum, None),
            "max": (np.fmax if numbers else np.maximum, None),
            "and": (np.bitwise_and, -1),
            "or": (np.bitwise_or, 0),
        }[i.op[2]]
        if outside is None:  # a lane's own value changes no extreme
            own = v.reshape(-1, 32, 1)
            values = np.where(members != 0, v, own)
        else:
            values = np.where(members != 0, v, np.array(outside).astype(v.dtype))
        self.write(i.args[0], ufunc.reduce(values, axis=2).reshape(-1).astype(v.dtype), i.op[-1])

    def op_vote(self, i):
        v = self.raw(i.args[1].lstrip("!"), 1).reshape(-1, 32)
        v = ~v if i.args[1].startswith("!") else v
        if "ballot" in i.op:
            self._set(
                i.args[0],
                np.repeat((v * (1 << np.arange(32, dtype=np.uint64))).sum(1), 32).astype(np.uint32),
            )
        else:
            self._set(i.args[0], np.repeat(v.all(1) if "all" in i.op else v.any(1), 32))

    def op_activemask(self, i):
        self._set(i.args[0], np.full(self.T, 0xFFFFFFFF, np.uint32))

    def op_bar(self, i):
        if i.op[1] in ("sync", "red") or "sync" in i.op:
            if "warp" in i.op:
                return
            self.writer[:] = -1
            self.reader[:] = -1
            return
        raise Unsupported("barrier")

    op_barrier = op_bar

    def op_membar(self, i):
        pass

    def op_fence(self, i):
        if "proxy" in i.op:
            self.unfenced[:] = False

    def _bitwise(self, i, f):
        ty = i.op[-1]
        if ty == "pred":
            args = [
                ~self.raw(a[1:], 1) if a.startswith("!") else self.raw(a, 1) for a in i.args[1:]
            ]
            self._set(i.args[0], f(*args))
        else:
            self.write(i.args[0], f(*[self.raw(a, WIDTH[ty]) for a in i.args[1:]]), f"b{WIDTH[ty]}")

    def op_and(self, i):
        self._bitwise(i, lambda a, b: a & b)

    def op_or(self, i):
        self._bitwise(i, lambda a, b: a | b)

    def op_xor(self, i):
        self._bitwise(i, lambda a, b: a ^ b)

    def op_not(self, i):
        self._bitwise(i, lambda a: ~a)

    def op_shl(self, i):
        w = WIDTH[i.op[-1]]
        a, n = self.raw(i.args[1], w), self.raw(i.args[2], 32).astype(UINT[w])
        self.write(
            i.args[0], np.where(n >= w, 0, a << np.minimum(n, w - 1)).astype(UINT[w]), f"b{w}"
        )

    def op_shr(self, i):
        ty = i.op[-1]
        w = WIDTH[ty]
        a, n = self.read(i.args[1], ty), self.raw(i.args[2], 32).astype(np.int64)
        y = a >> np.minimum(n, w - 1).astype(a.dtype)
        self.write(i.args[0], y if ty[0] == "s" else np.where(n >= w, 0, y).astype(a.dtype), ty)

    def op_shf(self, i):
        lo, hi = (
            self.raw(i.args[1], 32).astype(np.uint64),
            self.raw(i.args[2], 32).astype(np.uint64),
        )
        n = self.raw(i.args[3], 32).astype(np.uint64)
        n = np.minimum(n, 32) if "clamp" in i.op else n & np.uint64(31)
        x = (hi << np.uint64(32)) | lo
        y = (x << n) >> np.uint64(32) if "l" in i.op else x >> n
        self._set(i.args[0], (y & np.uint64(0xFFFFFFFF)).astype(np.uint32))

    def op_bfe(self, i):
        ty = i.op[-1]
        a = self.raw(i.args[1], 32)
        p, n = self.raw(i.args[2], 32) & 255, self.raw(i.args[3], 32) & 255
        v = np.where(
            n == 0,
            0,
            (a.astype(np.uint64) >> np.minimum(p, 32).astype(np.uint64))
            & ((np.uint64(1) << np.minimum(n, 32).astype(np.uint64)) - np.uint64(1)),
        ).astype(np.uint32)
        if ty[0] == "s":
            s = np.uint32(1) << np.minimum(n - 1, 31)
            v = ((v ^ s) - s).astype(np.uint32)
        self._set(i.args[0], v)

    def op_bfi(self, i):
        a, b = self.raw(i.args[1], 32), self.raw(i.args[2], 32)
        p, n = int(self.raw(i.args[3], 32)[0]), int(self.raw(i.args[4], 32)[0])
        m = np.uint32((((1 << n) - 1) << p) & 0xFFFFFFFF)
        self._set(i.args[0], ((a << np.uint32(p)) & m) | (b & ~m))

    def op_lop3(self, i):
        a, b, c = (self.raw(x, 32) for x in i.args[1:4])
        lut = int(i.args[4], 0)
        y = np.zeros(self.T, np.uint32)
        for k in range(8):
            if lut >> k & 1:
                y |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        self._set(i.args[0], y)

    def op_prmt(self, i):
        if len(i.op) > 2:
            raise Unsupported("prmt mode")
        a, b, s = (self.raw(x, 32) for x in i.args[1:4])
        src = np.ascontiguousarray(np.stack([a, b], 1)).view(np.uint8).reshape(-1, 8)
        out = np.zeros((self.T, 4), np.uint8)
        for k in range(4):
            sel = (s >> np.uint32(4 * k)) & np.uint32(15)
            v = src[np.arange(self.T), (sel & 7).astype(np.int64)]
            out[:, k] = np.where(sel & 8, np.where(v & 128, 255, 0), v)
        self._set(i.args[0], out.view(np.uint32)[:, 0])

    def op_popc(self, i):
        w = WIDTH[i.op[-1]]
        v = self.raw(i.args[1], w)
        self._set(i.args[0], np.array([bin(int(x)).count("1") for x in v], np.uint32))

    def op_clz(self, i):
        w = WIDTH[i.op[-1]]
        self._set(
            i.args[0],
            np.array([w - int(x).bit_length() for x in self.raw(i.args[1], w)], np.uint32),
        )

    def op_setp(self, i):
        ty, targets = i.op[-1], i.args[0].split("|")
        if ty == "f16x2":
            # One predicate for each half, the lower one first.
            x, y = (self.raw(arg, 32).astype(np.uint32) for arg in i.args[1:3])
            for shift, target in zip((0, 16), targets, strict=True):
                halves = ((v >> shift).astype(np.uint16).view(np.float16) for v in (x, y))
                self._set(target, self._compared(i, *halves))
            return
        y = self._compared(i, self.read(i.args[1], ty), self.read(i.args[2], ty))
        self._set(targets[0], y)
        if len(targets) > 1:
            raise Unsupported("setp with a second predicate")

    def _compared(self, i, a, b):
        cmp = i.op[1]
        un = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(self.T, bool)
        base = {
            "eq": a == b,
            "ne": (a != b) & ~un,
            "lt": a < b,
            "le": a <= b,
            "gt": a > b,
            "ge": a >= b,
            "lo": a < b,
            "ls": a <= b,
            "hi": a > b,
            "hs": a >= b,
            "num": ~un,
            "nan": un,
        }
        y = base[cmp] if cmp in base else base[cmp[:-1]] | un  # equ, neu, ltu, ...
        if i.op[2] in ("and", "or", "xor"):
            q = i.args[3]
            q = ~self.raw(q[1:], 1) if q.startswith("!") else self.raw(q, 1)
            y = {"and": y & q, "or": y | q, "xor": y ^ q}[i.op[2]]
        return y

    def op_atom(self, i):
        ty = i.op[-1]
        w = WIDTH[ty]
        dst, addr = (i.args[0], i.args[1]) if i.op[0] == "atom" else (None, i.args[0])
        kind = next(
            o for o in i.op if o in ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc")
        )
        space, at = self._space(i.op), self.address(addr)
        val = self.read(i.args[-1], ty)
        old = np.zeros(self.T, UINT[w])
        every = self.mask.copy()
        for t in np.nonzero(every)[0]:
            self.mask = np.zeros(self.T, bool)
            self.mask[t] = True
            races, self.check_races = self.check_races, False
            cur = np.ascontiguousarray(self._gather(space, at, w // 8)[t : t + 1]).view(UINT[w])[
                :, 0
            ]
            old[t] = cur[0]
            c = decode(cur, ty)
            if kind == "cas":
                new = val[t : t + 1] if c[0] == self.read(i.args[-2], ty)[t] else c
            else:
                new = _ATOMICS[kind](c, val[t : t + 1])
            data = np.zeros((self.T, w // 8), np.uint8)
            data[t] = np.ascontiguousarray(encode(new, ty)).view(np.uint8)[: w // 8]
            self._scatter(space, at, data)
            self.check_races = races
        self.mask = every
        if dst:
            self._set(dst, old)

    op_red = op_atom
