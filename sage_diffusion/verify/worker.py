"""Processes of their own: an illegal access or a hang of one kernel must not take the rest with it.

A worker reads one JSON document from standard input and writes lines of JSON: one when its card is
ready, then one per kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sage_diffusion.kernels.formats import padded_dim
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.verify import ahead, places, run
from sage_diffusion.verify.cases import CARD_CASES, FAR_CASES, REPEATED, Case
from sage_diffusion.verify.kernels import Kernel, cases_of
from sage_diffusion.verify.places import Place, PlaceError
from sage_diffusion.verify.run import CardLost, Verdict

#: Seconds that one kernel may take, compilation included, before it counts as hung.
PATIENCE = 240.0

#: Seconds that a worker may take to be ready, at least.
_START = 60.0

#: Seconds after which compiling ahead ends; what is missing is compiled where it is needed.
AHEAD = 150.0

#: In front of the lines that belong to the protocol: libraries print too.
_MARK = "verdicts: "


def command() -> list[str]:
    """Another Python with this one's path, which finds this package wherever it lies."""
    code = f"import sys; sys.path[:] = {sys.path!r}; "
    return [sys.executable, "-c", code + f"from {__name__} import main; sys.exit(main())"]


def isolated(
    place: Place,
    kernels: Sequence[Kernel],
    patience: float = PATIENCE,
    start: Callable[[], list[str]] = command,
) -> Iterator[list[Verdict]]:
    """As :func:`.run.verify` with the cases of a card; each kernel whose process dies has failed.

    Args:
        place: a card.
        kernels: in this order.
        patience: seconds for one kernel.
        start: the worker's command.

    Raises:
        PlaceError: a worker ends before its card is ready, which is no kernel's fault.
    """
    left = list(kernels)
    while left:
        job = {"device": str(place.device), "kernels": [[k.backend, str(k.spec)] for k in left]}
        for verdicts in _served(start(), json.dumps(job), tuple(left), place, patience):
            yield verdicts
            left.pop(0)


def _served(
    argv: list[str], job: str, kernels: Sequence[Kernel], place: Place, patience: float
) -> Iterator[list[Verdict]]:
    """Verdicts of one worker, until it is done or a kernel ends it; at least one."""
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(_MARK):
                lines.put(line[len(_MARK) :])
        lines.put(None)

    def drain() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            errors[:] = [*errors[-20:], line.strip()]

    threads = [threading.Thread(target=target, daemon=True) for target in (read, drain)]
    for thread in threads:
        thread.start()
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(job)
            process.stdin.close()
        for kernel in (None, *kernels):
            end = ""
            try:
                wait = max(patience, _START) if kernel is None else patience
                line = lines.get(timeout=wait)
            except queue.Empty:
                line, end = None, f"no result after {wait:.0f} seconds: it hangs"
            if line is None:
                end = end or _last_words(process, threads[1], errors)
                if kernel is None:
                    raise PlaceError(f"{place.name} can't be used by another process: {end}")
                yield [_dead(kernel, place, end)]
                return
            document = json.loads(line)
            if kernel is not None:
                yield [Verdict.from_dict(data) for data in document["verdicts"]]
                if document["lost"]:
                    return
    finally:
        process.kill()
        process.wait()


def _last_words(
    process: subprocess.Popen[str], drained: threading.Thread, errors: list[str]
) -> str:
    code = process.wait()
    drained.join(5)
    said = next((text for text in reversed(errors) if text), "")
    return f"its process ended with code {code}: {said}"


def _dead(kernel: Kernel, place: Place, reason: str) -> Verdict:
    """Of a kernel that took its process with it: nobody knows in which case."""
    dims = {padded_dim(c.head_dim) for c in cases_of(kernel, place, CARD_CASES)}
    return Verdict(kernel.name, "failed", reason, tuple(sorted(dims)))


def compile_ahead(
    arch: str,
    kernels: Iterable[Kernel],
    cases: Iterable[Case],
    jobs: int,
    seconds: float = AHEAD,
) -> float:
    """Compile all kernels for all cases in ``jobs`` processes; returns the seconds it took.

    What does not compile is no error here: it will be one where it is run.
    """
    began = time.monotonic()
    place = ahead.compiler(arch)
    cases = tuple(cases)
    pairs = [
        [kernel.backend, str(kernel.spec), vars_of(case)]
        for case in cases
        for kernel in kernels
        if case in cases_of(kernel, place, cases)
    ]
    # A worker must not touch a card: many contexts at once would fill a small one.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "1"}
    workers = []
    for i in range(min(jobs, len(pairs))):
        process = subprocess.Popen(
            command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"arch": arch, "compile": pairs[i::jobs]}))
            process.stdin.close()
        workers.append(process)
    try:
        for process in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, seconds - (time.monotonic() - began)))
    finally:
        for process in workers:
            process.kill()
            process.wait()
    return time.monotonic() - began


def vars_of(case: Case) -> dict[str, Any]:
    """A case for JSON."""
    return {**vars(case), "dtype": str(case.dtype).removeprefix("torch.")}


def case_of(data: dict[str, Any]) -> Case:
    """The inverse of :func:`vars_of`."""
    import torch

    return Case(**{**data, "dtype": getattr(torch, data["dtype"])})


def main() -> int:
    """The worker."""
    job = json.load(sys.stdin)
    if "compile" in job:
        place = ahead.compiler(job["arch"])
        for backend, spec, case in job["compile"]:
            with contextlib.suppress(Exception):
                kernel = Kernel(backend, AttentionSpec.parse(spec))
                ahead.compile_case(kernel, case_of(case), place)
        return 0
    place = places.card(job["device"])
    place.free_bytes()  # the card must have room for another process
    print(_MARK + json.dumps({"ready": place.name}), flush=True)
    for backend, spec in job["kernels"]:
        kernel, lost = Kernel(backend, AttentionSpec.parse(spec)), False
        try:
            verdicts = run.verify_kernel(kernel, place, (*CARD_CASES, *FAR_CASES), REPEATED)
        except CardLost as error:
            verdicts, lost = list(error.args), True
        found = {"verdicts": [v.as_dict() for v in verdicts], "lost": lost}
        print(_MARK + json.dumps(found), flush=True)
        if lost:
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
