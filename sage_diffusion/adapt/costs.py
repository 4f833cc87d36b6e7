"""What a spec costs on a card, relative to FP16 attention, as plain data.

Of a call's main loop: cycles of one SM for a tile of 16 queries x 64 keys at head dim 128 in the
slowest pipe, both products: bounds of the compiled kernels (of FP16 what tensor cores and
exponentials allow), no timings, except where a card was measured (:data:`MEASURED`).  FP16 products
accumulate in FP32, as FlashAttention's and ours do, which GeForce cards run at half rate.
``sage-diffusion cost`` prints the bounds of the compiled kernels; a JSON file of spec -> cost can
be given instead (:func:`load_costs`).

What quantization and launches add to the loop comes from :mod:`sage_diffusion.speed.traffic`
(:func:`call_milliseconds`): much of a short call, little of a long one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path

from sage_diffusion.json_files import JSONError, json_path, read_json, shown
from sage_diffusion.kernels.spec import FP16, AttentionSpec
from sage_diffusion.speed import traffic
from sage_diffusion.speed.gpus import GPUS

#: End of a spec's name in a cost table: for head dims up to 64 only, where a product costs half and
#: the exponentials cost what they always do.
SMALL = "@64"

#: card -> spec -> cycles.  A spec that a card lacks can't run natively there.
CYCLES: Mapping[str, Mapping[str, float]] = {
    "rtx3090": {
        "fp16": 1024,
        "int8/fp16": 640,
        "int8/int8": 256,
        "int4/int8": 192,
        "int4/int8@64": 222.5,
        "int4/int8-tile_v@64": 201.5,
    },
    "rtx4090": {
        "fp16": 1024,
        "int8/fp16": 640,
        "int8/int8": 256,
        "int8/fp8": 384,
        "int8/fp8-fast": 256,
        "int4/int8": 192,
        "int4/int8@64": 222.5,
        "int4/int8-tile_v@64": 201.5,
        "int4/fp8-fast": 192,
        "int4/fp8-fast@64": 200,
    },
    "rtx5090": {
        "fp16": 1024,
        "int8/fp16": 640,
        "int8/int8": 256,
        "int8/fp8": 384,
        "int8/fp8-fast": 256,
        "fp4/fp8-fast": 192,
        "fp4/fp8-fast@64": 200,
        "fp4/fp4": 128,
        "fp4/fp4@64": 248,
    },
    "a100": {
        "fp16": 256,
        "int8/fp16": 252,
        "int8/fp16@64": 200,
        "int8/int8": 153,
        "int8/int8@64": 234,
        "int8/int8-tile_v": 147,
        "int8/int8-tile_v@64": 204,
        "int4/int8": 154,
        "int4/int8@64": 247,
        "int4/int8-tile_v": 127,
        "int4/int8-tile_v@64": 217,
    },
    "h100": {
        "fp16": 203.9,
        "fp16@64": 256.3,
        "int8/fp16": 227.8,
        "int8/fp16@64": 317.4,
        "int8/int8": 289.4,
        "int8/int8@64": 352,
        "int8/fp8": 148.4,
        "int8/fp8@64": 266.8,
        "int8/fp8-fast": 207.2,
        "int8/fp8-fast@64": 311.5,
    },
}

#: Cards whose figures are no bounds but times: of PyTorch's fastest FP16 attention, and of our
#: calls less what their quantization is predicted to take, of an H200 at 16,384 tokens
#: (``benchmarks/results/h200-2026-11-26.json``, "bench 128" and "bench 64").
MEASURED = ("h100",)

#: Multiply-accumulates of both products that the cycles are of.
UNIT = 2 * 16 * 64 * 128


class CostTableError(ValueError):
    """A cost table that can't be read, or that lacks a spec."""


class Costs(dict[str, float]):
    """Cycles of every spec's main loop, and the card that runs whole calls.

    Attributes:
        card: the name of a GPU, whose memory's bandwidth and launches count beside the loop; None
            of a file's costs.
        tokens: calls are taken to have so many queries instead of those that were calibrated, for a
            plan that is made on small pictures and used on larger ones; ``math.inf`` is the main
            loop alone, None as calibrated.
    """

    def __init__(
        self,
        cycles: Mapping[str, float],
        card: str | None = None,
        tokens: float | None = None,
    ):
        super().__init__(cycles)
        self.card, self.tokens = card, tokens

    @property
    def whole(self) -> bool:
        """Do they tell whole calls, not only main loops?"""
        return self.card is not None and self.tokens != math.inf


