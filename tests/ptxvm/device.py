"""A GPU made of :class:`Machine`, for Triton's own launcher.

``with gpu(89): kernel[grid](...)`` specializes on alignment and on ones as on a card, compiles down
to machine code, refuses what exceeds the card's shared memory, and runs the PTX on CPU tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import ASTSource, CompiledKernel

from .bulk import TensorMap
from .machine import Machine

#: Shared memory that one CTA may use (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_MEMORY = {
    75: 65536,
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
}


def compile_for(
    fn: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    cc: int | str,
    warps: int = 4,
    stages: int = 3,
    aligned: bool | tuple[str, ...] = True,
    **options: Any,
) -> CompiledKernel:
    """Compile ahead of time; Triton's own cache makes a second call cheap.

    Args:
        fn: a jit function.
        signature: type of every parameter that is no constexpr.
        constexprs: value of every other one.
        cc: compute capability (89) or AMD architecture ("gfx942").
        warps, stages, options: launch options.
        aligned: parameters known to be divisible by 16, as the launcher would find out; True for
            all pointers and integers.
    """
    target = (
        GPUTarget("cuda", cc, 32)
        if isinstance(cc, int)
        else GPUTarget("hip", cc, 64 if cc.startswith("gfx9") else 32)
    )
    kinds = {n: "constexpr" if n in constexprs else signature[n] for n in fn.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(kinds.items())
        if (name in aligned if isinstance(aligned, tuple) else aligned) and kind[0] in "*i"
    }
    options = {"num_warps": warps, "num_stages": stages, **options}
    return triton.compile(ASTSource(fn, kinds, constexprs, attrs), target=target, options=options)


@contextlib.contextmanager
def gpu(cc: int) -> Iterator[SimulatedDriver]:
    """Make Triton launch on a simulated card of this compute capability."""
    config, hook = triton.runtime.driver, triton.knobs.runtime.kernel_load_start_hook
    before, driver = config._active, SimulatedDriver(cc)
    config.set_active(driver)
    hook.add(driver.remember_files)
    try:
        yield driver
    finally:
        hook.remove(driver.remember_files)
        config._active = before


class SimulatedDriver(DriverBase):
    """What Triton asks of a driver; the compute capability doubles as the device's number.

    Attributes:
        launches: name and grid of every kernel that ran, in order.
    """

    def __init__(self, cc: int):
        self.cc = cc
        self.launches: list[tuple[str, tuple[int, int, int]]] = []
        self.utils = self
        self.launcher_cls = _Launcher
        self._files: dict[str, str] = {}

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.cc, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.cc

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[device]}

    def remember_files(self, module: Any, function: Any, name: str, files: dict, key: str) -> None:
        """Triton calls this before :meth:`load_binary`, which is not told where the PTX is."""
        self._files = files

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        machine = Machine(Path(self._files[f"{name}.ptx"]).read_text())
        return machine, machine, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass


class _Launcher:
    """Calls one compiled kernel; Triton builds it once for each."""

    def __init__(self, src: ASTSource, metadata: Any):
        self.kinds = list(src.signature.values())
        self.shared = metadata.shared
        self.maps = getattr(metadata, "tensordesc_meta", None) or []

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, *rest: Any
    ) -> None:
        arguments = rest[3:]  # metadata for profilers and two hooks come first
        kept, maps = [], iter(self.maps)
        for argument, kind in zip(arguments, self.kinds, strict=True):
            if kind[:10] == "tensordesc":
                kept += _expanded(argument, next(maps))
            elif kind != "constexpr":
                kept.append(argument)
        triton.runtime.driver.active.launches.append((function.name, (x, y, z)))
        function.launch((x, y, z), kept, shared=self.shared)


def _expanded(descriptor: Any, meta: dict[str, Any]) -> list[Any]:
    """What Triton's launcher passes of a tensor descriptor: the driver's map, shape and strides."""
    if meta["elem_size"] != 1 or len(descriptor.shape) != 2:
        raise NotImplementedError(f"a tensor map of {descriptor}")
    data = descriptor.base.view(torch.uint8).as_strided(descriptor.shape, descriptor.strides)
    swizzle = {0: 0, 1: 32, 2: 64, 3: 128}[meta["swizzle"]]
    tile = TensorMap(data.numpy(), tuple(meta["block_size"]), swizzle)
    return [tile, *descriptor.shape, *descriptor.strides]
