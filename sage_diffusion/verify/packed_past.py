"""The kernels of a packed past: packing bit by bit, decode attention against twin and float64."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from sage_diffusion.attend.execution import compiler_errors
from sage_diffusion.kernels.kv import layout, reference, tuning
from sage_diffusion.kernels.kv.layout import Width
from sage_diffusion.kernels.kv.quantize import Axis, Form, quantize
from sage_diffusion.kernels.kv.sides import Side, Turn
from sage_diffusion.verify import places
from sage_diffusion.verify.checks import poisoned, relative_l1
from sage_diffusion.verify.places import Place
from sage_diffusion.verify.run import Status, Verdict

#: Names of verdicts, by backend.
NAMES = {"pack": "packed past: words", "gluon": "packed past gluon", "triton": "packed past triton"}

#: Largest relative L1 distance from the twin on the same codes: Q times K's step, and P times V's,
#: are rounded to half; the plain Triton kernel rounds V to half too.
DISTANCE, LSE = 2e-3, 2e-2

#: Seconds that all kernels may take, compilation included.
PATIENCE = 240.0

_MARK = "packed past: "


class Case(NamedTuple):
    """One call: widths of K and V, tokens that share a step of K, channels that share one of V.

    ``turned``: K is from before RoPE, which the kernel in Triton alone takes.
    """

    name: str
    shape: tuple[int, int, int, int, int, int]  # batch, KV heads, query heads of each, L, D, tokens
    widths: tuple[Width, Width]
    groups: tuple[int, int]
    form: Form = "fp16"
    masked: bool = False
    turned: bool = False


#: Shapes that both kernels know.
CARD_CASES = (
    Case("4,000 tokens of 2 bits", (1, 8, 8, 1, 128, 4000), (2, 2), (128, 128)),
    Case("groups of 32", (2, 4, 4, 1, 128, 1000), (3, 2), (32, 32), masked=True),
    Case("8 and 4 bits, 16 rows", (1, 2, 4, 4, 64, 1031), (8, 4), (64, 64), "fp8"),
    Case("video", (1, 2, 1, 2, 128, 3120), (4, layout.TERNARY), (312, 64), "fp8", True),
    Case("head dim 256", (1, 2, 8, 1, 256, 777), (2, 1), (24, 256)),
    Case("one token", (1, 1, 1, 1, 64, 1), (2, 2), (1, 64)),
    Case("keys before RoPE", (2, 4, 4, 1, 128, 1000), (3, 2), (64, 64), masked=True, turned=True),
)
EMULATED_CASES = (
    Case("odd lengths, grouped heads", (1, 1, 3, 2, 64, 70), (3, 2), (40, 32), "fp8", True),
    Case("keys before RoPE", (2, 1, 2, 1, 64, 70), (2, 2), (24, 64), turned=True),
)


def verify(place: Place) -> list[Verdict]:
    """Verdicts on a place's kernels: on the emulator here, on a card in a process of their own."""
    if place.emulated:
        with place.running():
            return verdicts(place, EMULATED_CASES)
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main(sys.argv[1])"
    command = [sys.executable, "-c", code, str(place.device)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return _dead(f"no result after {PATIENCE:.0f} seconds: it hangs")
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return [Verdict.from_dict(data) for data in json.loads(line[len(_MARK) :])]
    said = next((text for text in reversed(done.stderr.splitlines()) if text.strip()), "")
    return _dead(f"its process ended with code {done.returncode}: {said.strip()}")


def main(device: str) -> None:
    """Of the process that may die: print the verdicts."""
    place = places.card(device)
    found = verdicts(place, CARD_CASES)
    print(_MARK + json.dumps([verdict.as_dict() for verdict in found]), flush=True)


def _dead(reason: str) -> list[Verdict]:
    """Nobody knows in which kernel."""
    return [Verdict(name, "failed", reason) for name in NAMES.values()]


def verdicts(place: Place, cases: tuple[Case, ...]) -> list[Verdict]:
    """Verdicts of all cases, on the device of this place."""
    found = [_check_words(place.device, cases)]
    for backend in ("gluon", "triton"):
        if backend == "triton" or place.capability is not None:
            found.append(_check_decode(place.device, backend, cases))
    return found


def _check_words(device: torch.device, cases: tuple[Case, ...]) -> Verdict:
    ran = 0
    try:
        from sage_diffusion.kernels.kv import triton

        for width in layout.WIDTHS:
            generator = torch.Generator().manual_seed(ran)
            shape = (*cases[0].shape[:2], 40, cases[0].shape[4])
            codes = torch.randint(
                0, layout.levels(width), shape, dtype=torch.uint8, generator=generator
            )
            with poisoned():
                words = triton.pack(codes.to(device), width)
                back = triton.unpack(words, width, shape[3])
            ran += 1
            if not torch.equal(words.cpu(), layout.pack(codes, width)):
                return Verdict(NAMES["pack"], "wrong", f"words of width {width} differ", cases=ran)
            if not torch.equal(back.cpu(), codes):
                return Verdict(NAMES["pack"], "wrong", f"codes of width {width} differ", cases=ran)
    except Exception as error:  # a kernel may raise anything
        return Verdict(NAMES["pack"], *_failure(error), cases=ran)
    return Verdict(NAMES["pack"], "right", cases=ran)


def _failure(error: Exception) -> tuple[Status, str]:
    said = " ".join(str(error).split()) or type(error).__name__
    return ("not compiled" if isinstance(error, compiler_errors()) else "failed"), said[:300]


def _check_decode(device: torch.device, backend: str, cases: tuple[Case, ...]) -> Verdict:
    name, ran = NAMES[backend], 0
    twin = exact = 0.0
    try:
        for case in (case for case in cases if _takes(backend, device, case)):
            given = _inputs(case, device)
            with poisoned():
                out, lse = _run(backend, *given)
            ran += 1
            want, want_lse = reference.decode(*given[:3], 0.1, *given[3:])
            distance = relative_l1(out, want)
            twin, exact = max(twin, distance), max(exact, relative_l1(out, _exact(*given)))
            hidden = want_lse == -torch.inf
            off = (lse - want_lse)[~hidden].abs().max().item()
            if not (distance <= DISTANCE and off <= LSE and bool((out[hidden] == 0).all())):
                reason = f"{case.name}: {distance:.1e} from the twin, log-sum-exp {off:.1e} off"
                return Verdict(name, "wrong", reason, (case.shape[4],), ran)
    except Exception as error:  # a kernel may raise anything
        return Verdict(name, *_failure(error), cases=ran)
    return Verdict(name, "right", "", (), ran, twin, exact)


def _takes(backend: str, device: torch.device, case: Case) -> bool:
    if not case.turned:
        return True
    if backend != "triton":
        return False
    from sage_diffusion.kernels.attention.tuning import architecture

    return tuning.refuse_turn(architecture(device), case.groups[0], case.shape[4]) is None


def _run(
    backend: str, q: Tensor, k: Side, v: Side, mask: Tensor | None, turn: Turn | None
) -> tuple[Tensor, Tensor]:
    from sage_diffusion.kernels.kv import triton

    if backend == "triton":
        return triton.merge(*triton.decode(q, k, v, 0.1, mask, turn))
    from sage_diffusion.kernels.kv import gluon

    return triton.merge(*gluon.decode(q, k, v, 0.1, mask))


def _inputs(
    case: Case, device: torch.device
) -> tuple[Tensor, Side, Side, Tensor | None, Turn | None]:
    batch, heads, group, queries, dim, tokens = case.shape
    generator = torch.Generator(device).manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def side(width: Width, axis: Axis, size: int) -> Side:
        room = -(-tokens // size) * size if axis == "channel" else tokens
        made = quantize(normal(batch, heads, room, dim) + normal(dim), width, axis, size, case.form)
        words = layout.pack(made.codes, width)
        return Side(words, made.step, made.zero, width, axis, size, dim, tokens)

    q = normal(batch, heads * group, queries, dim).half()
    k = side(case.widths[0], "channel", case.groups[0])
    v = side(case.widths[1], "token", case.groups[1])
    mask = None
    if case.masked:
        mask = normal(batch, 1, queries, tokens) < 0.5
        mask[:, :, 1:2] = False  # sees nothing
    turn = None
    if case.turned:
        angles = 1e4 ** -(torch.arange(dim // 2, device=device).double() * 2 / dim)
        turn = Turn(angles, 1.0, torch.arange(batch, device=device) * 900)
    return q, k, v, mask, turn


def _exact(q: Tensor, k: Side, v: Side, mask: Tensor | None, turn: Turn | None) -> Tensor:
    """Attention in float64 on what the codes stand for."""
    group = q.shape[1] // k.words.shape[1]
    keys, values = (s.read(0, s.tokens) for s in (k, v))
    keys = keys if turn is None else turn.keys(keys, 0)
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = q.double() @ keys.transpose(2, 3) * 0.1
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ values
