"""A first run on a card: right, then fast, then both in a model.  At most six minutes.

    tools/first_gpu.sh                                  # on a bare machine with a card
    python -m benchmarks.first_gpu --emulate sm_90      # tiny, on the CPU: does the script run?

Every section is fenced: one that fails is a line of the report, and the next one runs.  The result
is written after each into ``benchmarks/results/CARD-DATE.json``, which ``benchmarks.tables`` reads;
the tables come last.  Needs PyTorch, Triton and the package's dependencies, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import first_gpu_codes as codes
from benchmarks import first_gpu_model as model
from benchmarks.first_gpu_text import report
from sage_diffusion.files import write_text
from sage_diffusion.speed import bench
from sage_diffusion.speed.timing import CudaTimer, Timer, Timing
from sage_diffusion.verify import kernels as known
from sage_diffusion.verify import places, procedure, record, run, speed, worker
from sage_diffusion.verify.cases import CARD_CASES, EMULATED_CASES, REPEATED, Case
from sage_diffusion.verify.kernels import Kernel
from sage_diffusion.verify.places import Place

RESULTS = Path(__file__).parent / "results"

#: Version of the result's layout.
VERSION = 1


class Sizes(NamedTuple):
    """How large everything is.

    Attributes:
        lengths, head_dims, heads: of the calls that are timed.
        apart: lengths at which quantizers and kernels are timed apart, and their head dim.
        model: width, heads, tokens and blocks of the transformer.
        short: tokens of the calls whose host time and graph replays are measured.
        rounds: of such a measurement.
        codes: latents, codes and dims of the searches for the nearest code.
    """

    lengths: tuple[int, ...]
    head_dims: tuple[int, ...]
    heads: int
    apart: tuple[tuple[int, ...], int]
    model: tuple[int, int, int, int]
    short: tuple[int, ...]
    rounds: int
    codes: tuple[tuple[int, int, int], ...]


#: 1K to 32K tokens; a transformer of Flux's width, heads and tokens at 1024 x 1024.
CARD = Sizes(
    tuple(1024 * 2**i for i in range(6)),
    (128, 64),
    24,
    ((4096, 16384, 32768), 128),
    (3072, 24, 4608, 4),
    (1024, 4096),
    20,
    ((16384, 65536, 32), (16384, 65536, 128), (4096, 262144, 256)),
)
TINY = Sizes((64, 96), (64,), 2, ((64,), 64), (128, 2, 70, 2), (64,), 2, ((70, 300, 8),))


class WallTimer:
    """A timer where there is no card."""

    def __call__(self, call: Callable[[], object]) -> Timing:
        """One run by the clock."""
        start = time.perf_counter()
        call()
        return Timing((1000 * (time.perf_counter() - start),), None)


@dataclass
class Run:
    """The state of a run: where, how large, until when, and what was found.

    Attributes:
        place: the card, or the emulator.
        sizes: of everything.
        seconds: no section begins after that long.
        path: the file.
        found: the document.
        kernels: that the place can run, the wrong ones gone once that is known.
    """

    place: Place
    sizes: Sizes
    seconds: float
    path: Path
    found: dict[str, Any] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        """Seconds since the begin."""
        return time.monotonic() - self.began

    @property
    def specs(self) -> list[str]:
        """Names of the specs that a right kernel computes, in the ladder's order."""
        return list(dict.fromkeys(str(kernel.spec) for kernel in self.kernels))

    def timer(self) -> Timer:
        """Of the place, quick."""
        if self.place.emulated:
            return WallTimer()
        return CudaTimer(self.place.device, repeats=10, warmup=2, seconds=0.3)

    def problem(self, section: str, reason: str) -> None:
        """Note what went wrong."""
        self.found["problems"].append({"section": section, "reason": record.scrubbed(reason)})
        self.say(f"{section}: {reason[-300:]}")

    def say(self, text: str) -> None:
        """A line with the time."""
        print(f"[{self.spent:6.1f} s] {text}", flush=True)

    def save(self) -> None:
        """Write what there is so far."""
        self.found["seconds"] = round(self.spent, 1)
        write_text(self.path, json.dumps(record.scrubbed(self.found), indent=1) + "\n")


# ---------------------------------------------------------------------- sections
def verified(state: Run, jobs: int) -> dict[str, Any]:
    """Every kernel against twin and float64; what is wrong is not timed."""
    place, seconds = state.place, 0.0
    if not place.emulated and place.capability is not None:
        cases = (*CARD_CASES, *REPEATED, *timed_cases(state.sizes))
        seconds = worker.compile_ahead(place.arch, state.kernels, cases, jobs, seconds=100.0)
        state.say(f"compiled ahead in {seconds:.0f} s")
    if place.emulated:
        lists = run.verify(state.kernels, place, EMULATED_CASES[:1], ())
    else:
        lists = worker.isolated(place, state.kernels, patience=60.0)
    verdicts: list[run.Verdict] = []
    for some in lists:
        verdicts += some
        state.say(f"{some[0].kernel} {some[0].status} {some[0].reason[:200]}")
    verdicts = run.combine(verdicts, state.kernels)
    status = {verdict.kernel: verdict.status for verdict in verdicts}
    state.kernels = [k for k in state.kernels if status[k.name] == "right"]
    return {"compiled": seconds, "verdicts": [verdict.as_dict() for verdict in verdicts]}


