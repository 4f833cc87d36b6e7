"""Predicted bounds of kernels on GPUs that need not be there.

Our own kernels are compiled for a card exactly as their launcher would (:mod:`.cost_compile`);
other people's come as a cubin, a shared library or a wheel, which is unpacked and never executed.
"""

from __future__ import annotations

import itertools
import math
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from sage_diffusion.cost_sass import (
    GPUS,
    Function,
    Gpu,
    bound,
    functions,
    macs,
    main_loop,
    opcode,
)
from sage_diffusion.kernels.spec import LADDER, AttentionSpec

#: Multiply-accumulates that ``cycles`` counts: 16 queries, 64 keys, head dim 128, both products.
UNIT = 262_144


@dataclass(frozen=True)
class KernelCost:
    """The predicted bound of one compiled kernel on one card.

    Attributes:
        gpu: a name of :data:`~sage_diffusion.cost_sass.GPUS`.
        spec: what it computes; of someone else's kernel, whose it is and the formats found.
        head_dim: None if it can't be told from a foreign kernel's name.
        cycles: of one SM per 262,144 multiply-accumulates, in the slowest pipe.
        bound: the slowest pipe.
        second: the next one's share of it.
        spills: instructions that read or write spilled registers.
        registers: per thread.
        kernel: its name.
        second_pipe: the next slowest pipe.
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

    @property
    def tops(self) -> float:
        """Tera-operations per second of the whole card at its boost clock: an upper bound."""
        gpu = GPUS[self.gpu]
        return 2 * UNIT / self.cycles * gpu.sms * gpu.ghz / 1000

    def as_dict(self) -> dict[str, object]:
        """The fields of the JSON output."""
        fields = asdict(self)
        del fields["kernel"], fields["second_pipe"]
        return fields


class CostError(ValueError):
    """A kernel's cost can't be told; the message says why."""


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
    loop = bound(main_loop(function), gpu_named(gpu))
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
        spills=function.spills,
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
        gpus: names of :data:`~sage_diffusion.cost_sass.GPUS`.
        specs: any specs.
        head_dims: 1 .. 256.
        mask: None, "bool" or "additive": compile the variant that takes such a mask.
        is_causal: compile the causal variant.

    Raises:
        CostError: a GPU's name is unknown, or the card has no kernel for *any* of the specs.
        FileNotFoundError: triton is not installed.
    """
    from sage_diffusion.cost_compile import compile_attention

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
                kernel = compile_attention(
                    spec, head_dim, gpu.capability, mask=mask, is_causal=is_causal, reasons=reasons
                )
                if kernel is None:
                    continue
                found = True
                costs.append(cubin_cost(kernel.cubin, name, str(spec), head_dim))
        if not found and reasons:
            listed = "; ".join(f"{spec}: {reason}" for spec, reason in reasons.items())
            raise CostError(f"no kernel of this package runs on {name}: {listed}")
    return costs


def cubin_cost(cubin: bytes, gpu: str, spec: str, head_dim: int) -> KernelCost:
    """The bound of a cubin's one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        (function,) = functions(path)
    return function_cost(function, gpu, spec, head_dim)


#: Attention kernels of other packages: what their names contain, and where the head dim stands.
#: (Of kernels that differ in the output's type and the width of offsets, one stands for all.)
_PEERS = {
    "comfy_kitchen": (
        r"attn_kernel.*__nv_bfloat16.*MaskMode0.*EjEvP",
        r"attn_kernelI(?:Lj\d+E){4}Lj(\d+)E",
    )
}


def peer_costs(
    target: str,
    gpus: Sequence[str] = ("rtx4090",),
    head_dims: Sequence[int] | None = None,
    match: str = "",
) -> list[KernelCost]:
    """Predicted bounds of someone else's kernels, the fastest of those that differ in details only.

    Args:
        target: path of a cubin, a shared library or a wheel, or the name of an installed package,
            whose files are read and whose code is never imported.
        gpus: names of :data:`~sage_diffusion.cost_sass.GPUS`.
        head_dims: leave out others, where the head dim is known.
        match: part of the kernels' mangled names.

    Raises:
        CostError: there is no such file or package, or no attention kernel in it.
    """
    best: dict[tuple[str, str, int | None], KernelCost] = {}
    with _libraries(target) as (owner, paths):
        named, dim_pattern = _PEERS.get(owner, ("", ""))

        def head_dim(name: str) -> int | None:
            found = re.search(dim_pattern, name) if dim_pattern else None
            return int(found[1]) if found else None

        def wanted(name: str) -> bool:
            if match not in name or not re.search(named, name):
                return False
            dim = head_dim(name)
            return dim is None or head_dims is None or dim in head_dims

        for name, path in itertools.product(gpus, paths):
            for function in _kernels(path, gpu_named(name), wanted):
                dim = head_dim(function.name)
                spec = _label(owner, function)
                if spec is None:
                    continue
                cost = function_cost(function, name, spec, dim)
                key = (name, function.name if dim is None else spec, dim)
                known = best.get(key)
                if known is None or (cost.cycles, cost.second) < (known.cycles, known.second):
                    best[key] = cost
    if not best:
        raise CostError(f"no tensor-core kernel for {', '.join(gpus)} was found in {target}")
    return list(best.values())


def _kernels(path: Path, gpu: Gpu, wanted: Callable[[str], bool]) -> list[Function]:
    """Kernels that run on the card: for its own architecture, else for the oldest of its line."""
    line = f"sm_{gpu.capability[0]}0"
    for arch in dict.fromkeys((gpu.arch, line)):
        try:
            found = functions(path, arch, wanted)
        except ValueError as error:
            raise CostError(str(error)) from None
        if found:
            return found
    return []


def _label(owner: str, function: Function) -> str | None:
    """Whose kernel it is, and the formats of its tensor-core instructions; None without any."""
    kinds = [macs(opcode(instruction))[1] for instruction in main_loop(function)]
    names = list(
        dict.fromkeys(k.split("/")[0].replace("f", "fp").replace("i", "int") for k in kinds if k)
    )
    return f"{owner} {names[0]}/{names[-1]}" if names else None


@contextmanager
def _libraries(target: str) -> Iterator[tuple[str, list[Path]]]:
    """Owner and files with machine code of a path or an installed package."""
    path = Path(target)
    if path.suffix == ".whl" and path.exists():
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as wheel:
            inside = [n for n in wheel.namelist() if n.endswith((".so", ".pyd", ".cubin"))]
            unpacked = [Path(wheel.extract(name, folder)) for name in inside]
            yield path.name.split("-")[0], _with_device_code(unpacked)
        return
    if path.exists():
        yield path.name.split(".")[0], [path]
        return
    try:
        files = metadata.files(target.replace("_", "-")) or []
    except metadata.PackageNotFoundError:
        raise CostError(
            f"must be a cubin, a shared library, a wheel or an installed package, got {target!r}"
        ) from None
    binaries = [Path(str(f.locate())) for f in files if f.suffix in (".so", ".pyd", ".cubin")]
    yield target.replace("-", "_"), _with_device_code(binaries)


def _with_device_code(paths: Iterable[Path]) -> list[Path]:
    """Of a package's libraries those for NVIDIA cards: HIP's say so in their path."""
    return [path for path in paths if "hip" not in path.parts]
