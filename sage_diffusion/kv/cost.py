"""Predicted bounds of decode attention on a packed past, beside one in bfloat16.

A bound counts the slowest of: bytes by the card's bandwidth, the loop's machine code by its pipes
(of the schedulers that have a warp at this length), and one wait for memory; and for both sides the
launches of two kernels.  The cache in bfloat16 is given no instructions at all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from sage_diffusion.kernels.kv.layout import Width, bits, row_words
from sage_diffusion.kernels.kv.sides import Side, Turn
from sage_diffusion.kernels.kv.tuning import portable_tile, portable_warps, tiles
from sage_diffusion.speed.cost import CostError, NoKernelError, gpu_named
from sage_diffusion.speed.cost_sass import (
    SCHEDULERS,
    WARP,
    Bound,
    Function,
    bound,
    functions,
    is_spill,
    main_loop,
)
from sage_diffusion.speed.gpus import Gpu

#: Bytes a second that the cards' memory gives, by data sheet.
BANDWIDTH = {
    "a100": 2039e9,
    "rtx3090": 936e9,
    "rtx4090": 1008e9,
    "l40s": 864e9,
    "h100": 3350e9,
    "rtx5090": 1792e9,
}

#: Assumed: seconds of launching two kernels, and of one wait for memory.
LAUNCHES, LATENCY = 4e-6, 8e-7

#: Shape of the call: KV heads, query heads of each, channels.
HEADS, GROUP, DIM = 8, 8, 128

LENGTHS = (1024, 4096, 16384, 65536, 131072)


class Setting(NamedTuple):
    """Widths, tokens that share a step of K, channels that share one of V; FP16 steps and zeros."""

    k: Width
    v: Width
    k_group: int
    v_group: int

    @property
    def bits(self) -> float:
        """Of an element, steps and zeros included."""
        sides = ((self.k, self.k_group), (self.v, self.v_group))
        return sum(bits(width) + 32 / group for width, group in sides) / 2


SETTINGS = (Setting(8, 8, 128, 128), Setting(4, 4, 128, 128), Setting(2, 2, 64, 64))


@dataclass(frozen=True)
class DecodeCost:
    """A predicted bound of one call.

    Attributes:
        gpu, bits: a card's name, and bits of an element, all in.
        length: tokens.
        instructions: of the loop, lane-instructions of an element.
        bound: "memory", a pipe, or "latency".
        registers, spills: of the kernel; of its loop.
        microseconds, bf16: of the packed past, and of one in bfloat16.
    """

    gpu: str
    bits: float
    length: int
    instructions: float
    bound: str
    registers: int
    spills: int
    microseconds: float
    bf16: float

    @property
    def ratio(self) -> float:
        """Times as fast as bfloat16."""
        return self.bf16 / self.microseconds

    def as_dict(self) -> dict[str, object]:
        """The fields of the JSON output."""
        return {**asdict(self), "ratio": round(self.ratio, 2)}


class _Loop(NamedTuple):
    """One compiled loop: what a trip of a warp costs and does."""

    bound: Bound
    instructions: int
    registers: int
    spills: int
    tile: int
    splits: int
    warps: int


def decode_costs(
    gpus: Sequence[str],
    settings: Sequence[Setting] = SETTINGS,
    lengths: Sequence[int] = LENGTHS,
) -> list[DecodeCost]:
    """Bounds of the Gluon kernel, compiled for every card and length as it would be launched.

    Raises:
        NoKernelError: it does not run on a card.
        CostError: a GPU's name is unknown, or triton is not installed.
    """
    found = []
    for name in gpus:
        gpu = gpu_named(name)
        if gpu.capability < (8, 0):
            raise NoKernelError(f"no kernel of this package runs on {name}: needs sm_80 or newer")
        for setting in settings:
            for length in lengths:
                found.append(_cost(name, gpu, setting, length))
    return found


def _cost(name: str, gpu: Gpu, setting: Setting, length: int) -> DecodeCost:
    loop = _compiled(gpu, setting, length)
    partial = 2 * loop.splits * HEADS * GROUP * (DIM + 1) * 4  # written and read
    memory = (2 * HEADS * length * DIM * setting.bits / 8 + partial) / BANDWIDTH[name]
    warps = HEADS * loop.splits * loop.warps
    each = -(-length // loop.tile)  # tiles of a head
    trips = -(-each // (loop.splits * loop.warps))
    busy = -(-warps // (gpu.sms * SCHEDULERS))  # warps of the scheduler that has most
    cycles = max(loop.bound.cycles.values()) * SCHEDULERS * busy * trips
    pipe = max(loop.bound.cycles, key=lambda one: loop.bound.cycles[one])
    times = {"memory": memory, pipe: cycles / gpu.ghz / 1e9}
    times["latency"] = (
        LATENCY + trips * max(loop.bound.cycles.values()) * SCHEDULERS / gpu.ghz / 1e9
    )
    slowest = max(times, key=lambda one: times[one])
    full = max(2 * HEADS * length * DIM * 2 / BANDWIDTH[name], LATENCY)
    return DecodeCost(
        name,
        round(setting.bits, 3),
        length,
        round(loop.instructions * WARP / (2 * loop.tile * DIM), 2),
        slowest,
        loop.registers,
        loop.spills,
        round((times[slowest] + LAUNCHES) * 1e6, 2),
        round((full + LAUNCHES) * 1e6, 2),
    )


class RopeCost(NamedTuple):
    """Keys that are stored before RoPE: two ways, in microseconds.

    Attributes:
        gpu, bits, rows: a card's name, bits of an element, rows of Q of a KV head.
        instructions: of the kernel's loop, lane-instructions of an element.
        kernel: turned within the Triton decode kernel, which reads the codes once for 16 rows; by
            its machine code.
        scratch: K and V of the layer decoded to bfloat16 once, then attention on that.
        faster: "kernel" or "scratch".
    """

    gpu: str
    bits: float
    rows: int
    instructions: float
    kernel: float
    scratch: float
    faster: str


#: More instructions of half2 and of loads from shared memory for an element of K that is rotated:
#: a multiplication and an addition for its step and zero and four for its angle, for two at once,
#: and 16 bytes of sines and cosines for eight.
_ROTATION, _TABLE = 3.0, 0.125

#: Rows of Q: a decode step, and a block of causal video (one latent frame of Wan at 480p).
_ROWS = (GROUP, 1560)


def rope_costs(costs: Sequence[DecodeCost], length: int = 65536) -> list[RopeCost]:
    """Keys stored before RoPE, beside bounds of keys stored after it.

    The kernel's time is that of its machine code or its bytes; of the scratch, which no kernel
    writes yet, instructions are counted by hand: it costs its bytes, written and read, unpacking
    with the loop of keys after RoPE and a rotation, and two products on the tensor cores.

    Raises:
        CostError: triton is not installed.
    """
    found = []
    known = {round(setting.bits, 3): setting for setting in SETTINGS}
    for cost in costs:
        if cost.length != length:
            continue
        gpu, elements = gpu_named(cost.gpu), 2 * HEADS * length * DIM
        clock = gpu.sms * gpu.ghz * 1e9
        packed, bandwidth = elements * cost.bits / 8, BANDWIDTH[cost.gpu]
        turned = _turned(gpu, known[cost.bits])
        trips = HEADS * tiles(length, known[cost.bits].k_group, turned.tile) * turned.warps
        work = trips * max(turned.bound.cycles.values()) / clock
        unpacking = elements * cost.instructions / (SCHEDULERS * WARP * clock)
        unpacking += elements / 2 * (_ROTATION + _TABLE) / (SCHEDULERS * WARP * clock)
        for rows in _ROWS:
            passes = -(-rows // 16)
            products = 2 * HEADS * length * DIM * rows / (gpu.tensor["f16/f32"] * clock)
            kernel = max(products, passes * max(packed / bandwidth, work))
            scratch = max((packed + 2 * elements) / bandwidth, unpacking)
            scratch += max(2 * elements / bandwidth, products)
            faster = "kernel" if kernel <= scratch else "scratch"
            times = round(kernel * 1e6, 1), round(scratch * 1e6, 1)
            each = round(turned.instructions * turned.warps * WARP / (2 * turned.tile * DIM), 1)
            found.append(RopeCost(cost.gpu, cost.bits, rows, each, *times, faster))
    return found


def _side(width: Width, axis: str, group: int, length: int) -> Side:
    """A side of zeros, which nothing reads."""
    words = torch.zeros(1, 1, 1, row_words(DIM, width), dtype=torch.int32)
    rows = (length // group, DIM) if axis == "channel" else (length, DIM // group)
    step = torch.zeros(1, 1, 1, 1, dtype=torch.float16).expand(1, HEADS, *rows)
    made = words.expand(1, HEADS, length, -1)
    return Side(made, step, step, width, axis, group, DIM, length)  # type: ignore[arg-type]


def _compiled(gpu: Gpu, setting: Setting, length: int) -> _Loop:
    try:
        from sage_diffusion.kernels.kv import gluon, tuning
        from sage_diffusion.speed.cost_compile import compiling_for
    except ImportError as error:
        raise CostError(f"compiling a kernel needs triton (pip install triton): {error}") from None
    gains = DIM // setting.v_group
    config = tuning.launch(DIM, setting.k, setting.v, GROUP, setting.k_group, gains)
    config = tuning.shorter(config, length, HEADS, gpu.sms)
    count = tuning.tiles(length, setting.k_group, config.tile)
    splits = tuning.splits(count, HEADS, gpu.sms, config.num_warps)
    k = _side(setting.k, "channel", setting.k_group, setting.k_group * 64)
    v = _side(setting.v, "token", setting.v_group, setting.k_group * 64)
    q = torch.zeros(1, HEADS * GROUP, 1, DIM, dtype=torch.bfloat16)
    with compiling_for(gpu.arch) as driver:
        gluon.decode(q, k, v, 1.0, config=config, split=4)
    body, function, found = _loop(driver.kernels[0].cubin, gpu)
    return _Loop(
        found,
        len(body),
        function.registers,
        sum(map(is_spill, body)),
        config.tile,
        splits,
        config.num_warps,
    )


def _turned(gpu: Gpu, setting: Setting) -> _Loop:
    """The Triton kernel that turns keys, for one query and :data:`GROUP` heads."""
    try:
        from sage_diffusion.kernels.kv import triton
        from sage_diffusion.speed.cost_compile import compiling_for
    except ImportError as error:
        raise CostError(f"compiling a kernel needs triton (pip install triton): {error}") from None
    k = _side(setting.k, "channel", setting.k_group, setting.k_group * 64)
    v = _side(setting.v, "token", setting.v_group, setting.k_group * 64)
    q = torch.zeros(1, HEADS * GROUP, 1, DIM, dtype=torch.bfloat16)
    turn = Turn(torch.zeros(DIM // 2).double(), 1.0, torch.zeros(1, dtype=torch.int64))
    with compiling_for(gpu.arch) as driver:
        triton.decode(q, k, v, 1.0, None, turn, split=4)
    body, function, found = _loop(driver.kernels[0].cubin, gpu)
    spills, tile = sum(map(is_spill, body)), portable_tile(gpu.arch)
    warps = portable_warps(gpu.arch, True)
    return _Loop(found, len(body), function.registers, spills, tile, 4, warps)


def _loop(cubin: bytes, gpu: Gpu) -> tuple[tuple[str, ...], Function, Bound]:
    """The main loop of a kernel's machine code, and what a trip of a warp costs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        (function,) = functions(path)
    body = main_loop(function)
    found = bound(body, gpu)
    if found.unknown:
        raise CostError(f"the kernel has instructions of unknown cost: {sorted(found.unknown)}")
    return body, function, found
