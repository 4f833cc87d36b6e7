"""Compile what will be run, on all cores at once: Triton finds it in its cache.

The workers need no card: a driver that launches nothing tells Triton which one to compile for, and
the calls are made on CPU tensors whose contents nobody reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from sage_diffusion.verify.cases import Case, Inputs, make_mask, make_rope, make_sign_seed
from sage_diffusion.verify.kernels import Kernel
from sage_diffusion.verify.places import Place, capability_of, posing_as


def compiler(arch: str) -> Place:
    """A place where kernels are compiled for an NVIDIA card ("sm_89") and not run."""

    @contextlib.contextmanager
    def running() -> Iterator[None]:
        from triton.runtime import driver

        driver.set_active(_driver(arch))
        try:
            with posing_as(arch):
                yield
        finally:
            driver._active = None  # chosen anew at the next launch

    return Place(f"compiler for {arch}", torch.device("cpu"), capability_of(arch), running=running)


def _driver(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    major, minor = capability_of(arch)
    number = 10 * major + minor

    class Launcher:
        def __init__(self, src: Any, metadata: Any):
            pass

        def __call__(self, *arguments: Any) -> None:
            pass

    class Compiling(DriverBase):
        """What Triton asks of a driver on the way to a launch."""

        launcher_cls = Launcher

        def __init__(self) -> None:
            self.utils = self

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", number, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 2**30}  # the card itself says what does not fit

        def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
            return self, None, 0, 0, 1024  # a module: without one, every launch loads again

        def unload_module(self, module: Any) -> None:
            pass

    return Compiling()


def compile_case(kernel: Kernel, case: Case, place: Place) -> None:
    """Compile everything that a case launches."""
    with place.running():
        kernel.run(_shapes(case), case)


def _shapes(case: Case) -> Inputs:
    """Tensors of the case's shapes, strides and types with nothing in them."""
    parts = ((case.heads, case.q_len), (case.kv_heads, case.k_len), (case.kv_heads, case.k_len))
    q, k, v = (
        torch.empty(case.batch, length, heads, case.head_dim, dtype=case.dtype).transpose(1, 2)
        for heads, length in parts
    )
    cpu = torch.device("cpu")
    mask = make_mask(case, torch.Generator(), cpu)
    return Inputs(q, k, v, mask, make_rope(case, cpu), make_sign_seed(case, cpu))
