"""Predicted bounds of kernels on GPUs that need not be there.

Our own kernels are compiled for a card exactly as their launcher would (:mod:`.cost_compile`);
other people's come as a cubin, a shared library or a wheel (:mod:`.libraries`), never executed.
"""

from __future__ import annotations

import functools
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sage_diffusion.attend.execution import compiler_errors
from sage_diffusion.kernels.spec import LADDER, AttentionSpec
from sage_diffusion.speed.cost_sass import (
    Function,
    bound,
    functions,
    is_spill,
    macs,
    main_loop,
    opcode,
)
from sage_diffusion.speed.gpus import GPUS, Gpu
from sage_diffusion.speed.libraries import libraries
from sage_diffusion.speed.traffic import call_milliseconds

#: Multiply-accumulates that ``cycles`` counts: 16 queries, 64 keys, head dim 128, both products.
UNIT = 262_144


@dataclass(frozen=True)
class KernelCost:
    """The predicted bound of one compiled kernel on one card.

    Attributes:
        gpu: a name of :data:`~sage_diffusion.speed.gpus.GPUS`.
        spec: what it computes; of someone else's kernel, the formats of its tensor-core products.
        head_dim: None if it can't be told from a foreign kernel's name.
        cycles: of one SM per 262,144 multiply-accumulates, in the slowest pipe.
        bound: the slowest pipe.
        second: the next one's share of it.
        spills: instructions of the main loop that read or write spilled registers.
        registers: per thread.
        kernel: its name.
        second_pipe: the next slowest pipe.
        package: whose it is, of someone else's.
    """

    gpu: str
    spec: str
    head_dim: int | None
    cycles: float
    bound: str
    second: float
    spills: int
    registers: int
    kernel: str = ""
    second_pipe: str = ""
    package: str = ""

    @property
    def tops(self) -> float:
        """Tera-operations per second of the whole card at its boost clock: an upper bound."""
        gpu = GPUS[self.gpu]
        return 2 * UNIT / self.cycles * gpu.sms * gpu.ghz / 1000

    def call_milliseconds(self, tokens: int, heads: int) -> tuple[float, float]:
        """Predicted time of the main loop of a call of ours, and of the whole call.

        Self-attention; what quantization and launches add is :mod:`.traffic`'s.
        """
        assert self.head_dim is not None and not self.package
        loop = 4 * heads * tokens**2 * self.head_dim / self.tops / 1e9
        spec, gbs = AttentionSpec.parse(self.spec), GPUS[self.gpu].gbs
        return loop, call_milliseconds(gbs, spec, tokens, self.head_dim, heads, loop=loop)

    def as_dict(self) -> dict[str, object]:
        """The fields of the JSON output; ``package`` only of someone else's."""
        fields = asdict(self)
        del fields["kernel"], fields["second_pipe"]
        if not self.package:
            del fields["package"]
        return fields


class CostError(ValueError):
    """A kernel's cost can't be told; the message says why."""


class NoKernelError(CostError):
    """This package has no kernel for a card."""


def gpu_named(name: str) -> Gpu:
    """The card of that name.

    Raises:
        CostError: there is none.
    """
    if name not in GPUS:
        raise CostError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[name]


def function_cost(function: Function, gpu: str, spec: str, head_dim: int | None) -> KernelCost:
    """The bound of one disassembled kernel.

    Raises:
        CostError: it has no tensor-core work, or instructions that the model doesn't know.
    """
    body = main_loop(function)
    loop = bound(body, gpu_named(gpu))
    if not loop.work:
        raise CostError(f"{function.name} has no tensor-core instructions")
    if loop.unknown:
        listed = ", ".join(sorted(loop.unknown))
        raise CostError(f"{function.name} uses instructions of unknown cost: {listed}")
    if math.isinf(loop.cycles["tensor"]):
        kinds = ", ".join(kind for kind in loop.macs if kind not in gpu_named(gpu).tensor)
        raise CostError(f"{function.name} needs tensor cores for {kinds}, which {gpu} lacks")
    pipes = sorted(loop.cycles, key=lambda pipe: -loop.cycles[pipe])
    top = loop.cycles[pipes[0]]
    return KernelCost(
        gpu=gpu,
        spec=spec,
        head_dim=head_dim,
        cycles=round(top / loop.work * UNIT, 1),
        bound=pipes[0],
        second=round(loop.cycles[pipes[1]] / top, 3),
        spills=sum(map(is_spill, body)),
        registers=function.registers,
        kernel=function.name,
        second_pipe=pipes[1],
    )


