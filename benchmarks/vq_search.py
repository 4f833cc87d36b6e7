"""Nearest-code search against a library's: ids, CPU-seconds, peak memory; one thread.

    python -m benchmarks.vq_search              everything (two minutes on an idle core)
    python -m benchmarks.vq_search --dims 32 --latents 4096

CPU-seconds are process time, best of two.  Peak memory is what lives of the tensors that operators
make (:mod:`sage_diffusion.vq.memory`).  The library is ``vector_quantize_pytorch.SimVQ``; where it
is not installed, its search (``torch.cdist`` and ``argmin``) stands for it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sage_diffusion.vq import SimVQ, nearest_code, search
from sage_diffusion.vq.memory import peak_memory


def spent(run: Callable[[], Any], times: int = 2) -> float:
    """CPU-seconds, the best of some runs."""
    best = float("inf")
    for _ in range(times):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best


def library(dim: int, codes: int) -> tuple[str, nn.Module | None, Tensor]:
    """Name, the library's SimVQ or None, and its table."""
    try:
        import vector_quantize_pytorch
    except ImportError:
        return "torch.cdist", None, torch.randn(codes, dim) * dim**-0.5
    quantizer = vector_quantize_pytorch.SimVQ(dim=dim, codebook_size=codes, rotation_trick=False)
    with torch.no_grad():
        return "vector_quantize_pytorch.SimVQ", quantizer, quantizer.codebook.detach().clone()


def nearer(z: Tensor, table: Tensor, got: Tensor, want: Tensor) -> list[int]:
    """Ids that differ, and those of them where ``got`` is the nearer one in float64."""
    other = (got != want).nonzero()[:, 0]
    far = [(z[other].double() - table[ids[other]].double()).norm(dim=1) for ids in (got, want)]
    return [len(other), int((far[0] < far[1]).sum())]


def compare(latents: int, codes: int, dim: int) -> dict[str, Any]:
    """One size: their forward pass, our search, the matrix product alone."""
    torch.manual_seed(0)
    name, quantizer, table = library(dim, codes)
    z = torch.randn(latents, dim)

    @torch.no_grad()
    def theirs() -> Tensor:
        if quantizer is None:
            return torch.cdist(z, table).argmin(-1)
        return quantizer(z[None])[1][0]

    @torch.no_grad()
    def ours() -> Tensor:
        return nearest_code(z, table)

    def product() -> None:
        for part in z.split(512):
            for some in table.split(2048):
                part @ some.t()

    want, their_peak = peak_memory(theirs)
    got, our_peak = peak_memory(ours)
    seconds = [spent(run) for run in (theirs, ours, product)]
    return {
        "latents": latents,
        "codes": codes,
        "dim": dim,
        "against": name,
        "other_ids_and_nearer_ones": nearer(z, table, got, want),
        "cpu_seconds": [round(s, 3) for s in seconds],
        "ours_of_theirs": round(seconds[1] / seconds[0], 3),
        "product_of_theirs": round(seconds[2] / seconds[0], 3),
        "peak_mib": [round(p / 2**20, 1) for p in (their_peak, our_peak)],
        "peak_share": round(their_peak / our_peak),
    }


def training_step(latents: int, codes: int, dim: int) -> dict[str, Any]:
    """Forward and backward of SimVQ while training, theirs and ours."""
    name, theirs, _ = library(dim, codes)
    ours = SimVQ(dim, codes)

    def step(quantizer: nn.Module) -> None:
        x = torch.randn(1, latents, dim, requires_grad=True)
        out = quantizer(x)
        (out[0].square().mean() + out[2]).backward()

    found: dict[str, Any] = {"step": "SimVQ", "latents": latents, "codes": codes, "dim": dim}
    found["cpu_seconds"] = [
        None if q is None else round(spent(lambda q=q: step(q)), 3) for q in (theirs, ours)
    ]
    found["peak_mib"] = [
        None if q is None else round(peak_memory(lambda q=q: step(q))[1] / 2**20, 1)
        for q in (theirs, ours)
    ]
    return {**found, "against": name if theirs is not None else None}


def emu35() -> dict[str, Any]:
    """The quantizer of Emu3.5's tokenizer in transformers, one picture of 1024 x 1024 pixels."""
    from transformers.models.apertus1p5 import modeling_apertus1p5 as apertus

    torch.manual_seed(0)
    config = apertus.Apertus1p5VisionTokenizerConfig()
    quantizer = apertus.Apertus1p5VisionTokenizerVectorQuantizer(config).requires_grad_(False)
    nn.init.normal_(quantizer.embedding.weight)
    x = torch.randn(1, config.embed_dim, 64, 64)
    with search(quantizer) as searching:
        measured = searching.measure(lambda: quantizer(x))
    return {
        "host": "transformers Apertus1p5VisionTokenizer",
        "codes": config.codebook_size,
        "dim": config.embed_dim,
        "peak_mib": [round(n / 2**20, 1) for n in (measured.before, measured.after)],
        "same_ids": measured.same_ids,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--latents", type=int, default=16384)
    parser.add_argument("--dims", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--only-search", action="store_true", help="leave out steps and hosts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for dim in options.dims:
        print(json.dumps(compare(options.latents, 65536, dim)), flush=True)
    if options.only_search:
        return
    torch.manual_seed(0)
    z, table = torch.randn(1024, 128), torch.randn(262144, 128)
    seconds = spent(lambda: nearest_code(z, table))
    print(json.dumps({"latents": 1024, "codes": 262144, "dim": 128, "cpu_seconds": seconds}))
    print(json.dumps(training_step(4096, 65536, 32)), flush=True)
    print(json.dumps(emu35()), flush=True)


if __name__ == "__main__":
    main()
