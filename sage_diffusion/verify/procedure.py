"""The steps of a verification, on a card or on the emulator, for a command, a script and a node."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata

import torch

from sage_diffusion.verify import places, run, speed, worker
from sage_diffusion.verify.cases import (
    CARD_CASES,
    EMULATED_CASES,
    REPEATED,
    REPEATED_EMULATED,
)
from sage_diffusion.verify.kernels import Kernel
from sage_diffusion.verify.places import Place, PlaceError
from sage_diffusion.verify.run import Verdict


def ready_card(device: str | None = None) -> Place:
    """A card on which Triton launches kernels.

    Raises:
        PlaceError: there is none; one line that says what to do.
    """
    place = places.card(device)
    check_triton()
    from sage_diffusion.kernels.quantize import triton as quantize

    try:
        with place.running():
            mean = quantize.token_mean(torch.ones(1, 1, 16, 64, device=place.device))
            torch.testing.assert_close(mean, torch.ones_like(mean))
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise PlaceError(
            f"Triton can't run a kernel on {place.name}: {said}{_hint(said)}"
        ) from None
    return place


def _hint(said: str) -> str:
    """What helps against the errors that a fresh machine has."""
    if "C compiler" in said or "gcc" in said:
        return "; install one (apt install gcc), Triton builds its launcher with it"
    if any(text in said for text in ("toolchain", "kernel image", "insufficient", "ptxas")):
        driver = "the card's driver"
        return f"; update {driver}: it is older than the CUDA {torch.version.cuda} of PyTorch"
    return ""


def check_triton() -> None:
    """Raise a :class:`PlaceError` that says what to install unless Triton imports."""
    needed = _needed_triton()
    try:
        import triton
        import triton.language
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise PlaceError(_broken(error, needed)) from None
        raise PlaceError(f"Triton is not installed: pip install '{needed}'") from None
    except Exception as error:  # a broken one may raise anything
        raise PlaceError(_broken(error, needed)) from None
    assert triton.language


def _broken(error: Exception, needed: str) -> str:
    said = " ".join(str(error).split())
    return f"Triton does not import ({said}): pip install --force-reinstall '{needed}'"


def _needed_triton() -> str:
    """The requirement of the installed PyTorch, "triton==3.6.0"."""
    if sys.platform == "win32":
        return "triton-windows"
    for requirement in metadata.requires("torch") or ():
        name = requirement.split(";")[0].strip()
        if name.startswith(("triton", "pytorch-triton")):
            return name.replace(" ", "")
    return "triton"


def compile_ahead(place: Place, kernels: Sequence[Kernel], jobs: int) -> float:
    """Compile for a card in many processes; returns the seconds it took.

    The emulator's kernels are compiled where they are run, and so are an AMD card's.
    """
    if place.emulated or place.capability is None or jobs < 2:
        return 0.0
    return worker.compile_ahead(place.arch, kernels, (*CARD_CASES, *REPEATED), jobs)


def verdicts(place: Place, kernels: Sequence[Kernel]) -> Iterator[list[Verdict]]:
    """Verdicts of one kernel after the other (:func:`.run.combine` makes one list of them).

    On a card each in a process that may die, on the emulator in this one.
    """
    if place.emulated:
        return run.verify(kernels, place, EMULATED_CASES, REPEATED_EMULATED)
    return worker.isolated(place, kernels)


def times(place: Place, kernels: Iterable[Kernel], found: Iterable[Verdict]) -> list[speed.Time]:
    """Times of the kernels that are right; none on the emulator, whose time means nothing."""
    if place.emulated:
        return []
    from sage_diffusion.speed.timing import CudaTimer

    right = {verdict.kernel for verdict in found if verdict.status == "right"}
    with place.running():
        timer = CudaTimer(place.device, repeats=10, warmup=2, seconds=0.5)
        chosen = [kernel for kernel in kernels if kernel.name in right]
        return list(speed.times(chosen, timer, place.device))
