"""Run a call, and what happens where its kernel does not compile.

A backend refuses what it knows it can't serve before anything is compiled.  Should the compiler
fail all the same, the error names the kernel, the target and what the compiler said.  With
``backend="auto"`` the next backend that serves the *same spec* runs the call instead; a backend
that was named never falls back.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sage_diffusion.attend import backends
from sage_diffusion.attend.backends import Backend
from sage_diffusion.attend.calls import AttentionCall, Call
from sage_diffusion.attend.validation import check_call, check_rotations, four_dims
from sage_diffusion.kernels.spec import AttentionSpec

log = logging.getLogger("sage_diffusion")

#: How Triton's own passes report a failure: as a plain RuntimeError.
_PASS_FAILED = "PassManager::run failed"


class KernelCompilationError(RuntimeError):
    """A kernel could not be compiled (or its compiled code not be loaded) for a card.

    Attributes:
        kernel: its name, "triton: _attention_fwd_kernel".
        target: the card's architecture, "sm_89" or "gfx942".
        message: the compiler's.
    """

    def __init__(self, kernel: str, target: str, message: str):
        super().__init__(kernel, target, message)
        self.kernel, self.target, self.message = kernel, target, message

    def __str__(self) -> str:
        return f"{self.kernel} could not be compiled for {self.target}: {self.message}"


class Failures:
    """Kernels that one session could not compile, so that not every call tries them again.

    Belongs to a session and not to the process: a fixed driver or an emptied compiler cache is
    tried anew by the next session.

    Attributes:
        counts: error -> calls that another backend or the host ran because of it.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._known: dict[tuple[object, ...], dict[str, str]] = {}

    def add(self, call: AttentionCall, backend: str, reason: str) -> None:
        """This backend's kernel for such calls does not compile."""
        log.warning("%s; another backend is tried", reason)
        self._known.setdefault(_variant(call), {})[backend] = reason

    def of(self, call: AttentionCall) -> tuple[tuple[str, str], ...]:
        """``(backend, reason)`` of those that failed for such a call."""
        if not self._known:
            return ()
        return tuple(self._known.get(_variant(call), {}).items())

    def count(self, call: AttentionCall) -> None:
        """Such a call was served, or not, without the backends that failed."""
        for _, reason in self.of(call):
            self.counts[reason] += 1


def run(
    call: Call, asked: AttentionCall, backend: str, failures: Failures | None = None
) -> tuple[Backend, Tensor, Tensor | None]:
    """Run a call on the backend that :func:`~sage_diffusion.attend.backends.select` picks.

    Args:
        call: already checked; what q and k are to be rotated by is folded into the backend where
            it can, else Torch rotates first.
        asked: describes it.
        backend: "auto" or a name.
        failures: what failed to compile earlier and, in the end, now; forgotten if None.

    Returns:
        The backend, the output and the log-sum-exp or None.

    Raises:
        BackendUnavailable: no backend (or not the named one) can run the call.
        KernelCompilationError: the named backend's kernel does not compile.
    """
    failures = Failures() if failures is None else failures
    if call.mask is not None and call.mask.ndim != 4:
        call = call._replace(mask=four_dims(call.mask))
    try:
        while True:
            chosen = backends.select(asked, backend, failures.of(asked))
            compute = backends.load(chosen)
            try:
                # Not every backend's launches look where their tensors are, and some that do leave
                # another device current than they found.
                with torch.cuda.device_of(call.q):
                    given = call if chosen.folds_rope else call.rotated()
                    out, lse = compute(given, asked.spec, asked.return_lse)
            except compiler_errors() as error:
                failure = _failure(chosen.name, asked, error)
                if failure is None:
                    raise
                if backend != "auto":
                    raise failure from error
                failures.add(asked, chosen.name, str(failure))
                continue
            return chosen, out, lse
    finally:
        failures.count(asked)


def compute(
    call: Call, spec: AttentionSpec, backend: str, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """:func:`sage_diffusion.attention` without the conveniences: a parsed spec, always a pair."""
    check_call(call)
    check_rotations(call)
    _, out, lse = run(call, AttentionCall.of(call, spec, return_lse), backend)
    return out, lse


def _variant(call: AttentionCall) -> tuple[object, ...]:
    """What a compiled kernel depends on: everything but the lengths and numbers of heads."""
    return (
        call.q_shape[-1],
        call.dtype,
        call.capability,
        call.hip_arch,
        call.mask,
        call.is_causal,
        call.return_lse,
        call.spec,
        call.rope,
    )


def compiler_errors() -> tuple[type[Exception], ...]:
    """What a kernel that does not compile may raise; not all of Triton's errors are RuntimeErrors.

    Looked up once something was raised: without Triton nothing of Triton's can be.
    """
    found: list[type[Exception]] = [RuntimeError]
    if "triton" in sys.modules:
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        found += [CompilationError, OutOfResources, PTXASError]
    return tuple(found)


def _failure(backend: str, call: AttentionCall, error: Exception) -> KernelCompilationError | None:
    """The error in our words, or None if it isn't the compiler's."""
    if isinstance(error, RuntimeError) and _PASS_FAILED not in str(error):
        return None
    kernel = _kernel_name(error.__traceback__)
    name = f"{backend}: {kernel}" if kernel else backend
    return KernelCompilationError(name, target(call), " ".join(str(error).split()))


def target(call: AttentionCall) -> str:
    """ "sm_89", "gfx942", or the device's type where there is no GPU."""
    if call.capability is not None:
        return f"sm_{call.capability[0]}{call.capability[1]}"
    return call.hip_arch or call.device


def _kernel_name(traceback: TracebackType | None) -> str:
    """Triton's errors don't say which kernel was being launched, the stack that they left does."""
    name = ""
    while traceback is not None:
        launched: Any = traceback.tb_frame.f_locals.get("self")
        if hasattr(launched, "fn") and hasattr(launched, "arg_names"):  # a triton.JITFunction
            name = getattr(launched.fn, "__name__", name)
        traceback = traceback.tb_next
    return name