def kernel_costs(
    gpus: Sequence[str] = ("rtx4090",),
    specs: Iterable[AttentionSpec | str] = LADDER,
    head_dims: Sequence[int] = (64, 128),
    *,
    mask: str | None = None,
    is_causal: bool = False,
) -> list[KernelCost]:
    """Predicted bounds of this package's attention kernels, compiled for every card.

    What a card can't run is left out.

    Args:
        gpus: names of :data:`~sage_diffusion.speed.gpus.GPUS`.
        specs: any specs.
        head_dims: 1 .. 256.
        mask: None, "bool" or "additive": compile the variant that takes such a mask.
        is_causal: compile the causal variant.

    Raises:
        NoKernelError: none of the specs runs on a card.
        CostError: a GPU's name is unknown, a kernel does not compile, or there is no compiler:
            triton is not installed.
    """
    try:
        from sage_diffusion.speed.cost_compile import compile_attention
    except ImportError as error:
        raise CostError(f"compiling a kernel needs triton (pip install triton): {error}") from None

    parsed = [AttentionSpec.parse(spec) for spec in specs]
    costs = []
    for name in gpus:
        gpu = gpu_named(name)
        reasons: dict[str, str] = {}
        found = False
        for spec in parsed:
            if not spec.quantized:
                continue
            for head_dim in head_dims:
                try:
                    kernel = compile_attention(
                        spec,
                        head_dim,
                        gpu.capability,
                        mask=mask,
                        is_causal=is_causal,
                        reasons=reasons,
                    )
                except compiler_errors() as error:
                    said = " ".join(str(error).split()) or type(error).__name__
                    what = f"{spec} at head dim {head_dim} does not compile for {gpu.arch}"
                    raise CostError(f"{what}: {said}") from error
                if kernel is None:
                    continue
                found = True
                costs.append(cubin_cost(kernel.cubin, name, str(spec), head_dim))
        if not found and reasons:
            grouped: dict[str, list[str]] = {}
            for text, reason in reasons.items():
                grouped.setdefault(reason, []).append(text)
            listed = "; ".join(f"{', '.join(texts)}: {why}" for why, texts in grouped.items())
            raise NoKernelError(f"no kernel of this package runs on {name}: {listed}")
    return costs


def cubin_cost(cubin: bytes, gpu: str, spec: str, head_dim: int) -> KernelCost:
    """The bound of a cubin's one kernel."""
    return function_cost(_disassembled(cubin), gpu, spec, head_dim)


@functools.lru_cache(maxsize=64)  # cards of one architecture share their kernels
def _disassembled(cubin: bytes) -> Function:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        (function,) = functions(path)
    return function


#: Attention kernels of other packages: what their names contain, and where the head dim stands.
#: (Of kernels that differ in the output's type and the width of offsets, one stands for all.)
_PEERS = {
    "comfy_kitchen": (
        r"attn_kernel.*__nv_bfloat16.*MaskMode0.*EjEvP",
        r"attn_kernelI(?:Lj\d+E){4}Lj(\d+)E",
    )
}


def library_costs(
    target: str,
    gpus: Sequence[str] = ("rtx4090",),
    head_dims: Sequence[int] | None = None,
    match: str = "",
    *,
    wheels: Path | None = None,
    download: bool = False,
) -> list[KernelCost]:
    """Predicted bounds of someone else's kernels, the fastest of those that differ in details only.

    Args:
        target: path of a cubin, a shared library or a wheel, or a package's name; its files are
            read (:mod:`.libraries`), its code is never imported.
        gpus: names of :data:`~sage_diffusion.speed.gpus.GPUS`.
        head_dims: leave out others, where the head dim is known.
        match: part of the kernels' mangled names.
        wheels: folder to look for the wheel of a package that is not installed.
        download: fetch a wheel that is not there.

    Raises:
        CostError: a GPU's name is unknown, or there is no attention kernel for any of them.
        LibraryError: there is no such file or package, or no machine code in it.
    """
    cards = {name: gpu_named(name) for name in gpus}
    best: dict[tuple[str, str, int | None], KernelCost] = {}
    with libraries(target, wheels, download) as (package, paths):
        named, dim_pattern = _PEERS.get(package, ("", ""))

        def head_dim(name: str) -> int | None:
            found = re.search(dim_pattern, name) if dim_pattern else None
            return int(found[1]) if found else None

        def wanted(name: str) -> bool:
            if match not in name or not re.search(named, name):
                return False
            dim = head_dim(name)
            return dim is None or head_dims is None or dim in head_dims

        @functools.cache  # disassembling a large library takes seconds
        def kernels(arch: str) -> list[Function]:
            return [found for path in paths for found in _kernels(path, arch, wanted)]

        for name, gpu in cards.items():
            for function in kernels(gpu.arch):
                dim = head_dim(function.name)
                formats = _formats(function)
                if formats is None:
                    continue
                cost = replace(function_cost(function, name, formats, dim), package=package)
                key = (name, function.name if dim is None else formats, dim)
                known = best.get(key)
                if known is None or (cost.cycles, cost.second) < (known.cycles, known.second):
                    best[key] = cost
    if not best:
        raise CostError(f"no tensor-core kernel for {', '.join(gpus)} was found in {target}")
    return list(best.values())


def _kernels(path: Path, arch: str, wanted: Callable[[str], bool]) -> list[Function]:
    """Kernels that run on an architecture: made for it, else for the oldest of its line."""
    line = f"{arch[:-1]}0"
    for candidate in dict.fromkeys((arch, line)):
        try:
            found = functions(path, candidate, wanted)
        except ValueError as error:
            raise CostError(str(error)) from None
        if found:
            return found
    return []


def _formats(function: Function) -> str | None:
    """The formats of a kernel's tensor-core products, "int8/fp16"; None without any."""
    kinds = [macs(opcode(instruction))[1] for instruction in main_loop(function)]
    names = list(
        dict.fromkeys(k.split("/")[0].replace("f", "fp").replace("i", "int") for k in kinds if k)
    )
    return f"{names[0]}/{names[-1]}" if names else None


def beside(ours: KernelCost, theirs: Iterable[KernelCost]) -> KernelCost | None:
    """The kernel of one package to put beside ours: same card and head dim, if it can be the same
    formats, then the fastest; None if there is none."""
    formats = ours.spec.removesuffix("-fast")
    alike = [k for k in theirs if (k.gpu, k.head_dim) == (ours.gpu, ours.head_dim)]
    return min(alike, key=lambda k: (k.spec != formats, k.cycles, k.second), default=None)
