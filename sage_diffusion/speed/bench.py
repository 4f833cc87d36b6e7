"""Time attention kernels, accuracy beside speed; where there is no GPU, predict their bounds.

Every row compares one implementation of one spec with PyTorch's attention on the same inputs.  A
spec whose result is wrong is not timed: a fast wrong kernel is no result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage_diffusion.attend import backends
from sage_diffusion.attend.calls import AttentionCall, Call
from sage_diffusion.attend.execution import compiler_errors
from sage_diffusion.kernels.attention import reference
from sage_diffusion.kernels.formats import Q_BLOCK
from sage_diffusion.kernels.spec import LADDER, AttentionSpec
from sage_diffusion.machine import installed
from sage_diffusion.speed.timing import Timer

MEASURED, PREDICTED = "measured", "predicted bound"
WRONG, NO_MEMORY, FAILED = "wrong result", "out of memory", "failed"
GAPS = "with gaps in which the GPU waited for the host"

#: How much farther from float64 a right kernel may be than its twin, which computes the same spec
#: in eager Torch on the same inputs: sums differ in order and, on some cards, in bits.
MARGIN = 1.5

#: Query rows of one head on which the twin is asked.
_ASKED = 512

#: PyTorch's own attention, by the kernel that it must take.
SDPA_KERNELS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}

DEFAULT_LENGTHS = tuple(1024 * 2**i for i in range(8))  # 1K .. 128K
DEFAULT_HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class Contestant:
    """One implementation of one spec.

    Attributes:
        spec: what it computes.
        backend: one of :func:`names`.
        refuse: None if it can run the call, else the reason.
        run: ``run(q, k, v, is_causal)`` -> output, quantization included.
    """

    spec: AttentionSpec
    backend: str
    refuse: Callable[[AttentionCall], str | None]
    run: Callable[[Tensor, Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True)
class Row:
    """One implementation, head dim and length.

    Attributes:
        spec, backend, head_dim, length: what ran.
        status: "measured", "predicted bound", "wrong result", "out of memory" or "failed".
        milliseconds: median (of a prediction: the lower bound), None where nothing was timed.
        tops: tera-operations per second of both products, from ``milliseconds``.
        peak_mib: memory beyond the inputs, None where unknown.
        relative_l1: distance from PyTorch's attention (of a prediction: the twin's).
        host_milliseconds: what the host needs to start the call, None where unknown.
        reason: why there is no time, or what else is in it.
        call_milliseconds: of a prediction, the bound with quantization and launches (a measured
            time has them in it); None where unknown.
    """

    spec: str
    backend: str
    head_dim: int
    length: int
    status: str
    milliseconds: float | None = None
    tops: float | None = None
    peak_mib: float | None = None
    relative_l1: float | None = None
    host_milliseconds: float | None = None
    reason: str | None = None
    call_milliseconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class Result(NamedTuple):
    """All rows, and (spec, backend, head dim) -> reason of what was refused."""

    rows: list[Row]
    refused: dict[tuple[str, str, int], str]


def budget(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> float:
    """Largest relative L1 distance of a right result from PyTorch's attention on these inputs.

    :data:`MARGIN` times the twin's distance from float64, and PyTorch's own, both measured on the
    last 512 queries of the first head.

    Args:
        q, k, v: ``[B, H, L, D]``, equally many tokens.
    """
    length = q.shape[2]
    first = max(0, length - _ASKED) // Q_BLOCK * Q_BLOCK  # whole blocks of a smoothed Q
    q, k, v = q[:1, :1, first:], k[:1, :1], v[:1, :1]
    mask = None
    if is_causal:
        mask = torch.ones(length - first, length, dtype=torch.bool, device=q.device).tril(first)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    eager, _ = reference.attention(q, k, v, spec, mask=mask)
    native = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return MARGIN * distance(eager, exact) + distance(native, exact)


def operations(batch: int, heads: int, length: int, head_dim: int, is_causal: bool) -> float:
    """Multiplications and additions of both products; causal attention needs half of them."""
    return 4 * batch * heads * length**2 * head_dim / (2 if is_causal else 1)


def default_names() -> tuple[str, ...]:
    """Who is timed unless told otherwise."""
    return (*(record.name for record in backends.BACKENDS if record.timed), *SDPA_KERNELS)


def names() -> tuple[str, ...]:
    """Everything that ``--backend`` takes."""
    return (*default_names(), *(record.name for record in backends.BACKENDS if not record.timed))


def default_specs() -> tuple[str, ...]:
    """The ladder, and what an installed sageattention 1 computes."""
    first = (installed("sageattention") or "").startswith("1.")
    return (*LADDER, *(("int8/fp16+block",) if first else ()))


def contestants(
    specs: Iterable[AttentionSpec | str], chosen: Sequence[str] | None = None
) -> list[Contestant]:
    """Every spec on every backend that could compute it; who can't says so when asked.

    Args:
        specs: what to compute.
        chosen: some of :func:`names`; :func:`default_names` if None.

    Raises:
        ValueError: a name is none of :func:`names`, or a text is no spec.
    """
    chosen = default_names() if chosen is None else chosen
    for name in chosen:
        if name not in names():
            raise ValueError(f"backend must be one of {', '.join(names())}, got {name!r}")
    records = {record.name: record for record in backends.BACKENDS}
    found = []
    for spec in map(AttentionSpec.parse, specs):
        for name in chosen:
            if name in SDPA_KERNELS and not spec.quantized:
                found.append(Contestant(spec, name, lambda call: None, _sdpa(SDPA_KERNELS[name])))
            elif name in records and records[name].quantizes == spec.quantized:
                record = records[name]
                found.append(Contestant(spec, name, record.refuse, _backend(record, spec)))
    return found


def _sdpa(kernel: SDPBackend) -> Callable[[Tensor, Tensor, Tensor, bool], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    return run


def _backend(
    record: backends.Backend, spec: AttentionSpec
) -> Callable[[Tensor, Tensor, Tensor, bool], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        return backends.load(record)(Call(q, k, v, None, is_causal), spec, False)[0]

    return run


def inputs(
    batch: int, heads: int, length: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v ``[B, H, L, D]``, normally distributed, always the same."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, heads, length, head_dim)
    q, k, v = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3)
    )
    return q, k, v


def distance(out: Tensor, exact: Tensor) -> float:
    """Relative L1 distance, head by head: float64 copies of all of it might not fit."""
    wrong = total = 0.0
    for ours, theirs in zip(out.flatten(0, 1), exact.flatten(0, 1), strict=True):
        wrong += (ours.float() - theirs.float()).abs().sum(dtype=torch.float64).item()
        total += theirs.float().abs().sum(dtype=torch.float64).item()
    return wrong / total if total else float("nan")


def measure(
    entrants: Sequence[Contestant],
    timer: Timer,
    *,
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    head_dims: Sequence[int] = DEFAULT_HEAD_DIMS,
    batch: int = 1,
    heads: int = 24,
    is_causal: bool = False,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.float16,
    make: Callable[..., tuple[Tensor, Tensor, Tensor]] = inputs,
    tell: Callable[[Row], None] = lambda row: None,
) -> Result:
    """Time every contestant; a row that fails does not stop the others.

    Args:
        entrants: from :func:`contestants`.
        timer: of the device.
        lengths, head_dims, batch, heads, is_causal, dtype: the calls.
        device: where they run.
        make: makes q, k and v.
        tell: called with every row once it is there.
    """
    result = Result([], {})
    for head_dim in head_dims:
        for length in lengths:
            shape = (batch, heads, length, head_dim)
            for row in _of_shape(entrants, timer, shape, is_causal, device, dtype, make, result):
                result.rows.append(row)
                tell(row)
    return result


def _of_shape(
    entrants: Sequence[Contestant],
    timer: Timer,
    shape: tuple[int, int, int, int],
    is_causal: bool,
    device: torch.device | str,
    dtype: torch.dtype,
    make: Callable[..., tuple[Tensor, Tensor, Tensor]],
    result: Result,
) -> Iterator[Row]:
    """Rows of one shape."""
    batch, heads, length, head_dim = shape
    why = None
    try:
        q, k, v = make(batch, heads, length, head_dim, torch.device(device), dtype)
        exact = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    except torch.OutOfMemoryError:
        why = "no memory for the inputs and PyTorch's result"
    for entrant in entrants:
        name = str(entrant.spec)
        row = Row(name, entrant.backend, head_dim, length, NO_MEMORY, reason=why)
        if why is not None:
            yield row
            continue
        refusal = entrant.refuse(AttentionCall.of(Call(q, k, v, None, is_causal), entrant.spec))
        if refusal is not None:
            result.refused[name, entrant.backend, head_dim] = refusal
            continue
        yield _row(entrant, timer, (q, k, v), is_causal, exact)


def _failures() -> tuple[type[Exception], ...]:
    """Of a compiler, of other packages, and of PyTorch where its kernel does not serve a call."""
    return (*compiler_errors(), ValueError, TypeError, AssertionError, ImportError)


def _row(
    entrant: Contestant,
    timer: Timer,
    qkv: tuple[Tensor, Tensor, Tensor],
    is_causal: bool,
    exact: Tensor,
) -> Row:
    batch, heads, length, head_dim = qkv[0].shape

    def row(status: str, **more: Any) -> Row:
        return Row(str(entrant.spec), entrant.backend, head_dim, length, status, **more)

    try:
        error = distance(entrant.run(*qkv, is_causal), exact)
        allowed = budget(entrant.spec, *qkv, is_causal)
        if not error <= allowed:  # NaN too
            reason = f"relative L1 {error:.3g} exceeds the {allowed:.3g} that the spec allows here"
            error_or_none = error if error < float("inf") else None
            return row(WRONG, relative_l1=error_or_none, reason=f"not timed: {reason}")
        timing = timer(lambda: entrant.run(*qkv, is_causal))
    except torch.OutOfMemoryError as caught:
        if qkv[0].device.type == "cuda":
            torch.cuda.empty_cache()
        return row(NO_MEMORY, reason=str(caught).partition(".")[0])
    except _failures() as caught:
        return row(FAILED, reason=" ".join(str(caught).split()) or type(caught).__name__)
    milliseconds = timing.median
    work = operations(batch, heads, length, head_dim, is_causal)
    return row(
        MEASURED,
        milliseconds=milliseconds,
        tops=work / milliseconds / 1e9,
        peak_mib=None if timing.peak_bytes is None else timing.peak_bytes / 2**20,
        relative_l1=error,
        host_milliseconds=timing.host_milliseconds,
        reason=GAPS if timing.gaps else None,
    )
