"""A backend as data: one implementation of attention, which calls it can run, and how it is run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sage_diffusion import machine
from sage_diffusion.attend import installation, launches
from sage_diffusion.attend.calls import AttentionCall, Call, Run
from sage_diffusion.kernels.attention.record import Kernels
from sage_diffusion.kernels.spec import AttentionSpec


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Attributes:
        name: what users write in ``backend=``.
        describes: one line for ``doctor``.
        refuse: None if it can run the call, else the reason in words.
        load: imports the implementation on first use.
        automatic: False if "auto" must not choose it on a GPU (slow or not ours to prefer).
        folds_rope: it rotates q and k as it quantizes them; for the others PyTorch does before.
        finite: of finite inputs it makes finite outputs, scores beyond float32's resolution (2^27
            in log2 units) excepted; the others' outputs lose their NaN before a model sees them.
        quantizes: it computes quantized specs, else fp16.
        timed: ``bench`` times it unless told otherwise.
        kernels: this package's, which are tuned, compiled for cards that aren't here and verified.
        library: the package in whose files the cost model finds its machine code.
    """

    name: str
    describes: str
    refuse: Callable[[AttentionCall], str | None]
    load: Callable[[], Run]
    automatic: Callable[[AttentionCall], bool] = lambda call: True
    folds_rope: bool = False
    finite: bool = False
    quantizes: bool = True
    timed: bool = True
    kernels: Kernels | None = None
    library: str | None = None


def backend_of(kernels: Kernels) -> Backend:
    """The backend that runs kernels of this package."""
    return Backend(
        kernels.name,
        kernels.describes,
        functools.partial(_refuse, kernels),
        functools.partial(_load, kernels),
        folds_rope=True,
        finite=True,
        kernels=kernels,
    )


def _refuse(kernels: Kernels, call: AttentionCall) -> str | None:
    if not call.spec.quantized:
        return "fp16 is not quantized: PyTorch's own attention runs it"
    if call.device != "cuda":
        return f"needs a {kernels.devices} device, the tensors are on {call.device}"
    needed = kernels.triton_version(call.spec)
    return installation.refuse_triton(
        machine.triton_version(), needed, kernels.module
    ) or kernels.unsupported(call.spec, call.capability, call.hip_arch, call.q_shape[-1])


def _load(kernels: Kernels) -> Run:
    return functools.partial(run_kernel, launches.bound(kernels.load().attention, kernels))


def run_kernel(
    attention: Callable[..., tuple[Tensor, Tensor | None]],
    call: Call,
    spec: AttentionSpec,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """A kernel's entry on a call; kernels know no calls."""
    q, k, v, mask, is_causal, scale, rope_q, rope_k, sign_seed = call
    return attention(
        q,
        k,
        v,
        spec,
        mask,
        is_causal,
        scale,
        return_lse,
        rope_q=rope_q,
        rope_k=rope_k,
        sign_seed=sign_seed,
    )
