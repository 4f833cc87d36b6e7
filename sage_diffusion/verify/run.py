"""All cases of one kernel, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from sage_diffusion.attend.execution import compiler_errors
from sage_diffusion.kernels.formats import padded_dim
from sage_diffusion.verify import checks
from sage_diffusion.verify.cases import Case, inputs
from sage_diffusion.verify.checks import Finding
from sage_diffusion.verify.kernels import Kernel, cases_of
from sage_diffusion.verify.places import Place

#: "right"; "wrong": a result differs; "failed": it raised; "not compiled": the compiler refused it;
#: "not run": every case was left out.
Status = Literal["right", "wrong", "failed", "not compiled", "not run"]

#: Repetitions of a call that must give the same bits.
REPEATS, REPEATS_EMULATED = 20, 1


@dataclass(frozen=True)
class Verdict:
    """What was found about one kernel.

    Attributes:
        kernel: "gluon int4/fp8-fast", "rows int4".
        status: of all cases.
        reason: the first finding in words, "" if it is right.
        head_dims: padded ones (64, 128, 256) with findings.
        cases: that ran.
        twin, exact: worst relative L1 distance from the twin and from float64; None for quantizers,
            and where an output is not finite.
        left_out: cases that did not run, and why.
    """

    kernel: str
    status: Status
    reason: str = ""
    head_dims: tuple[int, ...] = ()
    cases: int = 0
    twin: float | None = None
    exact: float | None = None
    left_out: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Verdict:
        """The inverse of :meth:`as_dict` behind JSON."""
        fields: dict[str, Any] = dict(data)
        fields |= {name: tuple(data[name]) for name in ("head_dims", "left_out")}
        return cls(**fields)


#: How PyTorch and Triton begin errors after which their process has lost the card, or may have.
_LOST = ("CUDA error", "HIP error", "Triton Error [CUDA]", "Triton Error [HIP]")


class CardLost(RuntimeError):
    """After an illegal access a process can't use its card any more."""


def _largest(distances: Iterable[float]) -> float | None:
    """None where one is no number: JSON knows no NaN."""
    distances = tuple(distances)
    return max(distances) if all(map(math.isfinite, distances)) else None


@dataclass
class _Tally:
    """What the cases of a kernel showed so far."""

    findings: list[tuple[Finding, Status, int]] = field(default_factory=list)
    ran: dict[str, int] = field(default_factory=dict)
    distances: list[checks.Distances] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def count(self, name: str) -> None:
        self.ran[name] = self.ran.get(name, 0) + 1

    def add(self, finding: Finding, status: Status, case: Case) -> None:
        self.findings.append((finding, status, padded_dim(case.head_dim)))

    def verdict(self, name: str, kernel: bool) -> Verdict:
        mine = [entry for entry in self.findings if entry[0].kernel == name]
        twin = exact = None
        if kernel and self.distances:
            twin, exact = (_largest(column) for column in zip(*self.distances, strict=True))
        left_out = tuple(self.left_out) if kernel else ()
        if not mine:
            status: Status = "right" if self.ran.get(name) else "not run"
            reason = "" if status == "right" else "; ".join(left_out)
            return Verdict(name, status, reason, (), self.ran.get(name, 0), twin, exact, left_out)
        order = ("wrong", "failed", "not compiled")
        first = min(mine, key=lambda entry: order.index(entry[1]))
        more = len({entry[0].case for entry in mine}) - 1
        reason = f"{first[0].case}: {first[0].reason}" + (f" (and {more} more)" if more else "")
        # What does not compile is found out call by call; only what runs wrongly is remembered.
        dims = sorted({dim for _, status, dim in mine if status != "not compiled"})
        return Verdict(
            name, first[1], reason, tuple(dims), self.ran.get(name, 0), twin, exact, left_out
        )


def verify_kernel(
    kernel: Kernel, place: Place, cases: Iterable[Case], repeated: Iterable[Case]
) -> list[Verdict]:
    """Verdicts on one attention kernel, first, and on the quantizers that it needs.

    Raises:
        CardLost: after an error that ends the process's use of the card; ``args`` are the verdicts.
    """
    tally = _Tally()
    names = [name for name in dict.fromkeys(kernel.quantizers) if name]

    def verdicts() -> list[Verdict]:
        return [tally.verdict(kernel.name, True), *(tally.verdict(n, False) for n in names)]

    jobs = [(case, False) for case in cases_of(kernel, place, tuple(cases))]
    jobs += [(case, True) for case in cases_of(kernel, place, tuple(repeated))]
    for case, again in jobs:
        free = place.free_bytes()
        if case.bytes_needed > 0.8 * free and not (place.emulated and case.stride):
            needed = f"needs {case.bytes_needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
            tally.left_out.append(f"{case.name}: {needed}")
            continue
        try:
            (_repeat if again else _check)(kernel, place, case, tally)
        except torch.OutOfMemoryError:
            tally.left_out.append(f"{case.name}: out of memory")
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            if "out of memory" in text:  # Triton's and cuBLAS's
                tally.left_out.append(f"{case.name}: {text[:200]}")
                continue
            status: Status = "not compiled" if _by_compiler(error, text) else "failed"
            reason = text if type(error) is RuntimeError else f"{type(error).__name__}: {text}"
            tally.add(Finding(kernel.name, case.name, reason[-600:]), status, case)
            if any(sign in text for sign in _LOST):
                raise CardLost(*verdicts()) from error
    return verdicts()


