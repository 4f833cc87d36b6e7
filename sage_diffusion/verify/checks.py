"""One kernel on one case: quantizers bit by bit, attention on the same codes, the whole call.

What a kernel does not write is NaN or 0x7F here, not a convenient zero (:func:`poisoned`).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sage_diffusion.kernels.attention import reference, terms
from sage_diffusion.kernels.formats import Precision, QuantizedTensor, QuantizedValue
from sage_diffusion.kernels.quantize import reference as twin
from sage_diffusion.kernels.quantize.limits import score_gain, value_options
from sage_diffusion.kernels.quantize.permute import permute_value
from sage_diffusion.kernels.rope import apply_rope
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.speed.bench import MARGIN
from sage_diffusion.verify.cases import Case, Inputs
from sage_diffusion.verify.kernels import Kernel, in_token_order

if TYPE_CHECKING:
    from sage_diffusion.kernels.attention.operands import Operands

#: Largest relative L1 distance from the twin on the same codes, by format of P and V: tensor cores
#: sum in another order and, in FP8, with fewer bits; exp2 may differ in its last place and round P
#: to the neighbouring code.
TWIN = {"fp16": 5e-4, "int8": 1e-3, "fp8": 2e-3, "fp4": 2e-3}

#: The same where Q K^T is a product of E4M3 on ``wgmma``, which keeps 14 bits of a sum: an H200 is
#: up to 3.0e-3 from the twin, which sums in float32.
TWIN_E4M3_SCORES = 5e-3

#: The same of one row, relative to its largest value: about one code of P.
ROW = {"fp16": 0.01, "int8": 0.03, "fp8": 0.13, "fp4": 0.4}

#: Largest error of a mean, relative to the largest value, and of a log-sum-exp.
MEAN, LSE = 1e-5, 2e-3

#: Largest share of channels whose factor differs from the twin's.
FACTORS = 0.01


class Finding(NamedTuple):
    """What is wrong.

    Attributes:
        kernel: "rows int4", "value fp8", "gluon int4/fp8-fast".
        case: name of the case.
        reason: in words.
    """

    kernel: str
    case: str
    reason: str


class Distances(NamedTuple):
    """Relative L1 distances of an output: from the twin, and from attention in float64."""

    twin: float
    exact: float


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory of Torch is NaN, or 0x7F bytes in integers."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(make)
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            if x.is_floating_point() and x.element_size() > 1:
                return x.fill_(math.nan)
            if x.numel():
                x.view(torch.uint8).fill_(0x7F)  # NaN in E4M3 too
            return x

        return filled

    before = torch.empty, torch.empty_like
    torch.empty, torch.empty_like = poison(before[0]), poison(before[1])
    try:
        yield
    finally:
        torch.empty, torch.empty_like = before


def relative_l1(got: Tensor, want: Tensor) -> float:
    """Sum of absolute differences over the sum of absolute values, in float64."""
    got, want = got.double(), want.double()
    return ((got - want).abs().sum() / want.abs().sum().clamp(min=1e-30)).item()


def exact_attention(x: Inputs, is_causal: bool) -> Tensor:
    """``[B, H, Lq, D]`` in float64, head by head; a fully masked row gives 0."""
    q, k = apply_rope(x.q, x.rope).double(), apply_rope(x.k, x.rope).double()
    group = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            s = q[b, h] @ k[b, h // group].T / math.sqrt(q.shape[-1])
            if is_causal:
                hidden = torch.ones(s.shape, dtype=torch.bool, device=s.device).triu(1)
                s = s.masked_fill(hidden, -math.inf)
            if x.mask is not None:
                mask = x.mask.expand(*q.shape[:2], *s.shape)[b, h]
                boolean = mask.dtype == torch.bool
                s = s.masked_fill(~mask, -math.inf) if boolean else s + mask.double()
            out[b, h] = torch.softmax(s, -1).nan_to_num(0.0) @ x.v[b, h // group].double()
    return out


def check_operands(kernel: Kernel, case: Case, x: Inputs, operands: Operands) -> list[Finding]:
    """Codes and scales against the twin's, bit for bit given the same means."""
    spec, names = kernel.spec, kernel.quantizers
    here = Inputs(*(None if t is None else _to_cpu(t) for t in x))  # type: ignore[arg-type]
    q, k = apply_rope(here.q, here.rope), apply_rope(here.k, here.rope)
    options: dict[str, Any] = {
        "rotation": spec.rotate,
        "sign_seed": here.sign_seed,
        "clip": spec.clip,
    }
    of_scores = operands.multiplier * score_gain(spec, q.shape[-1])
    found = []
    if spec.balance and (wrong := _wrong_balance(q, k, here.v, spec, operands)):
        found.append(Finding(names[1], case.name, wrong))
    for letter, name, rows, mean, factor, codes, multiplier in (
        ("q", names[0], q, operands.q_mean, operands.q_factor, operands.q, of_scores),
        ("k", names[1], k, operands.k_mean, operands.k_factor, operands.k, 1.0),
    ):
        mean = None if mean is None else mean.cpu()
        options["factor"] = None if factor is None else factor.cpu()
        sampled = spec.balance and letter == "k"
        if mean is not None and (wrong := _wrong_mean(rows, mean, sampled)):
            found.append(Finding(name, case.name, f"{letter}'s mean {wrong}"))
            continue
        want = twin.quantize_rows(rows, spec.qk, mean=mean, multiplier=multiplier, **options)
        found += _compare(name, case, letter, codes, want)
    if isinstance(operands.v, QuantizedValue):
        mean = None if operands.v.mean is None else operands.v.mean.cpu()
        sums = operands.v.sums is not None
        scale = operands.v.scale.cpu() if spec.sample_v else None
        if scale is not None and (wrong := _wrong_scale(here.v, scale, spec)):
            found.append(Finding(names[2], case.name, wrong))
        want_v = twin.quantize_value(
            here.v,
            spec.pv,
            mean=mean,
            scale=scale,
            sums=sums,
            by_tile=spec.tile_v,
            **value_options(spec),
        )
        want_v = permute_value(want_v) if kernel.permuted else want_v
        found += _compare(names[2], case, "v", operands.v, want_v)
    return found


