"""Number formats of PTX: register bits <-> values."""

from __future__ import annotations

import numpy as np
import torch


def f32_of(bits):  # uint32 -> float32 view
    return np.ascontiguousarray(bits, np.uint32).view(np.float32)


def bits_of_f32(x):
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def f16_of(bits):
    return np.ascontiguousarray(bits, np.uint16).view(np.float16)


def bits_of_f16(x):
    return np.ascontiguousarray(x, np.float16).view(np.uint16)


def bf16_to_f32(bits):
    return (np.asarray(bits, np.uint32) << 16).view(np.float32)


def f32_to_bf16(x):
    return (
        torch.from_numpy(np.ascontiguousarray(x, np.float32))
        .to(torch.bfloat16)
        .view(torch.int16)
        .numpy()
        .view(np.uint16)
    )


def fp8_to_f32(bits, kind):
    dt = torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2
    return torch.from_numpy(np.ascontiguousarray(bits, np.uint8)).view(dt).float().numpy()


def f32_to_fp8(x, kind):  # .rn.satfinite
    dt, top = (torch.float8_e4m3fn, 448.0) if kind == "e4m3" else (torch.float8_e5m2, 57344.0)
    x = np.asarray(x, np.float32)
    y = torch.from_numpy(np.clip(x, -top, top)).to(dt).view(torch.uint8).numpy().copy()
    y[np.isnan(x)] = 0x7F
    return y


def f32_to_e2m1(x):  # .rn.satfinite
    x = np.asarray(x, np.float32)
    code = np.zeros(x.shape, np.uint8)
    for i, midpoint in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):  # ties to even codes
        code += (np.abs(x) >= midpoint) if i % 2 else (np.abs(x) > midpoint)
    return np.where(np.isnan(x), np.uint8(7), code | np.signbit(x).astype(np.uint8) << 3)


WIDTH = {
    "b8": 8,
    "u8": 8,
    "s8": 8,
    "b16": 16,
    "u16": 16,
    "s16": 16,
    "f16": 16,
    "bf16": 16,
    "b32": 32,
    "u32": 32,
    "s32": 32,
    "f32": 32,
    "f16x2": 32,
    "bf16x2": 32,
    "b64": 64,
    "u64": 64,
    "s64": 64,
    "f64": 64,
    "f32x2": 64,
    "pred": 1,
    "b128": 128,
}
UINT = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SINT = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


def decode(bits, ty):
    """Raw register bits -> values of PTX type `ty`."""
    if ty == "pred":
        return bits
    w = WIDTH[ty]
    bits = bits.astype(UINT[w], copy=False) if w <= 64 else bits
    if ty == "f32":
        return f32_of(bits)
    if ty == "f64":
        return np.ascontiguousarray(bits).view(np.float64)
    if ty == "f16":
        return f16_of(bits)
    if ty == "bf16":
        return bf16_to_f32(bits)
    if ty[0] == "s":
        return bits.view(SINT[w])
    return bits


def encode(x, ty):
    """Values -> raw bits (unsigned array of the type's width)."""
    if ty == "pred":
        return np.asarray(x, bool)
    w = WIDTH[ty]
    if ty == "f32":
        return bits_of_f32(x)
    if ty == "f64":
        return np.ascontiguousarray(x, np.float64).view(np.uint64)
    if ty == "f16":
        return bits_of_f16(x)
    if ty == "bf16":
        return f32_to_bf16(x)
    x = np.asarray(x)
    return x.astype(SINT[w] if x.dtype.kind == "i" else UINT[w]).view(UINT[w])


def split_operands(s):
    """Operands separated by commas outside of brackets."""
    out, depth, cur = [], 0, ""
    for c in s:
        if c in "{[(":
            depth += 1
        if c in "}])":
            depth -= 1
        if c == "," and depth == 0:
            out.append(cur.strip())
            cur = ""
        else:
            cur += c
    if cur.strip():
        out.append(cur.strip())
    return out
