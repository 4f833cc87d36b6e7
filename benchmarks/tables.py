"""The README's table of speed: predicted bounds, and beside them what cards were measured at.

    python -m benchmarks.tables                    # print it
    python -m benchmarks.tables --write README.md  # between the markers
    python -m benchmarks.tables --predict          # bounds anew, from the machine code (a minute)

Bounds lie in ``benchmarks/results/predicted.json``, measurements beside it, one file a card and day
(``tools/first_gpu.sh``); the last file of a card counts.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sage_diffusion.files import write_text

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"

#: Cards as the README names them, and what it shows of each, at this head dim.
CARDS = {
    "rtx4090": ("RTX 4090", ("int4/fp8-fast", "int8/fp8-fast")),
    "rtx3090": ("RTX 3090", ("int4/int8", "int8/int8")),
    "rtx5090": ("RTX 5090", ("fp4/fp8-fast", "fp4/fp4")),
    "a100": ("A100", ("int8/int8", "int4/int8")),
    "h100": ("H100, H200", ("int8/fp8", "int8/fp8-fast", "int8/fp16", "int8/int8")),
}

#: Cards with the multiprocessors of another.
SAME = {"h200": "h100"}
HEAD_DIM = 128

#: Tokens at which a measurement is shown.
LENGTH = 16384

#: Names of the pipes in words.
_PIPES = {
    "tensor": "tensor cores",
    "shared": "shared memory",
    "mufu": "special functions",
    "fma": "FP32 lanes",
    "issue": "issue slots",
}


class Measured(NamedTuple):
    """One spec on one card, at :data:`LENGTH` tokens.

    Attributes:
        card: PyTorch's name.
        kernel_tops: of the fastest right kernel, without quantization.
        gain: the fastest FP16 attention's time over the whole call's.
    """

    card: str
    kernel_tops: float
    gain: float


def predict() -> list[dict[str, Any]]:
    """Bounds of the table's kernels, compiled now."""
    from sage_diffusion.speed.cost import kernel_costs

    rows = []
    for gpu, (_, specs) in CARDS.items():
        for cost in kernel_costs((gpu,), specs, (HEAD_DIM,)):
            rows.append(
                {
                    "gpu": gpu,
                    "spec": cost.spec,
                    "cycles": round(cost.cycles),
                    "bound": cost.bound,
                    "second": round(cost.second, 2),
                    "tops": round(cost.tops),
                }
            )
    return rows


def latest(folder: Path) -> list[dict[str, Any]]:
    """The last document of every card."""
    found: dict[str, dict[str, Any]] = {}
    for path in folder.glob("*.json"):
        document = json.loads(path.read_text(encoding="utf-8"))
        if "machine" not in document or document["machine"]["emulated"]:
            continue
        before = found.get(document["machine"]["card"])
        if before is None or before["date"] < document["date"]:
            found[document["machine"]["card"]] = document
    return [found[card] for card in sorted(found)]


def gpu_of(card: str) -> str | None:
    """A name of :data:`CARDS` for PyTorch's, "NVIDIA H100 80GB HBM3" -> "h100"; else None."""
    kind = re.sub(r"nvidia|geforce|[^a-z0-9]", "", card.lower())
    found = next((gpu for gpu in (*CARDS, *SAME) if kind.startswith(gpu)), None)
    return SAME.get(found, found) if found else None


def measurements(document: dict[str, Any]) -> dict[str, Measured]:
    """Of a card by spec; empty where nothing was timed."""
    rows = [
        row
        for row in document.get("apart", [])
        if (row["length"], row["head_dim"]) == (LENGTH, HEAD_DIM) and row["milliseconds"]
    ]
    plain = [row["milliseconds"] for row in rows if row["kernel"].startswith("sdpa-")]
    found: dict[str, Measured] = {}
    for row in rows:
        if row["kernel_ms"] is None or not plain:
            continue
        spec = row["kernel"].split()[1]
        gain = min(plain) / row["milliseconds"]
        if spec not in found or gain > found[spec].gain:
            found[spec] = Measured(document["machine"]["card"], row["kernel_tops"], gain)
    return found


def table(predicted: Iterable[dict[str, Any]], documents: Sequence[dict[str, Any]]) -> str:
    """Markdown: predicted columns, measured ones if there is a measurement."""
    by_gpu: dict[str, dict[str, Measured]] = {}
    others: list[tuple[str, str, Measured]] = []
    for document in documents:
        gpu, found = gpu_of(document["machine"]["card"]), measurements(document)
        if gpu is None:
            others += [(document["machine"]["card"], spec, row) for spec, row in found.items()]
        else:
            by_gpu.setdefault(gpu, {}).update(found)
    measured = bool(others or any(by_gpu.values()))
    head = ["card", "spec", "predicted bound", "next pipe", "predicted TOPS"]
    if measured:
        head += ["measured TOPS of the kernel", "of the bound", "measured gain of a call"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in predicted:
        name = CARDS[row["gpu"]][0]
        bound = f"{row['cycles']}, {_PIPES.get(row['bound'], row['bound'])}"
        cells = [name, f"`{row['spec']}`", bound, f"{row['second']:.2f}", f"{row['tops']}"]
        if measured:
            cells += _cells(by_gpu.get(row["gpu"], {}).get(row["spec"]), row["tops"])
        lines.append(_line(cells))
    for card, spec, found in others:
        lines.append(_line([card, f"`{spec}`", "-", "-", "-", *_cells(found, None)]))
    note = (
        f"Measured at {LENGTH} tokens by `tools/first_gpu.sh`; the gain is over the fastest FP16 "
        "attention of PyTorch, quantization included."
        if measured
        else "No card has been measured yet; `tools/first_gpu.sh` measures one."
    )
    return "\n".join([*lines, "", note])


def _cells(found: Measured | None, bound: float | None) -> list[str]:
    if found is None:
        return ["-", "-", "-"]
    share = "-" if bound is None else f"{found.kernel_tops / bound:.0%}"
    return [f"{found.kernel_tops:.0f}", share, f"{found.gain:.2f} x"]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def written(text: str, content: str) -> str:
    """``text`` with ``content`` between the markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"the file must have {BEGIN} and {END} once each, in this order")
    return f"{before}{begin}\n{content}\n{end}{after}"


def current() -> str:
    """The table of the files in :data:`RESULTS`."""
    predicted = json.loads((RESULTS / "predicted.json").read_text(encoding="utf-8"))
    return table(predicted, latest(RESULTS))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="between its markers")
    parser.add_argument("--predict", action="store_true", help="bounds anew, from the machine code")
    args = parser.parse_args(arguments)
    if args.predict:
        rows = ",\n ".join(json.dumps(row) for row in predict())
        write_text(RESULTS / "predicted.json", f"[{rows}]\n")
    content = current()
    if args.write is None:
        print(content)
        return
    write_text(args.write, written(args.write.read_text(encoding="utf-8"), content))


if __name__ == "__main__":
    main()
