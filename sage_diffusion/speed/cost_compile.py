"""Compile this package's attention for a card that isn't there, through its own launcher.

Triton asks a *driver* for the card and hands it the machine code.  Here the driver names the card
that is asked for, keeps the machine code and launches nothing, so that what is compiled is what a
real call would run: same signature, same specialization, same tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from sage_diffusion.attend import backends
from sage_diffusion.attend.calls import AttentionCall
from sage_diffusion.kernels.attention import tuning
from sage_diffusion.kernels.formats import (
    FP4_GROUP,
    K_SCALE_BLOCK,
    Q_BLOCK,
    Q_SCALE_BLOCK,
    TILE_N,
    Precision,
    QuantizedTensor,
    QuantizedValue,
    padded_dim,
)
from sage_diffusion.kernels.quantize.permute import permute_scales
from sage_diffusion.kernels.spec import AttentionSpec

#: Tokens and heads of the call that is compiled: as divisible as real ones, none equal to one.
LENGTH, HEADS, KV_HEADS, BATCH = 1024, 4, 2, 2


class Kernel(NamedTuple):
    """One kernel that a launcher launched.

    Attributes:
        name: of the function.
        cubin: machine code; on AMD a code object.
        shared: bytes of shared memory (LDS).
        assembly: PTX, or AMD's assembly, which lists registers and spills too.
    """

    name: str
    cubin: bytes
    shared: int
    assembly: str


class CompileOnly(DriverBase):
    """A card of an architecture ("sm_89", "gfx942") that collects what it is asked to run."""

    def __init__(self, arch: str):
        self.arch = arch
        self.kernels: list[Kernel] = []
        self.utils = self
        self.launcher_cls = _launcher_of(self)
        self._files: dict[str, str] = {}

    @classmethod
    def is_active(cls) -> bool:
        """Triton never finds it by itself."""
        return False

    def get_current_target(self) -> GPUTarget:
        """The card; CDNA's wavefronts have 64 threads."""
        if self.arch.startswith("gfx"):
            return GPUTarget("hip", self.arch, 64 if self.arch.startswith("gfx9") else 32)
        return GPUTarget("cuda", int(self.arch[3:]), 32)

    def get_active_torch_device(self) -> torch.device:
        """The tensors of the call are never read."""
        return torch.device("cpu")

    def get_current_device(self) -> str:
        """Triton keeps one kernel cache per device: every architecture has its own."""
        return f"compile-only {self.arch}"

    def get_current_stream(self, device: str) -> int:
        """There is none."""
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Only for launchers in C."""
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        """Nothing is timed."""
        raise NotImplementedError

    def get_device_properties(self, device: str) -> dict[str, int]:
        """Shared memory is checked by the kernels' own tests."""
        return {"max_shared_mem": 1 << 20}

    def remember_files(self, module: Any, function: Any, name: str, files: dict, key: str) -> None:
        """Triton calls this before :meth:`load_binary`, which isn't told where the assembly is."""
        self._files = files

    def load_binary(self, name: str, binary: bytes, shared: int, device: str) -> tuple:
        """The machine code itself serves as the handle."""
        kind = "amdgcn" if self.arch.startswith("gfx") else "ptx"
        assembly = Path(self._files[f"{name}.{kind}"]).read_text()
        return name, Kernel(name, binary, shared, assembly), 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        """Nothing was loaded."""


def _launcher_of(driver: CompileOnly) -> type:
    class Launcher:
        """Called instead of a launch; reads the active driver, as Triton caches launchers."""

        def __init__(self, src: Any, metadata: Any):
            pass

        def __call__(self, *args: Any) -> None:
            active = triton.runtime.driver.active
            active.kernels.append(args[4])  # after the grid and the stream

    return Launcher


@contextmanager
def compiling_for(arch: str) -> Iterator[CompileOnly]:
    """Make Triton's launches compile for a card ("sm_89", "gfx942") and do nothing else."""
    config, hook = triton.runtime.driver, triton.knobs.runtime.kernel_load_start_hook
    before, architecture = config._active, tuning.architecture
    driver = CompileOnly(arch)
    config.set_active(driver)
    hook.add(driver.remember_files)
    # The tensors are on the CPU, from which a launcher would conclude that it is interpreted.
    tuning.architecture = lambda device: arch  # type: ignore[assignment]
    try:
        yield driver
    finally:
        hook.remove(driver.remember_files)
        config._active = before
        tuning.architecture = architecture


