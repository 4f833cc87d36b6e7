"""Bytes of global memory that the quantizers of one attention call move, against the least.

    python -m benchmarks.quantize_bytes [--json] [--code sm_89]

The least is to read Q, K and V once and to write codes and scales once.  How bytes are counted:
``sage_diffusion/speed/traffic.py``.

The products of smoothed Q's means with K (delta-S) and K's scales in column order belong to the
attention kernel that needs them and have a column of their own, outside the ratio.

``--code`` prints registers and instructions of the kernels instead, as compiled for a card, and of
the rows of Q and K by themselves.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from sage_diffusion.kernels.spec import LADDER, AttentionSpec
from sage_diffusion.speed.traffic import beside, least, moved, statistics

SPECS = LADDER[1:]  # what quantizes


def measure(length: int = 4096) -> list[dict[str, object]]:
    """A row per spec and head dim."""
    found: list[dict[str, object]] = []
    for name in SPECS:
        spec = AttentionSpec.parse(name)
        for head_dim in (64, 128):
            got, want = moved(spec, length, head_dim), least(spec, length, head_dim)
            found.append(
                {
                    "spec": name,
                    "head_dim": head_dim,
                    "tokens": length,
                    "read": got.read,
                    "written": got.written,
                    "least": want.bytes,
                    "ratio": round(got.bytes / want.bytes, 3),
                    "statistics": statistics(spec, length, head_dim),
                    "delta_s": beside(spec, length, head_dim).bytes,
                }
            )
    return found


def code(arch: str) -> list[tuple[str, str, int, int, int]]:
    """Spec, kernel, registers, spills and instructions of every launch, at head dim 128."""
    import tempfile
    from pathlib import Path

    import torch

    from sage_diffusion.kernels.attention.operands import quantize_operands
    from sage_diffusion.kernels.formats import Precision
    from sage_diffusion.kernels.quantize import triton as quantize
    from sage_diffusion.speed import cost_sass
    from sage_diffusion.speed.cost_compile import compiling_for

    q = torch.zeros(2, 1024, 3, 4, 128, dtype=torch.float16)[:, :, 1].transpose(1, 2)
    k, factor = q[:, :2], torch.zeros(2, 2, 128)
    rows: list[tuple[str, str, int, int, int]] = []

    def add(name: str, kernels: list[Any]) -> None:
        for kernel in kernels:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "kernel.cubin"
                path.write_bytes(kernel.cubin)
                (found,) = cost_sass.functions(path)
            rows.append((name, kernel.name, found.registers, found.spills, len(found.code)))

    for name in ("int8/fp8-fast", "int4/fp8-fast"):
        spec = AttentionSpec.parse(name)
        with compiling_for(arch) as driver:
            quantize_operands(q, k, k, spec, permuted=True, column_factor=1.0)
        add(name, driver.kernels)
    for precision in (Precision.INT8, Precision.INT4):
        with compiling_for(arch) as driver:
            clip = precision is Precision.INT4
            options: dict[str, Any] = {"factor": factor, "rotation": True, "clip": clip}
            quantize.quantize_rows(q, precision, mean=torch.zeros(2, 4, 128), **options)
        add(precision.value, driver.kernels)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--code", metavar="ARCH", help="machine code, e.g. of sm_89")
    args = parser.parse_args()
    if args.code:
        print(f"{'spec':14} {'kernel':24} registers spills instructions")
        for name, kernel, registers, spills, size in code(args.code):
            print(f"{name:14} {kernel:24} {registers:9} {spills:6} {size:12}")
        return
    result = measure(args.tokens)
    if args.json:
        print(json.dumps({"rows": result}))
        return
    print("bytes of one head, fp16 inputs; least: read once, written once")
    print(
        f"{'spec':14} {'D':>4} {'read':>10} {'written':>10} {'least':>10} ratio {'delta-S':>10} "
        f"{'K mean':>8} {'V range':>8}"
    )
    for row in result:
        passes = row["statistics"]
        print(
            f"{row['spec']:14} {row['head_dim']:4} {row['read']:10} {row['written']:10} "
            f"{row['least']:10} {row['ratio']:.2f}  {row['delta_s']:10} "
            f"{passes['k']:8} {passes['v']:8}"
        )


if __name__ == "__main__":
    main()