def card_costs(card: str, tokens: float | None = None) -> Costs:
    """Costs of a built-in card.

    Args:
        card: its name.
        tokens: see :class:`Costs`.

    Raises:
        CostTableError: there is no such card, or no such number of tokens.
    """
    if card not in CYCLES:
        raise CostTableError(f"card must be one of {', '.join(CYCLES)}, got {card!r}")
    if tokens is not None and not tokens >= 1:
        raise CostTableError(f"tokens must be one or more, got {tokens:g}")
    return Costs(CYCLES[card], card, tokens)


def load_costs(source: str | Path | Mapping[str, float], tokens: float | None = None) -> Costs:
    """Costs from a card's name, a mapping, or a JSON file ``{"fp16": 1024, "int8/fp8": 384, ..}``.

    Args:
        source: a mapping or a file has costs of main loops, as nothing is known of their card; a
            :class:`Costs` is what it is.
        tokens: as of :func:`card_costs`, where ``source`` is a card's name; else None or
            ``math.inf``, which main loops are of.

    Raises:
        CostTableError: unreadable, a value that is no positive number, or tokens without a card.
    """
    card = isinstance(source, (str, Path)) and not str(source).endswith(".json")
    if not card and tokens not in (None, math.inf):
        raise CostTableError(f"tokens must come with the name of a card, got {tokens:g} without")
    if isinstance(source, Costs):
        return source
    if isinstance(source, Mapping):
        data = dict(source)
    elif str(source).endswith(".json"):
        try:
            data = read_json(source)
        except (OSError, JSONError) as error:
            raise CostTableError(f"{source}: cannot be read: {error}") from None
    else:
        return card_costs(str(source), tokens)
    if not isinstance(data, dict):
        raise CostTableError(f"costs must be an object of spec -> number, got {shown(data)}")
    costs: dict[str, float] = {}
    for name, value in data.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value <= sys.float_info.max:
            raise CostTableError(
                f"{json_path((str(name),))} must be a positive number, got {shown(value)}"
            )
        small = SMALL if str(name).endswith(SMALL) else ""
        try:
            spec = AttentionSpec.parse(str(name).removesuffix(SMALL))
        except ValueError as error:
            raise CostTableError(f"{json_path((str(name),))}: {error}") from None
        if costs.setdefault(f"{spec}{small}", float(value)) != value:
            raise CostTableError(f"{json_path((str(name),))} must be one cost of {spec}, got two")
    if "fp16" not in costs:
        raise CostTableError("costs must name fp16: every other cost is relative to it")
    return Costs(costs)


def relative_cost(
    spec: AttentionSpec | str, costs: Mapping[str, float], head_dim: int = 128
) -> float:
    """Main loop of a spec relative to fp16's; variants of a name (``+rotate``) cost the same.

    Raises:
        CostTableError: the card can't run the spec.
    """
    return _cycles(AttentionSpec.parse(spec), costs, head_dim) / _cycles(FP16, costs, head_dim)


def _cycles(spec: AttentionSpec, costs: Mapping[str, float], head_dim: int) -> float:
    """Cycles of a unit; costs at ``@64`` come first where they apply."""
    ends = (SMALL, "") if head_dim <= 64 else ("",)
    keys = [name + end for name in (str(spec), spec.formats) for end in ends]
    for key in keys:
        if key in costs:
            return costs[key]
    raise CostTableError(f"no cost of {spec} is known for this card; known are {', '.join(costs)}")


def call_milliseconds(
    spec: AttentionSpec | str,
    costs: Costs,
    q_len: float,
    k_len: float,
    head_dim: int,
    heads: float,
) -> float:
    """Predicted time of a whole attention call: main loop, quantization and launches.

    Args:
        spec: what runs it; fp16 is one launch and nothing else.
        costs: of a card.
        q_len, k_len: tokens of Q and of K and V.
        head_dim: of all three.
        heads: of Q, of all entries of the batch.

    Raises:
        CostTableError: the card can't run the spec, or the costs are of no card.
    """
    if costs.card is None:
        raise CostTableError("a call's time needs a card: a file has costs of main loops")
    parsed, gpu = AttentionSpec.parse(spec), GPUS[costs.card]
    units = heads * q_len * k_len * 2 * head_dim / UNIT
    loop = units * _cycles(parsed, costs, head_dim) / (gpu.sms * gpu.ghz * 1e6)
    if not parsed.quantized:
        return loop + traffic.LAUNCH_MICROSECONDS / 1e3
    return traffic.call_milliseconds(
        gpu.gbs,
        parsed,
        round((q_len + 2 * k_len) / 3),  # Q has a third of the bytes
        head_dim,
        heads,
        loop=loop,
    )
