"""Bytes of global memory that the quantizers of one attention call move, against the least.

    python -m benchmarks.quantize_bytes [--json]

The least is to read Q, K and V once and to write codes and scales once.  How bytes are counted:
``sage_diffusion/speed/traffic.py``.

The products of smoothed Q's means with K (delta-S) and K's scales in column order belong to the
attention kernel that needs them and have a column of their own, outside the ratio.
"""

from __future__ import annotations

import argparse
import json

from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.speed.traffic import beside, least, moved, statistics

SPECS = ("int8/fp16", "int8/fp8", "int8/fp8-fast", "int4/fp8-fast", "fp4/fp8-fast", "fp4/fp4")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    args = parser.parse_args()
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
