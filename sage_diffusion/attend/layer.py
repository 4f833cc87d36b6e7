"""``Layer``: one attention module of a patched model, what it ran and what it declined."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sage_diffusion.attend import ops
from sage_diffusion.attend.calls import Call, Native, torch_native
from sage_diffusion.kernels.rope import Rope
from sage_diffusion.kernels.spec import AttentionSpec

log = logging.getLogger("sage_diffusion")


class Serves(Protocol):
    """What a layer needs of its session.

    Attributes:
        strict: a call that can't be served is an error.
        logged: reasons that the log has.
    """

    strict: bool
    logged: set[str]

    def adopt(self, layer: Layer) -> int:
        """List the layer; its number."""

    def quantizes(self, layer: str, tokens: int, *, whole: bool = False) -> bool:
        """Does the plan quantize a call with this many keys?"""

    def serve(self, layer: Layer, call: Call, native: Native) -> Tensor:
        """One call, as the session decides."""


class AttentionRefused(RuntimeError):
    """A strict session met a call that its plan quantizes and nobody can run."""


class Layer:
    """One attention module of a patched model; calls go through it.

    Args:
        session: decides and runs.
        name: what plans and summaries call the layer.
        native: the host's own attention.
        listed: False enters the layer into the session's table on its first call only: for calls
            that a module may make or not.
    """

    def __init__(
        self,
        session: Serves,
        name: str,
        native: Native | None = None,
        listed: bool = True,
    ):
        self.session = session
        self.name = name
        self.native: Native = native or torch_native
        self.ran: Counter[tuple[str, str]] = Counter()  # (spec, backend) -> calls
        self.declined: Counter[str] = Counter()  # reason -> calls
        # A call that is served in parts counts once for each in `ran` and `declined`: so many parts
        # there are beyond the first, and quantized ones beyond the first quantized.
        self.further = self.further_quantized = 0
        self.tokens = 0  # most keys of a call
        self.index = session.adopt(self) if listed else -1
        self.handle = ops.register(self)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        *,
        rope_q: Rope | None = None,
        rope_k: Rope | None = None,
    ) -> Tensor:
        """Attention as the session decides; inside ``torch.compile`` one opaque operator.

        Captured in a CUDA graph by hand, see :meth:`AttentionSession.serve`.
        """
        call = Call(q, k, v, mask, is_causal, scale, rope_q, rope_k)
        if torch.compiler.is_compiling():
            return ops.by_layer(call, self.handle)
        return self.attend(call)

    def enlist(self) -> None:
        """Enter the session's table, if it does not stand there yet."""
        if self.index < 0:
            self.index = self.session.adopt(self)

    def attend(self, call: Call, native: Native | None = None) -> Tensor:
        """The call as the session decides, see :meth:`AttentionSession.serve`."""
        return self.session.serve(self, call, native or self.native)

    def bypass(self, tokens: int, reason: str) -> None:
        """Count a call that never reaches :meth:`attend` because the host must run it itself.

        Declined where the plan quantizes a call with this many keys, else run as planned.
        """
        self.tokens = max(self.tokens, tokens)
        if self.session.quantizes(self.name, tokens):
            self.decline(reason)
        else:
            self.keep()

    def keep(self, reason: str | None = None) -> None:
        """Count a call that the host runs itself without being at fault, strict or not.

        Args:
            reason: why the model wants it so although the plan quantizes it; None where it is
                planned.
        """
        self.enlist()
        if reason is None:
            self.ran["fp16", "native"] += 1
        else:
            self.declined[reason] += 1

    def decline(self, reason: str) -> None:
        """Count a call that the host must run itself; raises in a strict session."""
        self.enlist()
        if self.session.strict:
            raise AttentionRefused(f"{self.name}: {reason}")
        if reason not in self.session.logged:
            self.session.logged.add(reason)
            log.warning("%s runs its own attention: %s", self.name, reason)
        self.declined[reason] += 1

    def served_in_parts(self, specs: Sequence[AttentionSpec]) -> None:
        """The parts that were just counted, and ran these specs, are one call of the host."""
        self.further += len(specs) - 1
        self.further_quantized += max(sum(spec.quantized for spec in specs) - 1, 0)

    def forget(self) -> None:
        """Count from zero."""
        self.ran.clear()
        self.declined.clear()
        self.further = self.further_quantized = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        session = copy.deepcopy(self.session, memo)
        if id(self) not in memo:  # copying the session copies the layers that it lists
            memo[id(self)] = Layer(session, self.name, self.native, self.index >= 0)
        return memo[id(self)]

    def __reduce__(self) -> tuple[Any, ...]:
        return Layer, (self.session, self.name, self.native, self.index >= 0)
