"""A backend's own file: kernels with launches of their own kind, here the Triton ones."""

from typing import NamedTuple

from sage_diffusion.attend.backend import backend_of
from sage_diffusion.kernels.attention import tuning
from sage_diffusion.kernels.attention.record import Kernels


class ToyLaunch(NamedTuple):
    """A launch; ``rows`` belongs to the architecture, the others are tried."""

    warps: int
    depth: int
    rows: int = 64


def _triton():
    from sage_diffusion.kernels.attention import triton

    return triton


def _launch(toy):
    return toy and tuning.Launch(toy.rows, toy.warps, toy.depth)


def attend_quantized(q, k, v, *, launch=None, **options):
    """As the Triton kernels' own."""
    return _triton().attend_quantized(q, k, v, launch=_launch(launch), **options)


def attention(*call, tuned=None, **ropes):
    """As the Triton kernels' own."""
    found = tuned and (lambda *key: _launch(tuned(*key)))
    return _triton().attention(*call, tuned=found, **ropes)


def unsupported_spec(spec):
    """All but one spec."""
    return (
        None if str(spec) == "int8/int8+block" else f"a toy, computes int8/int8+block, not {spec}"
    )


TOY = backend_of(
    Kernels(
        "toy",
        "a toy",
        __name__,
        unsupported_spec,
        lambda spec, capability, hip_arch, head_dim: unsupported_spec(spec),
        launch=lambda arch, dim, spec: ToyLaunch(4, 2),
        candidates=lambda arch, dim, spec: [ToyLaunch(8, 2)],
        knobs=("warps", "depth"),
        permuted=lambda spec: False,
        triton_version=lambda spec: (3, 6),
    )
)