def compile_attention(
    spec: AttentionSpec,
    head_dim: int,
    capability: tuple[int, int],
    *,
    mask: str | None = None,
    is_causal: bool = False,
    reasons: dict[str, str] | None = None,
    backend: str | None = None,
    launch: NamedTuple | None = None,
) -> Kernel | None:
    """The attention kernel that this package would run, without its quantizers.

    Args:
        spec: a quantized spec.
        head_dim: 1 .. 256.
        capability: of the card.
        mask: None, "bool" or "additive": one of its own for every query.
        is_causal: the causal variant.
        reasons: told why a card can't run a spec.
        backend: one whose kernels are ours; None takes the one that "auto" would.
        launch: of the named backend, instead of its own choice.

    Returns:
        None if no backend of this package runs the spec on the card.
    """
    arch = f"sm_{capability[0]}{capability[1]}"
    call = AttentionCall.typical(
        spec, arch, head_dim, LENGTH, dtype=torch.float16, mask=mask, is_causal=is_causal
    )
    for record in backends.BACKENDS:
        if record.kernels is None or backend not in (None, record.name):
            continue
        reason = record.refuse(call)
        if reason is not None:
            if reasons is not None:
                reasons[str(spec)] = reason
            continue
        bias = None
        if mask is not None:
            kind = {"bool": torch.bool, "additive": torch.float16}[mask]
            bias = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=kind)
        return compile_backend(
            record.name, spec, head_dim, arch, mask=bias, is_causal=is_causal, launch=launch
        )
    return None


def compile_backend(
    backend: str,
    spec: AttentionSpec,
    head_dim: int,
    arch: str,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
    launch: NamedTuple | None = None,
) -> Kernel:
    """A backend's attention kernel for an architecture, whether or not it would refuse the call.

    Args:
        backend: one whose kernels are ours.
        arch: "sm_89", "gfx942".
        mask: broadcastable to ``[BATCH, HEADS, LENGTH, LENGTH]``, its strides as they will be.
        spec, head_dim, is_causal, launch: as in :func:`compile_attention`.
        return_lse: the variant that writes the log-sum-exp.
    """
    kernels = backends.ours()[backend]
    q, k, v, delta_s = _operands(spec, head_dim, kernels.permuted(spec))
    module = kernels.load()
    options = {"unsigned_p": True} if spec.unsigned_p else {}
    with compiling_for(arch) as driver:
        module.attend_quantized(
            q,
            k,
            v,
            delta_s=delta_s,
            mask=mask,
            is_causal=is_causal,
            fp16_accumulator=spec.pv_accumulator == "fp16",
            out_dtype=torch.float16,
            return_lse=return_lse,
            launch=launch,
            **options,
        )
    return driver.kernels[-1]  # what prepares its operands comes first


def _operands(
    spec: AttentionSpec, head_dim: int, permuted: bool
) -> tuple[QuantizedTensor, QuantizedTensor, Tensor | QuantizedValue, Tensor | None]:
    """Q, K, V as the quantizers would hand them over, with nothing in them, and delta-S."""
    dim = padded_dim(head_dim)
    storage = {
        Precision.INT8: (torch.int8, 1),
        Precision.FP8: (torch.float8_e4m3fn, 1),
        Precision.INT4: (torch.uint8, 2),
        Precision.FP4: (torch.uint8, 2),
    }

    def codes(heads: int, block: int) -> QuantizedTensor:
        dtype, per_byte = storage[spec.qk]
        micro = None
        if spec.qk is Precision.FP4:
            micro = torch.zeros(BATCH, heads, LENGTH, dim // FP4_GROUP).to(torch.float8_e4m3fn)
        return QuantizedTensor(
            torch.zeros(BATCH, heads, LENGTH, dim // per_byte).to(dtype),
            torch.ones(BATCH, heads, -(-LENGTH // block)),
            spec.qk,
            block,
            micro,
        )

    by_block = spec.granularity == "block"
    q = codes(HEADS, Q_SCALE_BLOCK if by_block else 1)
    k = codes(KV_HEADS, K_SCALE_BLOCK if by_block else 1)
    delta_s = torch.zeros(BATCH, HEADS, LENGTH // Q_BLOCK, LENGTH) if spec.smooth_q else None
    if spec.pv is Precision.FP16:
        values = torch.zeros(BATCH, KV_HEADS, LENGTH, head_dim, dtype=torch.float16)
        return q, k, values, delta_s
    dtype, per_byte = storage[spec.pv]
    channels = torch.ones(BATCH, KV_HEADS, head_dim)
    value = QuantizedValue(
        torch.zeros(BATCH, KV_HEADS, head_dim, LENGTH // per_byte).to(dtype),
        channels,
        spec.pv,
        LENGTH,
        channels if spec.smooth_v else None,
    )
    if spec.tile_v:
        scales = torch.ones(BATCH, KV_HEADS, LENGTH // TILE_N, head_dim)
        value = value._replace(scale=permute_scales(scales) if permuted else scales)
    if spec.unsigned_p:
        shape = (BATCH, KV_HEADS, LENGTH // TILE_N, head_dim)
        value = value._replace(sums=torch.zeros(shape, dtype=torch.int16))
    if spec.sample_v and spec.pv_accumulator == "fp16":
        tiles = torch.ones(BATCH, KV_HEADS, LENGTH // TILE_N + 2, 2)
        value = value._replace(tiles=tiles)
    if spec.pv is Precision.FP4:
        micro = torch.zeros(BATCH, KV_HEADS, LENGTH // TILE_N, head_dim, TILE_N // FP4_GROUP)
        value = value._replace(micro=micro.to(torch.float8_e4m3fn))
    return q, k, value, delta_s
