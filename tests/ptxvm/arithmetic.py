"""Moves, conversions and arithmetic."""

from __future__ import annotations

import functools

import numpy as np

from .formats import (
    SINT,
    UINT,
    WIDTH,
    bf16_to_f32,
    bits_of_f16,
    f16_of,
    f32_to_bf16,
    f32_to_e2m1,
    f32_to_fp8,
    fp8_to_f32,
    split_operands,
)
from .lanes import Lanes


def _one_off(x):
    """The neighbour towards zero of every float32."""
    return np.nextafter(x.astype(np.float32), np.float32(0))


class ArithmeticOps(Lanes):
    """Instructions on numbers."""

    def op_mov(self, i):
        ty = i.op[-1]
        moving = self.products.pending.intersection(split_operands(i.args[1].strip("{} ")))
        self.products.pending -= moving
        self.write(
            i.args[0], self.raw(i.args[1], WIDTH[ty]), ty if ty == "pred" else f"b{WIDTH[ty]}"
        )
        for source in moving:
            self.products.renames(source, split_operands(i.args[0].strip("{} ")))

    def op_cvta(self, i):
        self.write(i.args[0], self.raw(i.args[1], 64), "b64")

    def op_selp(self, i):
        w = WIDTH[i.op[-1]]
        p = self.raw(i.args[3], 1)
        self.write(i.args[0], np.where(p, self.raw(i.args[1], w), self.raw(i.args[2], w)), f"b{w}")

    def op_cvt(self, i):
        ty = [o for o in i.op[1:] if o in WIDTH or o in ("e4m3x2", "e5m2x2", "e2m1x2", "tf32")]
        to, fr = ty[-2:]
        if to in ("e4m3x2", "e5m2x2"):
            if fr == "f16x2":
                x = (
                    np.ascontiguousarray(self.raw(i.args[1], 32))
                    .view(np.float16)
                    .reshape(-1, 2)
                    .astype(np.float32)
                )
                lo, hi = x[:, 0], x[:, 1]
            else:
                hi, lo = self.read(i.args[1], "f32"), self.read(i.args[2], "f32")
            if "relu" in i.op:
                lo, hi = np.maximum(lo, 0), np.maximum(hi, 0)
            v = f32_to_fp8(lo, to[:4]).astype(np.uint16) | (
                f32_to_fp8(hi, to[:4]).astype(np.uint16) << 8
            )
            self._set(i.args[0], v)
            return
        if to == "e2m1x2":
            hi, lo = self.read(i.args[1], "f32"), self.read(i.args[2], "f32")
            self._set(i.args[0], f32_to_e2m1(lo) | f32_to_e2m1(hi) << 4)
            return
        if fr in ("e4m3x2", "e5m2x2"):
            b = self.raw(i.args[1], 16)
            v = np.stack([fp8_to_f32(b & 255, fr[:4]), fp8_to_f32(b >> 8, fr[:4])], 1).astype(
                np.float16
            )
            self._set(i.args[0], np.ascontiguousarray(v).view(np.uint32)[:, 0])
            return
        if to in ("f16x2", "bf16x2"):
            hi, lo = self.read(i.args[1], "f32"), self.read(i.args[2], "f32")
            enc = bits_of_f16 if to == "f16x2" else f32_to_bf16
            self._set(i.args[0], enc(lo).astype(np.uint32) | (enc(hi).astype(np.uint32) << 16))
            return
        if to == "tf32":
            self._set(
                i.args[0], (self.raw(i.args[1], 32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
            )
            return
        x = self.read(i.args[1], fr)
        if to in ("f32", "f16", "bf16", "f64"):
            y = x.astype(np.float64 if to == "f64" else np.float32)
            if fr[0] in "fb" and "rni" in i.op:
                y = np.rint(y)
            elif "rmi" in i.op:
                y = np.floor(y)
            elif "rpi" in i.op:
                y = np.ceil(y)
            elif "rzi" in i.op:
                y = np.trunc(y)
            if "sat" in i.op:
                y = np.clip(np.nan_to_num(y), 0, 1)
            self.write(i.args[0], y, to)
            return
        w, info = WIDTH[to], None
        if fr in ("f32", "f16", "bf16", "f64"):
            y = x.astype(np.float64)
            y = (
                np.rint(y)
                if "rni" in i.op
                else np.floor(y)
                if "rmi" in i.op
                else np.ceil(y)
                if "rpi" in i.op
                else np.trunc(y)
            )
            info = np.iinfo(SINT[w] if to[0] == "s" else UINT[w])
            y = np.clip(
                np.nan_to_num(y, nan=0.0, posinf=float(info.max), neginf=float(info.min)),
                float(info.min),
                float(info.max),
            )
            x = y.astype(np.int64 if to[0] == "s" else np.uint64)
        elif "sat" in i.op:
            info = np.iinfo(SINT[w] if to[0] == "s" else UINT[w])
            x = np.clip(x.astype(np.int64), info.min, info.max)
        if x.dtype.kind == "i":
            x = x.astype(np.int64)
        bits = x.astype(np.uint64) if x.dtype.kind == "u" else x.view(np.uint64)
        bits = bits & np.uint64((1 << w) - 1) if w < 64 else bits
        if w == 8:  # lives in a wider register, sign-extended
            b = bits.astype(np.uint8)
            self._set(
                i.args[0],
                b.view(np.int8).astype(np.int32).view(np.uint32)
                if to == "s8"
                else b.astype(np.uint32),
            )
            return
        self._set(i.args[0], bits.astype(UINT[w]))

    def _arith(self, i, f, fint=None):
        ty = i.op[-1]
        if ty in ("f16x2", "bf16x2"):
            dec, enc = (f16_of, bits_of_f16) if ty == "f16x2" else (bf16_to_f32, f32_to_bf16)
            ops = [self.raw(a, 32) for a in i.args[1:]]
            lo = enc(f(*[dec((o & 0xFFFF).astype(np.uint16)).astype(np.float32) for o in ops]))
            hi = enc(f(*[dec((o >> 16).astype(np.uint16)).astype(np.float32) for o in ops]))
            self._set(i.args[0], lo.astype(np.uint32) | (hi.astype(np.uint32) << 16))
            return
        if ty == "f32x2":
            ops = [
                np.ascontiguousarray(self.raw(a, 64))
                .view(np.float32)
                .reshape(-1, 2)
                .astype(np.float64)
                for a in i.args[1:]
            ]
            self._set(
                i.args[0], np.ascontiguousarray(f(*ops).astype(np.float32)).view(np.uint64)[:, 0]
            )
            return
        sources = [ty] * (len(i.args) - 1)
        if ty in ("f16", "bf16") and i.op[-2] == "f32":
            # sm_100 and later: f32 arithmetic that reads all but its last operand in a half type.
            sources[-1] = ty = "f32"
        v = [self.read(a, kind) for a, kind in zip(i.args[1:], sources, strict=True)]
        if ty in ("f32", "f16", "bf16", "f64"):
            up = (
                np.float64
                if ty in ("f32", "f64") and len(v) == 3
                else np.float32
                if ty != "f64"
                else np.float64
            )
            if "rp" in i.op:
                exact = f(*[x.astype(np.float64) for x in v])
                y = exact.astype(np.float32)
                y = np.where(y < exact, np.nextafter(y, np.float32(np.inf)), y)
            else:
                y = f(*[x.astype(up) for x in v])
                y = y.astype(np.float64 if ty == "f64" else np.float32)
            if "sat" in i.op:
                y = np.clip(np.nan_to_num(y), 0, 1)
            if "ftz" in i.op:
                y = np.where(np.abs(y) < np.finfo(np.float32).tiny, np.float32(0), y)
            self.write(i.args[0], y, ty)
        else:
            self.write(i.args[0], (fint or f)(*v), ty)

    def op_add(self, i):
        self._arith(i, lambda a, b: a + b)

    def op_sub(self, i):
        self._arith(i, lambda a, b: a - b)

    def op_fma(self, i):
        self._arith(i, lambda a, b, c: a * b + c)

    def op_div(self, i):
        def idiv(a, b):
            b = np.where(b == 0, 1, b).astype(a.dtype)
            return (
                np.trunc(a.astype(np.float64) / b.astype(np.float64))
                .astype(np.int64)
                .astype(a.dtype)
                if a.dtype.kind == "i" and a.dtype.itemsize < 8
                else a // b
            )

        # `div.full` and `div.approx` may be wrong in the last place, so here they always are: what
        # must be reproducible has to ask for IEEE division.
        inexact = "full" in i.op or "approx" in i.op
        self._arith(i, (lambda a, b: _one_off(a / b)) if inexact else (lambda a, b: a / b), idiv)

    def op_rem(self, i):
        self._arith(i, np.fmod, lambda a, b: np.fmod(a, np.where(b == 0, 1, b).astype(a.dtype)))

    def op_neg(self, i):
        self._arith(i, lambda a: -a)

    def op_copysign(self, i):
        self._arith(i, lambda sign, x: np.copysign(x, sign))

    def op_abs(self, i):
        self._arith(i, np.abs)

    def op_max(self, i):
        pick = np.maximum if "NaN" in i.op else np.fmax
        self._arith(i, lambda *v: functools.reduce(pick, v), np.maximum)  # sm_100 has max of three

    def op_min(self, i):
        pick = np.minimum if "NaN" in i.op else np.fmin
        self._arith(i, lambda *v: functools.reduce(pick, v), np.minimum)

    def _wide(self, i):
        ty = i.op[-1]
        if "wide" in i.op:
            big = {
                32: np.int64 if ty[0] == "s" else np.uint64,
                16: np.int32 if ty[0] == "s" else np.uint32,
            }[WIDTH[ty]]
            v = self.read(i.args[1], ty).astype(big) * self.read(i.args[2], ty).astype(big)
            wide = ("s" if ty[0] == "s" else "u") + str(2 * WIDTH[ty])
        elif "hi" in i.op:
            a, b = (self.read(x, ty).astype(object) for x in i.args[1:3])
            v = np.array((a * b) >> WIDTH[ty], dtype=object)
            v = np.array([int(x) & ((1 << WIDTH[ty]) - 1) for x in v], UINT[WIDTH[ty]]).view(
                SINT[WIDTH[ty]] if ty[0] == "s" else UINT[WIDTH[ty]]
            )
            wide = ty
        else:
            v, wide = self.read(i.args[1], ty) * self.read(i.args[2], ty), ty
        return v, wide

    def op_mul(self, i):
        if i.op[-1] in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2", "f32x2"):
            return self._arith(i, lambda a, b: a * b)
        v, ty = self._wide(i)
        self.write(i.args[0], v, ty)

    op_mul24 = op_mul

    def op_mad(self, i):
        if i.op[-1] in ("f32", "f64"):
            return self._arith(i, lambda a, b, c: a * b + c)
        v, ty = self._wide(i)
        self.write(i.args[0], v + self.read(i.args[3], ty), ty)

    def op_dp4a(self, i):
        a, b = (
            np.ascontiguousarray(self.raw(x, 32))
            .view(np.int8 if ty == "s32" else np.uint8)
            .reshape(-1, 4)
            .astype(np.int64)
            for x, ty in zip(i.args[1:3], i.op[1:3], strict=True)
        )
        total = self.raw(i.args[3], 32).astype(np.int64) + (a * b).sum(1)
        self._set(i.args[0], (total & 0xFFFFFFFF).astype(np.uint32))

    def op_ex2(self, i):
        self._arith(i, np.exp2)

    def op_lg2(self, i):
        self._arith(i, np.log2)

    def op_rcp(self, i):
        inexact = "approx" in i.op
        self._arith(i, (lambda a: _one_off(1 / a)) if inexact else (lambda a: 1 / a))

    def op_sqrt(self, i):
        self._arith(i, np.sqrt)

    def op_rsqrt(self, i):
        self._arith(i, lambda a: 1 / np.sqrt(a))

    def op_sin(self, i):
        self._arith(i, np.sin)

    def op_cos(self, i):
        self._arith(i, np.cos)

    def op_tanh(self, i):
        self._arith(i, np.tanh)