def timed_cases(sizes: Sizes) -> Iterator[Case]:
    """What the later sections will call, as far as Triton compiles it anew."""
    for head_dim in sizes.head_dims:
        for causal in (False, True):
            yield Case("timed", 1, 24, 24, 1024, 1024, head_dim, is_causal=causal)
    yield Case("model", 1, 24, 24, 4608, 4608, 128, dtype=torch.bfloat16)


def apart(state: Run) -> list[dict[str, Any]]:
    """Quantizers and kernels, apart and together, beside PyTorch's."""
    lengths, head_dim = state.sizes.apart
    with state.place.running():
        rows = speed.times(
            state.kernels,
            state.timer(),
            state.place.device,
            lengths=lengths,
            heads=state.sizes.heads,
            head_dim=head_dim,
        )
        return [row.as_dict() for row in rows]


def benched(state: Run, head_dim: int, is_causal: bool) -> list[dict[str, Any]]:
    """``sage-diffusion bench`` at every length, as long as there is time."""
    names = ("sdpa", "reference") if state.place.emulated else ("sdpa-flash", "sdpa-cudnn")
    entrants = bench.contestants(["fp16"], names[:1] if state.place.emulated else names)
    for kernel in state.kernels:
        backend = "reference" if state.place.emulated else kernel.backend
        entrants += bench.contestants([kernel.spec], [backend])
    rows, timer = [], state.timer()
    for length in state.sizes.lengths:
        if state.spent > state.seconds:
            state.problem("bench", f"no time for {length} tokens")
            break
        result = bench.measure(
            entrants,
            timer,
            lengths=(length,),
            head_dims=(head_dim,),
            heads=state.sizes.heads,
            is_causal=is_causal,
            device=state.place.device,
        )
        rows += [{**row.as_dict(), "is_causal": is_causal} for row in result.rows]
    return rows


def sections(state: Run, jobs: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is asked first comes first: time may run out."""
    sizes = state.sizes
    yield "verify", lambda: verified(state, jobs)
    yield "apart", lambda: apart(state)
    first, *others = [(dim, causal) for causal in (False, True) for dim in sizes.head_dims]
    yield f"bench {first[0]}", lambda: benched(state, *first)
    yield "model", lambda: model.forward(state)
    yield "overhead", lambda: model.overhead(state)
    yield "graphs", lambda: model.graphs(state)
    yield "codes", lambda: codes.search(state)
    for dim, causal in others:
        name = f"bench {dim}" + (" causal" if causal else "")
        yield name, lambda dim=dim, causal=causal: benched(state, dim, causal)
    yield "compile", lambda: model.compiled(state)


def measure(state: Run, jobs: int, wanted: Sequence[str] = ()) -> dict[str, Any]:
    """All sections, each fenced; the document is saved after each."""
    for name, section in sections(state, jobs):
        if wanted and name.split()[0] not in wanted:
            continue
        if state.spent > state.seconds:
            state.problem(name, "no time left")
            continue
        try:
            state.found[name] = section()
        except KeyboardInterrupt:
            state.problem(name, "interrupted")
            break
        except Exception as error:
            traceback.print_exc()
            state.problem(name, f"{type(error).__name__}: {' '.join(str(error).split())}")
        state.say(f"{name} done")
        state.save()
    state.save()
    return state.found


def file_name(card: str) -> str:
    """ "NVIDIA GeForce RTX 4090" on a day -> "rtx-4090-2025-01-31.json"."""
    kind = re.sub(r"nvidia|geforce", "", card.lower())
    return "-".join([*re.findall(r"[a-z0-9]+", kind), record.today()]) + ".json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where there is no card or a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--seconds", type=float, default=300.0, help="no section begins later")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--emulate", metavar="ARCH", help="tiny, on the CPU: sm_80 .. sm_120")
    parser.add_argument("--spec", action="append", help="only this spec, repeatable")
    parser.add_argument("--section", action="append", help="only this one, repeatable")
    args = parser.parse_args(arguments)
    try:
        place = places.emulated(args.emulate) if args.emulate else procedure.ready_card()
    except places.PlaceError as error:
        print(f"first_gpu: {error}", file=sys.stderr)
        return 1
    chosen, refused = known.find(place, tuple(args.spec or ()))
    sizes = TINY if place.emulated else CARD
    state = Run(place, sizes, args.seconds, args.out / file_name(place.name), kernels=chosen)
    state.found = {
        "version": VERSION,
        "date": record.today(),
        "machine": record.machine(place),
        "refused": refused,
        "problems": [],
    }
    state.say(json.dumps(state.found["machine"]))
    with torch.inference_mode(False), torch.no_grad():
        found = measure(state, args.jobs, args.section or ())
    print("\n".join(report(found)))
    print(f"\nwrote {state.path}")
    verdicts = found.get("verify", {}).get("verdicts", [])
    return int(any(v["status"] not in ("right", "not run") for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