def _to_cpu(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else type(x)(x.cos.cpu(), x.sin.cpu(), x.interleaved)


def _wrong_balance(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, operands: Operands) -> str:
    """What is wrong with the factors of channels; sums in another order may cross a rounding."""
    want = twin.sample(q, k, v, spec)
    assert operands.q_factor is not None and operands.k_factor is not None
    got_q, got_k = operands.q_factor.cpu(), operands.k_factor.cpu()
    if not torch.equal(got_q * got_k, torch.ones_like(got_q)):
        return "factors of Q's and K's channels are not inverses of each other"
    assert want.q_factor is not None
    share = torch.ne(got_q, want.q_factor).double().mean().item()
    return "" if share <= FACTORS else f"factors of channels differ from the twin's in {share:.2%}"


def _wrong_mean(rows: Tensor, mean: Tensor, sampled: bool) -> str:
    """What is wrong with a mean over the tokens, or some of them, or over every 128 of them."""
    exact = rows.double()
    if sampled:
        exact = exact[:, :, twin.sampled_tokens(rows.shape[2], rows.device)]
    if mean.ndim == 3:
        want = exact.mean(2)
    else:
        want = torch.stack([part.mean(2) for part in exact.split(128, 2)], 2)
    error = ((mean - want).abs().max() / exact.abs().max().clamp(min=1e-30)).item()
    return "" if error <= MEAN else f"is off by {error:.2g} of the largest value"


def _wrong_scale(v: Tensor, scale: Tensor, spec: AttentionSpec) -> str:
    """What is wrong with scales of V that come from some of its tokens."""
    want = twin.sample(v, v, v, spec).v_scale
    assert want is not None
    error = ((scale - want).abs() / want).max().item()
    return "" if error <= MEAN else f"v's scales are off by {error:.2g}"


def _compare(
    name: str,
    case: Case,
    letter: str,
    got: QuantizedTensor | QuantizedValue,
    want: QuantizedTensor | QuantizedValue,
) -> list[Finding]:
    """Equal bit for bit, or which part differs in how many places."""
    for part in ("data", "scale", "micro", "sums", "tiles"):
        a, b = getattr(got, part, None), getattr(want, part, None)
        if a is None or b is None:
            continue
        a, b = a.cpu().contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
        share = (a != b).double().mean().item() if a.shape == b.shape else 1.0
        if share:
            what = {"data": "codes", "scale": "scales", "micro": "micro scales"}.get(part, part)
            reason = f"{letter}'s {what} differ from the twin's in {share:.2%} of their bytes"
            return [Finding(name, case.name, reason)]
    return []


def check_attention(
    kernel: Kernel,
    case: Case,
    x: Inputs,
    operands: Operands,
    got: tuple[Tensor, Tensor | None],
    *,
    whole: bool = True,
) -> tuple[Distances, list[Finding]]:
    """An output against the twin on the same codes and, where ``whole``, against float64."""
    spec, (out, lse) = kernel.spec, got
    delta = None
    if operands.q_mean is not None:
        k = apply_rope(x.k, x.rope)
        delta = reference.delta_s(operands.q_mean, k, operands.k_mean, operands.multiplier)
    want, want_lse = reference.attend_quantized(
        operands.q,
        operands.k,
        in_token_order(operands, kernel),
        delta_s=delta,
        mask=x.mask,
        is_causal=case.is_causal,
        fp16_accumulator=spec.pv_accumulator == "fp16",
        unsigned_p=spec.unsigned_p,
        tile=kernel.tile,
    )
    reasons = []
    hidden = torch.isneginf(want_lse)
    unwritten = ~out.isfinite().all(-1)
    if unwritten.any():
        where = [int(i) for i in unwritten.nonzero()[0]]
        reasons.append(
            f"{int(unwritten.sum())} of {unwritten.numel()} rows are not finite or were not "
            f"written, the first at batch {where[0]}, head {where[1]}, token {where[2]}"
        )
    elif out[hidden].any():
        reasons.append("a row that sees no key is not zero")
    want = want.to(out.dtype)
    distances = Distances(
        relative_l1(out, want), relative_l1(out, exact_attention(x, case.is_causal))
    )
    if not reasons:
        reasons += _far_from_twin(spec, out, want, distances.twin)
    if whole and not reasons:
        reasons += _far_from_exact(spec, case, x, distances.exact)
    if lse is not None and not reasons:
        if operands.k_mean is not None:
            want_lse = want_lse + terms.smoothed_lse(
                x.q, operands.k_mean, operands.sm_scale, x.rope
            )
        error = (lse - want_lse).masked_fill(hidden & torch.isneginf(lse), 0.0).abs().max().item()
        if not error <= LSE:
            reasons.append(f"the log-sum-exp differs from the twin's by {error:.2g}")
    return distances, [Finding(kernel.name, case.name, reason) for reason in reasons]


def _far_from_exact(spec: AttentionSpec, case: Case, x: Inputs, distance: float) -> list[str]:
    """Much farther from float64 than the twin is, whole call against whole call."""
    eager, _ = reference.attention(
        x.q,
        x.k,
        x.v,
        spec,
        mask=x.mask,
        is_causal=case.is_causal,
        rope_q=x.rope,
        rope_k=x.rope,
        sign_seed=x.sign_seed,
    )
    allowed = MARGIN * relative_l1(eager, exact_attention(x, case.is_causal))
    if distance <= allowed:
        return []
    return [
        f"relative L1 {distance:.2g} from exact attention exceeds {MARGIN:g} times the twin's, "
        f"{allowed:.2g}"
    ]


def _far_from_twin(spec: AttentionSpec, out: Tensor, want: Tensor, distance: float) -> list[str]:
    """Too far as a whole, or in one row."""
    allowed = TWIN_E4M3_SCORES if spec.qk is Precision.FP8 else TWIN[spec.pv]
    if not distance <= allowed:
        return [f"relative L1 {distance:.2g} from the twin on the same codes exceeds {allowed:g}"]
    error = (out.float() - want.float()).abs().amax(-1)
    row = error / want.float().abs().amax(-1).clamp(min=1e-30)
    if not row.max() <= ROW[spec.pv]:
        token = int((row == row.max()).nonzero()[0, -1])
        return [
            f"token {token} differs from the twin on the same codes by {row.max().item():.2g} of "
            f"its largest value, allowed are {ROW[spec.pv]:g}"
        ]
    return []


def check_repeats(
    kernel: Kernel, case: Case, run: Callable[[], tuple[Tensor, Tensor | None]], times: int
) -> list[Finding]:
    """The same bits every time: a race moves some.  Nothing waits between two runs."""
    first = run()
    moved = torch.zeros((), dtype=torch.int64, device=first[0].device)
    for _ in range(times):
        for a, b in zip(first, run(), strict=True):
            if a is not None and b is not None:
                moved += (a.view(torch.uint8) != b.view(torch.uint8)).sum()
    if not moved.item():
        return []
    reason = f"{times} repetitions differ in {moved.item()} bytes from the first run: a race"
    return [Finding(kernel.name, case.name, reason)]
