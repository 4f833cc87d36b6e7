"""Where kernels run: on a card, on the emulator of a checkout, or nowhere, to be compiled only."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sage_diffusion.attend.calls import AttentionCall
from sage_diffusion.kernels.attention import tuning
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.verify.cases import Case

#: Architectures that ``ptxvm`` runs whose tensor cores our kernels use.
EMULATED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")


#: Of a checkout; an installed package has something else there.
ROOT = Path(__file__).resolve().parents[2]


class PlaceError(RuntimeError):
    """Nothing can be verified here; the message is one line that says what to do."""


@dataclass(frozen=True)
class Place:
    """A card, or what stands in for one.

    Attributes:
        name: PyTorch's name of the card; "emulated sm_90".
        device: of the tensors.
        capability, hip_arch: of the card that kernels are compiled for.
        running: kernels launched within run there.
        emulated: tensors are on the CPU, and kernels are run instruction by instruction.
    """

    name: str
    device: torch.device
    capability: tuple[int, int] | None
    hip_arch: str | None = None
    running: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    emulated: bool = False

    @property
    def arch(self) -> str:
        """ "sm_89", "gfx942"."""
        if self.capability is None:
            return str(self.hip_arch)
        return f"sm_{self.capability[0]}{self.capability[1]}"

    def call(self, spec: AttentionSpec, case: Case) -> AttentionCall:
        """What backends are asked: the case on this place's card."""
        return AttentionCall(
            (case.batch, case.heads, case.q_len, case.head_dim),
            (case.batch, case.kv_heads, case.k_len, case.head_dim),
            case.dtype,
            "cuda",
            self.capability,
            self.hip_arch,
            {"": None, "additive": "additive"}.get(case.mask, "bool"),
            case.is_causal,
            case.return_lse,
            spec,
            case.rope,
        )

    def free_bytes(self) -> int:
        """Memory that cases may use; on the emulator enough for its small ones."""
        if self.device.type != "cuda":
            return 2**30
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])


def capability_of(arch: str) -> tuple[int, int]:
    """ "sm_120" -> (12, 0)."""
    digits = arch.removeprefix("sm_")
    return int(digits[:-1]), int(digits[-1])


@contextlib.contextmanager
def posing_as(arch: str) -> Iterator[None]:
    """CPU tensors get the launches of this architecture."""
    before = tuning.architecture
    tuning.architecture = lambda device: arch  # type: ignore[assignment]
    try:
        yield
    finally:
        tuning.architecture = before


def emulated(arch: str) -> Place:
    """A checkout's emulator as a card.

    Raises:
        PlaceError: an architecture that it doesn't know, or this is no checkout.
    """
    if arch not in EMULATED:
        raise PlaceError(f"--emulate must be one of {', '.join(EMULATED)}, got {arch!r}")
    ptxvm = _emulator()
    capability = capability_of(arch)

    @contextlib.contextmanager
    def running() -> Iterator[None]:
        with ptxvm.gpu(10 * capability[0] + capability[1]), posing_as(arch):
            yield

    return Place(
        f"emulated {arch}", torch.device("cpu"), capability, running=running, emulated=True
    )


def _emulator() -> Any:
    tests = ROOT / "tests"
    if not (tests / "ptxvm" / "__init__.py").is_file():
        raise PlaceError(
            "--emulate needs a checkout of the repository: the emulator is part of its tests and "
            "not of the installed package"
        )
    sys.path.insert(0, str(tests))
    try:
        return importlib.import_module("ptxvm")
    finally:
        sys.path.remove(str(tests))


def card(device: str | None = None) -> Place:
    """A CUDA or ROCm device, the current one if None.

    Raises:
        PlaceError: there is none; says what to install or update.
    """
    if torch.version.cuda is None and torch.version.hip is None:
        raise PlaceError(
            f"this PyTorch ({torch.__version__}) is a build for the CPU: install one with CUDA "
            "from https://pytorch.org/get-started/locally"
        )
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
    except (RuntimeError, AssertionError) as error:
        # "Found no NVIDIA driver ..", "The NVIDIA driver on your system is too old (found version
        # 11040). Please update your GPU driver ..": PyTorch says it better than we could guess.
        said = " ".join(str(error).split())
        raise PlaceError(f"no card can be used: {said}") from None
    where = _checked(device, count)
    with torch.cuda.device(where):
        name = torch.cuda.get_device_name(where)
    hip_arch, capability = None, None
    if torch.version.hip:
        hip_arch = torch.cuda.get_device_properties(where).gcnArchName.split(":")[0]
    else:
        capability = torch.cuda.get_device_capability(where)
    return Place(name, where, capability, hip_arch, lambda: torch.cuda.device(where))


def _checked(device: str | None, count: int) -> torch.device:
    names = ", ".join(f"cuda:{i}" for i in range(count))
    if device is None:
        return torch.device("cuda", torch.cuda.current_device())
    try:
        where = torch.device(device)
    except RuntimeError:
        where = torch.device("cpu")
    if where.type != "cuda" or (where.index or 0) >= count:
        raise PlaceError(f"--device must be one of {names}, got {device!r}")
    return torch.device("cuda", where.index or 0)
