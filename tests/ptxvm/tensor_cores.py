"""``mma.sync`` and ``wgmma`` with the fragment layouts of the PTX ISA."""

from __future__ import annotations

import re

import numpy as np

from .formats import bf16_to_f32, bits_of_f32, fp8_to_f32, split_operands
from .lanes import Lanes, PTXError, Unsupported

#: Of an operand, where it is not one.
_BYTES = {"f16": 2, "bf16": 2, "tf32": 4}


def _tf32(bits):
    """The 19 bits that count of float32."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


class TensorCoreOps(Lanes):
    """Matrix products of a warp or a warpgroup."""

    def op_mma(self, i):
        m, n, k = map(
            int,
            re.match(
                r"m(\d+)n(\d+)k(\d+)", next(o for o in i.op if re.match(r"m\d+n\d+k\d+$", o))
            ).groups(),
        )
        formats = [
            o
            for o in i.op
            if o
            in ("f32", "f16", "bf16", "s32", "s8", "u8", "s4", "u4", "e4m3", "e5m2", "e2m1", "tf32")
        ]
        dt, at, bt, ct = formats[:4] if "block_scale" in i.op else formats[-4:]
        D, A, B, C = (split_operands(a.strip("{} ")) for a in i.args[:4])
        W = self.T // 32
        e = {
            "s4": 8,
            "u4": 8,
            "e2m1": 8,
            "s8": 4,
            "u8": 4,
            "e4m3": 4,
            "e5m2": 4,
            "f16": 2,
            "bf16": 2,
            "tf32": 1,
        }[at]

        def unpack(name, ty):  # -> (W, 32, e) numbers
            r = self.raw(name, 32).reshape(W, 32)
            if ty in ("s4", "u4"):
                v = (r[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
                return (
                    np.where(v > 7, v.astype(np.int64) - 16, v)
                    if ty == "s4"
                    else v.astype(np.int64)
                )
            if ty == "e2m1":
                v = (r[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
                return np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[v & 7] * np.where(v & 8, -1.0, 1.0)
            if ty in ("s8", "u8"):
                b = np.ascontiguousarray(r).view(np.uint8).reshape(W, 32, 4)
                return b.view(np.int8).astype(np.int64) if ty == "s8" else b.astype(np.int64)
            if ty in ("e4m3", "e5m2"):
                return fp8_to_f32(
                    np.ascontiguousarray(r).view(np.uint8).reshape(W, 32, 4), ty
                ).astype(np.float64)
            if ty == "f16":
                return np.ascontiguousarray(r).view(np.float16).reshape(W, 32, 2).astype(np.float64)
            if ty == "bf16":
                return bf16_to_f32(
                    np.ascontiguousarray(r).view(np.uint16).reshape(W, 32, 2)
                ).astype(np.float64)
            return _tf32(np.ascontiguousarray(r)).reshape(W, 32, 1)

        lane = np.arange(32)
        g, t = lane >> 2, lane & 3
        # Integers in float64 too: exact, and NumPy's integer product is many times slower.
        a = np.zeros((W, m, k))
        b = np.zeros((W, k, n))
        ke = np.arange(e)
        rows_per = 2 if m == 16 else 1
        for r, name in enumerate(A):
            row, col = g + 8 * (r % rows_per), e * t[:, None] + ke + 4 * e * (r // rows_per)
            a[:, row[:, None], col] = unpack(name, at)
        for r, name in enumerate(B):
            b[:, e * t[:, None] + ke + 4 * e * r, g[:, None]] = unpack(name, bt)
        if "block_scale" in i.op:
            if "mxf4nvf4" not in "".join(i.op) and "mxf4" not in "".join(i.op):
                raise Unsupported("block scale of this kind")
            count = int(
                next(o for o in i.op if o.startswith("scale_vec"))[-2]
            )  # scales per row of k

            def scales(reg, select, rows):
                byte, thread = (int(x, 0) for x in split_operands(select.strip("{} ")))
                r = np.ascontiguousarray(self.raw(reg, 32)).view(np.uint8).reshape(W, 32, 4)
                r = r[..., byte : byte + count]
                x = (
                    fp8_to_f32(r, "e4m3")
                    if i.op[-1] == "ue4m3"
                    else np.exp2(r.astype(np.float64) - 127)
                )
                quad = 4 * np.arange(8)
                if rows == 16:  # a pair of threads: rows g and g + 8
                    return np.concatenate([x[:, quad + 2 * thread], x[:, quad + 2 * thread + 1]], 1)
                return x[:, quad + thread]

            a = a * np.repeat(scales(i.args[4], i.args[5], 16), k // count, axis=2)
            b = b * np.repeat(scales(i.args[6], i.args[7], 8), k // count, axis=2).transpose(
                0, 2, 1
            )
        c = np.zeros((W, m, n))
        packed = ct == "f16"
        for r, name in enumerate(C):
            raw = self.raw(name, 32).reshape(W, 32)
            if packed:
                c[:, (g + 8 * r)[:, None], 2 * t[:, None] + np.arange(2)] = (
                    np.ascontiguousarray(raw).view(np.float16).reshape(W, 32, 2)
                )
            else:
                v = (
                    raw.view(np.int32)
                    if ct == "s32"
                    else np.ascontiguousarray(raw).view(np.float32)
                )
                c[:, g + 8 * (r // 2), 2 * t + (r & 1)] = v
        d = a @ b + c
        if dt == "s32":
            d = np.clip(d, -(2**31), 2**31 - 1) if "satfinite" in i.op else d
        if not self.mask.all():
            raise Unsupported("predicated mma")
        for r, name in enumerate(D):
            if packed:
                v = np.ascontiguousarray(
                    d[:, (g + 8 * r)[:, None], 2 * t[:, None] + np.arange(2)].astype(np.float16)
                ).view(np.uint32)[..., 0]
            else:
                v = d[:, g + 8 * (r // 2), 2 * t + (r & 1)]
                v = (
                    v.astype(np.int64).astype(np.int32).view(np.uint32)
                    if dt == "s32"
                    else bits_of_f32(v)
                )
            self._set(name, v.reshape(-1))

    def _wgmma_operand(self, desc, rows, k, ty, transposed, warpgroup):
        """Matrix [rows, k] of a shared-memory descriptor (PTX ISA, "Matrix Descriptor")."""
        size = _BYTES.get(ty, 1)
        start, lead, stride = (
            (desc & 0x3FFF) << 4,
            (desc >> 16 & 0x3FFF) << 4,
            (desc >> 32 & 0x3FFF) << 4,
        )
        mode = desc >> 62 & 3
        width, mask = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}[
            mode
        ]  # bytes of a swizzled row
        r, c = np.arange(rows)[:, None], np.arange(k)[None, :]
        if not transposed:  # k is contiguous
            byte = c * size
            at = (
                start
                + r // 8 * stride
                + (r % 8) * width
                + (byte // 16 * lead + byte % 16 if mode == 0 else byte)
            )
        else:  # rows are contiguous
            per = width // size
            at = start + r // per * lead + c // 8 * stride + (c % 8) * width + (r % per) * size
        at = at ^ ((at >> 7 & mask) << 4)
        where = at[..., None] + np.arange(size)
        if where.min() < 0 or where.max() >= self.shared_bytes:
            raise PTXError(
                f"wgmma reads shared memory out of bounds at {int(where.max())}"
                f" of {self.shared_bytes}"
            )
        if self.check_races:
            if (self.writer[where] >= 0).any():
                raise PTXError(
                    "race: wgmma reads shared memory before a barrier after it was written"
                )
            if self.unfenced[where].any():
                raise PTXError("race: wgmma reads shared memory before a fence.proxy.async")
            self.check_landed(where, "wgmma reads")
            self.products.reads(where, warpgroup)
        raw = self.smem[where]
        if ty in ("s8", "u8"):
            return raw[..., 0].view(np.int8 if ty == "s8" else np.uint8).astype(np.int64)
        if ty in ("e4m3", "e5m2"):
            return fp8_to_f32(raw[..., 0], ty).astype(np.float64)
        if ty == "tf32":
            return _tf32(np.ascontiguousarray(raw).view(np.uint32)[..., 0])
        bits = np.ascontiguousarray(raw).view(np.uint16)[..., 0]
        return (bits.view(np.float16) if ty == "f16" else bf16_to_f32(bits)).astype(np.float64)

    def op_wgmma(self, i):
        if i.op[1] == "commit_group":
            self.products.commit()
        if i.op[1] == "wait_group":
            for where, warpgroup in self.products.wait(int(i.args[0], 0)):
                self.reader[where] = warpgroup  # until a barrier: other warps may still read
        if i.op[1] != "mma_async":
            return
        m, n, k = map(
            int,
            re.match(
                r"m(\d+)n(\d+)k(\d+)", next(o for o in i.op if re.match(r"m\d+n\d+k\d+$", o))
            ).groups(),
        )
        dt, at, bt = [
            o
            for o in i.op
            if o in ("f32", "f16", "bf16", "tf32", "s32", "s8", "u8", "e4m3", "e5m2")
        ][-3:]
        D = split_operands(i.args[0].strip("{} "))
        self.products.pending.difference_update(D)  # adding to the same registers is in order
        keep = self.raw(i.args[3], 1)
        imm = [int(a, 0) for a in i.args[4:]]
        sign_a, sign_b = [*imm, 1, 1][:2]
        trans = imm[2:]
        in_regs = i.args[1].startswith("{")
        trans_a, trans_b = (0, trans[0]) if in_regs and trans else [*trans, 0, 0][:2]
        lane = np.arange(32)
        g, t = lane >> 2, lane & 3
        per_reg = 4 // _BYTES.get(at, 1)
        out = [np.zeros(self.T, np.uint32) for _ in D]
        for w0 in range(0, self.T, 128):  # warpgroups
            if in_regs:
                a = np.zeros((m, k))
                for r, name in enumerate(split_operands(i.args[1].strip("{} "))):
                    v = np.ascontiguousarray(self.raw(name, 32)[w0 : w0 + 128].reshape(4, 32))
                    v = (
                        fp8_to_f32(v.view(np.uint8).reshape(4, 32, 4), at)
                        if at[0] == "e"
                        else v.view(np.int8 if at == "s8" else np.uint8).reshape(4, 32, 4)
                        if per_reg == 4
                        else _tf32(v)[..., None]
                        if at == "tf32"
                        else v.view(np.float16).reshape(4, 32, 2)
                        if at == "f16"
                        else bf16_to_f32(v.view(np.uint16).reshape(4, 32, 2))
                    )
                    for w in range(4):
                        a[
                            (16 * w + g + 8 * (r & 1))[:, None],
                            per_reg * t[:, None] + np.arange(per_reg) + 4 * per_reg * (r >> 1),
                        ] = v[w]
            else:
                a = self._wgmma_operand(int(self.raw(i.args[1], 64)[w0]), m, k, at, trans_a, w0)
            b = self._wgmma_operand(int(self.raw(i.args[2], 64)[w0]), n, k, bt, trans_b, w0)
            d = (sign_a * a) @ (sign_b * b).T
            for r, name in enumerate(D):
                old = self.raw(name, 32)[w0 : w0 + 128].reshape(4, 32)
                for w in range(4):
                    if dt == "f16":
                        v = d[
                            (16 * w + g + 8 * (r & 1))[:, None],
                            8 * (r >> 1) + 2 * t[:, None] + np.arange(2),
                        ]
                        if keep[w0]:
                            v = v + np.ascontiguousarray(old[w]).view(np.float16).reshape(32, 2)
                        bits = np.ascontiguousarray(v.astype(np.float16)).view(np.uint32)[:, 0]
                    else:
                        v = d[16 * w + g + 8 * (r >> 1 & 1), 8 * (r >> 2) + 2 * t + (r & 1)]
                        if dt == "s32":
                            v = v.astype(np.int64) + (old[w].view(np.int32) if keep[w0] else 0)
                            bits = v.astype(np.int32).view(np.uint32)
                        else:
                            bits = bits_of_f32(
                                v
                                + (np.ascontiguousarray(old[w]).view(np.float32) if keep[w0] else 0)
                            )
                    out[r][w0 + 32 * w : w0 + 32 * w + 32] = bits
        for name, v in zip(D, out, strict=True):
            self._set(name, v)
        if self.check_races:
            self.products.writes(D)