def _by_compiler(error: Exception, text: str) -> bool:
    """Whether nothing was run: Triton's own errors are no RuntimeErrors, its passes' are."""
    if isinstance(error, RuntimeError):
        return "PassManager::run failed" in text
    return isinstance(error, compiler_errors())


def _check(kernel: Kernel, place: Place, case: Case, tally: _Tally) -> None:
    x = inputs(case, place.device)
    with checks.poisoned(), place.running():
        operands = kernel.quantize(x)
    some = first_and_last if case.is_far else tuple
    wrong = checks.check_operands(kernel, case, *some((x, operands)))
    for name in dict.fromkeys(kernel.quantizers):
        tally.count(name)
    for finding in wrong:
        tally.add(finding, "wrong", case)
    with checks.poisoned(), place.running():
        got = kernel.run(x, case)
    # What a whole call makes of wrong codes is the quantizer's fault.
    distances, findings = checks.check_attention(
        kernel, case, *some((x, operands, got)), whole=not wrong
    )
    tally.count(kernel.name)
    tally.distances.append(distances)
    for finding in findings:
        tally.add(finding, "wrong", case)


def _repeat(kernel: Kernel, place: Place, case: Case, tally: _Tally) -> None:
    x = inputs(case, place.device)
    times = REPEATS_EMULATED if place.emulated else REPEATS
    with place.running():
        found = checks.check_repeats(kernel, case, lambda: kernel.run(x, case), times)
    tally.count(kernel.name)
    for finding in found:
        tally.add(finding, "wrong", case)


def first_and_last(value: Any) -> Any:
    """The first and the last head of every tensor in tuples, where all would take too long."""
    if isinstance(value, torch.Tensor):
        return torch.stack([value[:, 0], value[:, -1]], 1)
    if hasattr(value, "_fields"):
        return type(value)(*map(first_and_last, value))
    return tuple(map(first_and_last, value)) if isinstance(value, tuple) else value


def combine(verdicts: Iterable[Verdict], kernels: Iterable[Kernel]) -> list[Verdict]:
    """One verdict a kernel: quantizers, met once by every kernel that needs them, come first.

    A kernel that reads what a wrong quantizer wrote is wrong too.
    """
    quantizers: dict[str, Verdict] = {}
    attention: dict[str, Verdict] = {}
    known = {kernel.name: kernel for kernel in kernels}
    for verdict in verdicts:
        if verdict.kernel in known:
            attention[verdict.kernel] = verdict
        else:
            before = quantizers.get(verdict.kernel)
            quantizers[verdict.kernel] = verdict if before is None else _worse(before, verdict)
    for name, verdict in attention.items():
        for quantizer in dict.fromkeys(known[name].quantizers):
            found = quantizers.get(quantizer)
            if found is not None and found.status == "wrong" and verdict.status == "right":
                reason = f"reads what a wrong quantizer wrote, {quantizer}"
                attention[name] = replace(
                    verdict, status="wrong", reason=reason, head_dims=found.head_dims
                )
    return [*quantizers.values(), *attention.values()]


def _worse(a: Verdict, b: Verdict) -> Verdict:
    order = ("wrong", "failed", "not compiled", "right", "not run")
    worse = min(a, b, key=lambda v: order.index(v.status))
    dims = tuple(sorted({*a.head_dims, *b.head_dims}))
    return replace(worse, head_dims=dims, cases=a.cases + b.cases)


def verify(
    kernels: Iterable[Kernel], place: Place, cases: Iterable[Case], repeated: Iterable[Case]
) -> Iterator[list[Verdict]]:
    """Verdicts of one kernel after the other, in this process.

    Raises:
        CardLost: see :func:`verify_kernel`.
    """
    cases, repeated = tuple(cases), tuple(repeated)
    for kernel in kernels:
        yield verify_kernel(kernel, place, cases, repeated)
