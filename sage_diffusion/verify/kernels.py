"""The attention kernels by name: whole calls, and their halves for a comparison and a timing."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sage_diffusion.attend import backends
from sage_diffusion.attend.calls import Call
from sage_diffusion.kernels.attention.record import Kernels
from sage_diffusion.kernels.formats import QuantizedValue, padded_dim
from sage_diffusion.kernels.spec import LADDER, AttentionSpec
from sage_diffusion.verify.cases import Case, Inputs
from sage_diffusion.verify.places import Place

if TYPE_CHECKING:
    from sage_diffusion.kernels.attention.operands import Operands

#: The quantized ladder, and what a kernel computes beyond it.
SPECS = (*LADDER[1:], "fp8/fp8")


class Kernel(NamedTuple):
    """One attention kernel: a backend of this package and a spec that it computes."""

    backend: str
    spec: AttentionSpec

    @property
    def name(self) -> str:
        """ "gluon int4/fp8-fast"."""
        return f"{self.backend} {self.spec}"

    @property
    def quantizers(self) -> tuple[str, str, str]:
        """Names of the quantizers that write its Q, K and V; "" where V stays as it is."""
        rows = f"rows {self.spec.qk}"
        fast = "-fast" if self.spec.pv_accumulator == "fp16" else ""
        return rows, rows, "" if self.spec.pv == "fp16" else f"value {self.spec.pv}{fast}"

    @property
    def record(self) -> backends.Backend:
        """The backend."""
        return backends.named(self.backend)

    @property
    def ours(self) -> Kernels:
        """What is known of it."""
        return backends.ours()[self.backend]

    @property
    def permuted(self) -> bool:
        """Whether V's tokens are in the order of P's registers."""
        return self.ours.permuted(self.spec)

    @property
    def tile(self) -> int:
        """Keys of a tile."""
        return self.ours.tile_keys

    def run(self, x: Inputs, case: Case) -> tuple[Tensor, Tensor | None]:
        """A whole call, as ``backend=`` with this name runs it."""
        call = Call(x.q, x.k, x.v, x.mask, case.is_causal, None, x.rope, x.rope, x.sign_seed)
        return backends.load(self.record)(call, self.spec, case.return_lse)

    def quantize(self, x: Inputs) -> Operands:
        """Smooth, rotate and quantize."""
        from sage_diffusion.kernels.attention.operands import quantize_operands

        return quantize_operands(
            x.q,
            x.k,
            x.v,
            self.spec,
            permuted=self.permuted,
            column_factor=self.ours.column_factor(self.spec),
            rope_q=x.rope,
            rope_k=x.rope,
            sign_seed=x.sign_seed,
        )

    def attend(self, operands: Operands, x: Inputs) -> Tensor:
        """The attention kernel alone, no mask; with smoothed Q also the bias that belongs to it."""
        options: dict[str, Any] = {
            "out_dtype": x.q.dtype,
            "return_lse": False,
            "fp16_accumulator": self.spec.pv_accumulator == "fp16",
        }
        if self.spec.unsigned_p:
            options["unsigned_p"] = True
        if operands.q_mean is not None:
            from sage_diffusion.kernels.attention.entry import bias_of

            options["bias"] = bias_of(operands, x.q.shape[1], x.k)
        launch = _tuned(self.ours, x.q.device, self.spec, padded_dim(x.q.shape[-1]))
        out: Tensor = self.ours.load().attend_quantized(
            operands.q, operands.k, operands.v, **options, launch=launch
        )[0]
        return out


def _tuned(kernels: Kernels, device: torch.device, spec: AttentionSpec, dim: int) -> Any:
    """The launch of the user's table, as :meth:`Kernel.run` uses it, or None."""
    from sage_diffusion.attend import launches

    tuned = launches.lookup(list(launches.user_entries()), kernels)
    return None if tuned is None else tuned(device, spec, dim)


def in_token_order(operands: Operands, kernel: Kernel) -> Tensor | QuantizedValue:
    """V as the twin reads it."""
    from sage_diffusion.kernels.quantize.permute import restore_value

    v = operands.v
    return restore_value(v) if kernel.permuted and isinstance(v, QuantizedValue) else v


#: A call that every backend which computes a spec takes: who refuses it refuses all.
_PLAIN = Case("plain", 1, 1, 1, 64, 64, 64)


def find(
    place: Place, specs: tuple[str, ...] = (), names: tuple[str, ...] = ()
) -> tuple[list[Kernel], dict[str, str]]:
    """Kernels that a place can run, and name -> reason of those that it can't.

    Args:
        specs, names: only these specs and backends, all if empty.

    Raises:
        ValueError: a text is no spec, or a backend has no kernels of ours.
    """
    ours = backends.ours()
    for name in names:
        if name not in ours:
            raise ValueError(f"--backend must be one of {', '.join(ours)}, got {name!r}")
    found, refused = [], {}
    for spec in map(AttentionSpec.parse, specs or SPECS):
        for backend in names or ours:
            kernel = Kernel(backend, spec)
            reason = kernel.record.refuse(place.call(spec, _PLAIN))
            if reason is None:
                found.append(kernel)
            else:
                refused[kernel.name] = reason
    return found, refused


@functools.cache
def cases_of(kernel: Kernel, place: Place, cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """Cases that the kernel's backend takes."""
    return tuple(c for c in cases if kernel.record.refuse(place.call(kernel.spec, c)) is None)
