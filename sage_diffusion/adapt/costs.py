"""What a spec costs on a card, relative to FP16 attention, as plain data.

Cycles of one SM for a tile of 16 queries x 64 keys at head dim 128 in the slowest pipe, both
products: bounds of the compiled kernels (of FP16 what tensor cores and exponentials allow), no
timings, except where a card was measured (:data:`MEASURED`).  FP16 products accumulate in FP32, as
FlashAttention's and ours do, which GeForce cards run at half rate.
``sage-diffusion cost`` prints the bounds of the compiled kernels; a JSON file of spec -> cost can
be given instead (:func:`load_costs`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from sage_diffusion.json_files import JSONError, json_path, read_json, shown
from sage_diffusion.kernels.spec import AttentionSpec

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
        "int4/int8@64": 201.5,
    },
    "rtx4090": {
        "fp16": 1024,
        "int8/fp16": 640,
        "int8/int8": 256,
        "int8/fp8": 384,
        "int8/fp8-fast": 256,
        "int4/int8": 192,
        "int4/int8@64": 201.5,
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
        "int8/int8": 147,
        "int8/int8@64": 204,
        "int4/int8": 127,
        "int4/int8@64": 217,
    },
    "h100": {
        "fp16": 100,
        "int8/fp16": 114,
        "int8/fp16@64": 126,
        "int8/int8": 146,
        "int8/int8@64": 141,
        "int8/fp8": 77,
        "int8/fp8@64": 108,
        "int8/fp8-fast": 106,
        "int8/fp8-fast@64": 125,
    },
}

#: Cards whose figures are no cycles but times of whole calls in percent of PyTorch's fastest FP16
#: attention, quantization included: an H200 at 16,384 tokens
#: (``benchmarks/results/h200-2026-11-26.json``, "bench").
MEASURED = ("h100",)


class CostTableError(ValueError):
    """A cost table that can't be read, or that lacks a spec."""


def card_costs(card: str) -> dict[str, float]:
    """Cycles of a built-in card.

    Raises:
        CostTableError: there is no such card.
    """
    if card not in CYCLES:
        raise CostTableError(f"card must be one of {', '.join(CYCLES)}, got {card!r}")
    return dict(CYCLES[card])


def load_costs(source: str | Path | Mapping[str, float]) -> dict[str, float]:
    """Costs from a card's name, a mapping, or a JSON file ``{"fp16": 1024, "int8/fp8": 384, ..}``.

    Raises:
        CostTableError: unreadable, or a value that is no positive number.
    """
    if isinstance(source, Mapping):
        data = dict(source)
    elif str(source).endswith(".json"):
        try:
            data = read_json(source)
        except (OSError, JSONError) as error:
            raise CostTableError(f"{source}: cannot be read: {error}") from None
    else:
        return card_costs(str(source))
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
    return costs


def relative_cost(
    spec: AttentionSpec | str, costs: Mapping[str, float], head_dim: int = 128
) -> float:
    """Time of a spec relative to fp16; variants of a ladder name (``+rotate``) cost the same.

    Raises:
        CostTableError: the card can't run the spec.
    """
    parsed = AttentionSpec.parse(spec)
    exact = _cycles(("fp16",), costs, head_dim)
    found = _cycles((str(parsed), parsed.formats), costs, head_dim)
    if exact is not None and found is not None:
        return found / exact
    raise CostTableError(
        f"no cost of {parsed} is known for this card; known are {', '.join(costs)}"
    )


def _cycles(names: tuple[str, ...], costs: Mapping[str, float], head_dim: int) -> float | None:
    """The first of ``names`` that has a cost; ``@64`` ones come first where they apply."""
    ends = (SMALL, "") if head_dim <= 64 else ("",)
    keys = [name + end for name in names for end in ends]
    return next((costs[key] for key in keys if key in costs), None)
