"""A short table of times: quantizers and kernel, apart and together, beside PyTorch's attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from sage_diffusion.speed.bench import SDPA_KERNELS, contestants, operations
from sage_diffusion.speed.timing import Timer, Timing
from sage_diffusion.verify.cases import Case, Inputs, inputs
from sage_diffusion.verify.kernels import Kernel

if TYPE_CHECKING:
    from sage_diffusion.kernels.attention.operands import Operands

#: What is timed: heads, tokens and head dim of a large image or a short video.
LENGTHS, HEADS, HEAD_DIM = (4096, 16384), 24, 128


@dataclass(frozen=True)
class Time:
    """Median times of one implementation at one length.

    Attributes:
        kernel: "gluon int4/fp8-fast", or "sdpa-flash".
        length, heads, head_dim, is_causal: of the call.
        milliseconds: of the whole call, None where it failed.
        quantize_ms, kernel_ms: of its halves, None for PyTorch's.
        host_ms: until the host has queued the whole call.
        gaps: the card waited for the host within the call, and that is in its time.
        tops: tera-operations per second of both products, of the whole call.
        kernel_tops: the same, of the kernel alone.
        peak_mib: memory beyond the inputs.
        reason: why there is no time.
    """

    kernel: str
    length: int
    heads: int
    head_dim: int
    is_causal: bool = False
    milliseconds: float | None = None
    quantize_ms: float | None = None
    kernel_ms: float | None = None
    host_ms: float | None = None
    gaps: bool = False
    tops: float | None = None
    kernel_tops: float | None = None
    peak_mib: float | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def times(
    kernels: Iterable[Kernel],
    timer: Timer,
    device: torch.device,
    lengths: Iterable[int] = LENGTHS,
    heads: int = HEADS,
    head_dim: int = HEAD_DIM,
) -> Iterator[Time]:
    """PyTorch's kernels, then ours, at every length.  What fails is a row with a reason."""
    chosen = list(kernels)
    for length in lengths:
        case = Case("timed", 1, heads, heads, length, length, head_dim)
        try:
            yield from _of_case(case, inputs(case, device), chosen, timer)
        except torch.OutOfMemoryError:
            yield Time("inputs", length, heads, head_dim, reason="out of memory")


def _of_case(case: Case, x: Inputs, kernels: Iterable[Kernel], timer: Timer) -> Iterator[Time]:
    for rival in contestants(["fp16"], tuple(SDPA_KERNELS)):
        yield _time(
            rival.backend, case, timer, functools.partial(rival.run, x.q, x.k, x.v, case.is_causal)
        )
    for kernel in kernels:
        yield _time(kernel.name, case, timer, functools.partial(kernel.run, x, case), kernel, x)


def _time(
    name: str,
    case: Case,
    timer: Timer,
    whole: Callable[[], object],
    kernel: Kernel | None = None,
    x: Inputs | None = None,
) -> Time:
    shape: dict[str, Any] = {"length": case.k_len, "heads": case.heads, "head_dim": case.head_dim}
    try:
        call = timer(whole)
        quantize, alone = _halves(kernel, x, timer) if kernel and x else (None, None)
    except torch.OutOfMemoryError:
        return Time(name, **shape, reason="out of memory")
    except Exception as error:  # PyTorch's kernels refuse calls by whatever they like
        return Time(name, **shape, reason=(" ".join(str(error).split()) or repr(error))[:300])
    work = operations(case.batch, case.heads, case.k_len, case.head_dim, case.is_causal)
    return Time(
        name,
        **shape,
        milliseconds=call.median,
        quantize_ms=None if quantize is None else quantize.median,
        kernel_ms=None if alone is None else alone.median,
        host_ms=call.host_milliseconds,
        gaps=call.gaps,
        tops=work / call.median / 1e9,
        kernel_tops=None if alone is None else work / alone.median / 1e9,
        peak_mib=None if call.peak_bytes is None else call.peak_bytes / 2**20,
    )


def _halves(kernel: Kernel, x: Inputs, timer: Timer) -> tuple[Timing, Timing]:
    operands: Operands = kernel.quantize(x)
    return timer(lambda: kernel.quantize(x)), timer(lambda: kernel.attend(operands, x))
