"""Decoding with a long past on the CPU: transformers' quantized caches beside ours.

    python -m benchmarks.kv_decode --tokens 4096 [--layers 30] [--json out.json]

A Llama of SmolLM2-135M's sizes with random weights (speed and memory do not depend on their
values) takes one token after another; its past of random K and V is put into each cache at once.
Per cache: CPU time a token, the mean over 128 that take turns with those of the other caches, so
that what a cache does every 128 tokens is in it (transformers' own quantize the whole past again);
their median beside it; and the peak of what the cache, attention and the model's activations
allocate while a few tokens are decoded.  "no past" is an exact cache that starts empty: what the
model takes by itself, which no cache can undercut.
``fp8`` needs nothing; ``quanto`` and ``hqq`` appear where optimum-quanto and hqq are installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache

from sage_diffusion.integrations.transformers.cache import KVCache, argument
from sage_diffusion.kv.presets import PRESETS
from sage_diffusion.vq.memory import PeakMemory

#: An exact cache that is left empty: what no cache of any kind can be faster than.
NO_PAST = "no past"

OURS = ("k8v8", "k4v4", "k3v2", "k2v2")
THEIRS = (("fp8", {}), ("quanto", {"nbits": 4}), ("quanto", {"nbits": 2}), ("hqq", {"nbits": 4}))


def model_of(layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """SmolLM2-135M but for its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def caches(model: LlamaForCausalLM) -> dict[str, Callable[[], Any]]:
    """Name -> what makes an empty cache; those that are not installed are left out."""
    found: dict[str, Callable[[], Any]] = {"exact": lambda: DynamicCache(config=model.config)}
    found[NO_PAST] = found["exact"]
    for backend, settings in THEIRS:
        name = " ".join((backend, *(f"int{bits}" for bits in settings.values())))

        def make(backend: str = backend, settings: Any = settings) -> Any:
            return QuantizedCache(backend, model.config, **settings)

        try:
            make()
        except ImportError as error:
            print(f"{name} is left out: {' '.join(str(error).split())[:90]}", flush=True)
            continue
        found[name] = make
    for preset in OURS:
        assert preset in PRESETS
        found[preset] = lambda preset=preset: KVCache.for_model(model, preset)
    return found


def fill(cache: Any, model: LlamaForCausalLM, tokens: int) -> None:
    """Random K, with channels of unequal size as real ones, and V."""
    generator = torch.Generator().manual_seed(0)
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    dtype = model.dtype
    for layer in range(model.config.num_hidden_layers):
        k, v = (torch.randn(1, heads, tokens, dim, generator=generator) for _ in "kv")
        k = k * (1 + 4 * torch.rand(dim, generator=generator))
        cache.update(k.to(dtype), v.to(dtype), layer)


@torch.no_grad()
def step(model: LlamaForCausalLM, cache: Any) -> float:
    """CPU seconds of one token."""
    start = time.process_time()
    model(torch.tensor([[17]]), **{argument(model): cache})
    return time.process_time() - start


def measure(model: LlamaForCausalLM, tokens: int, steps: int) -> dict[str, dict[str, float]]:
    """Rows by the cache's name: milliseconds a token and bytes at the peak."""
    rows, held = {}, {}
    for name, make in caches(model).items():
        with PeakMemory() as memory:
            cache = make()
            if name != NO_PAST:
                fill(cache, model, tokens)
            step(model, cache)
            memory.peak = 0
            for _ in range(2):
                step(model, cache)
            rows[name] = {"peak_bytes": memory.peak}
        held[name] = cache
        print(f"{name}: {memory.peak / 2**20:.1f} MiB", flush=True)
    times: dict[str, list[float]] = {name: [] for name in held}
    for _ in range(steps):
        for name, cache in held.items():
            times[name].append(step(model, cache))
    for name, row in rows.items():
        row["milliseconds"] = 1000 * statistics.mean(times[name])
        row["median"] = 1000 * statistics.median(times[name])
        row["peak_share"] = row["peak_bytes"] / rows["exact"]["peak_bytes"]
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = model_of(given.layers, getattr(torch, given.dtype))
    rows = measure(model, given.tokens, given.steps)
    print(f"\n{given.tokens} tokens, {given.layers} layers, {given.dtype}, 1 thread, CPU time")
    print("| cache | ms a token | median | tokens/s | peak of decoding, MiB | of the exact one's |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        ms = row["milliseconds"]
        times = f"{ms:.0f} | {row['median']:.0f} | {1000 / ms:.1f}"
        peak = f"{row['peak_bytes'] / 2**20:.1f} | {100 * row['peak_share']:.0f} %"
        print(f"| {name} | {times} | {peak} |")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
