"""``AttentionSpec``: the numerics of one attention call, as plain data with a short public name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from .formats import Precision

#: Names of the ladder, fastest last.  They are what users write in plans and read in reports.
LADDER = (
    "fp16",
    "int8/fp16",
    "int8/int8",
    "int8/fp8",
    "int8/fp8-fast",
    "int4/int8",
    "int4/fp8-fast",
    "fp4/fp8-fast",
    "fp4/fp4",
)

#: Short names: the format of Q and K, with what goes with it.
ALIASES = {"int8": "int8/fp8", "int4": "int4/fp8-fast", "fp8": "fp8/fp8", "fp4": "fp4/fp4"}

#: What a name switches on has changed; files say by their version which edition their names are of.
#: In edition 1 only 4 bit rotated, no channels were balanced, INT8 V was not smoothed and its P was
#: signed.  Up to edition 2 V's scales came from all of its tokens, up to 3 clipping shrank scores,
#: up to 4 a channel of an INT8 V had one scale for all tokens.
EDITION = 5

_FLAGS = (
    "smooth_q",
    "smooth_k",
    "smooth_v",
    "rotate",
    "balance",
    "sample_v",
    "tile_v",
    "clip",
    "unbiased",
    "unsigned_p",
)
_QK = ("fp16", "fp8", "int8", "int4", "fp4")
_PV = ("fp16", "fp8", "int8", "fp4")

#: Formats of V to which ``sample_v`` applies.
SAMPLED = (Precision.FP8, Precision.FP4)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """How Q K^T and P V are quantized.  Numerics only: it means the same on every device.

    Attributes:
        qk: format of Q and K.
        pv: format of P and V; FP16 stands for the model's own half type.
        pv_accumulator: ``"fp16"`` is the doubled-rate FP8 product of GeForce cards; it lives inside
            one tile of 64 keys only (SageAttention2++, 2505.21136).
        smooth_q: subtract the mean of every 128 query rows and add its product back in full
            precision (SageAttention2, 2411.10958 section 3.1).  Pays for 4 bit only.
        smooth_k: subtract K's mean over the tokens; the softmax doesn't see it.
        smooth_v: subtract V's mean over the tokens and add it to the output.
        rotate: multiply Q and K by the same signed Hadamard matrix along the head dim.
        balance: multiply Q's channels and divide K's by powers of two that even them out, found in
            one token of sixteen, from which K's and V's means come then as well.
        sample_v: the scales of an FP8 or FP4 V come from those tokens, too, so that V is read once.
            There is room for values 256 times as large; where P V accumulates in FP16, which has
            none, 64 tokens share a factor.  Off for other formats of V, and without ``balance``.
        tile_v: a channel of an INT8 V has a scale for every 64 tokens instead of one for all, which
            takes a third off the error and spares a second read of V.  Off for other formats.
        clip: choose the scales of 4-bit Q, K and V (INT4: of a row, FP4: of 16 values) for the
            least squared error instead of the largest value.
        unbiased: multiply Q K^T by what such scales of Q and K take off it, which is the same for
            all rows (:func:`.quantize.limits.score_gain`): its error then has no part that is alike
            at every step.  Off without ``clip``.
        unsigned_p: codes of an INT8 P are 0 .. 255 instead of 0 .. 127: P has no sign to keep.
        granularity: one scale of Q and K per token, or per block of 128 queries and 64 keys.
    """

    qk: Precision = Precision.INT8
    pv: Precision = Precision.FP16
    pv_accumulator: Literal["fp32", "fp16"] = "fp32"
    smooth_q: bool = False
    smooth_k: bool = True
    smooth_v: bool = False
    rotate: bool = False
    balance: bool = False
    sample_v: bool = False
    tile_v: bool = False
    clip: bool = False
    unbiased: bool = False
    unsigned_p: bool = False
    granularity: Literal["token", "block"] = "token"

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen; strings are accepted at the edge
        for name, allowed in (("qk", _QK), ("pv", _PV)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {_quoted(value)}"
                )
            set_field(self, name, Precision(value))
        if self.pv_accumulator not in ("fp32", "fp16"):
            raise ValueError(
                f"pv_accumulator must be fp32 or fp16, got {_quoted(self.pv_accumulator)}"
            )
        if self.granularity not in ("token", "block"):
            raise ValueError(f"granularity must be token or block, got {_quoted(self.granularity)}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {_quoted(getattr(self, name))}")
        if self.qk is Precision.FP16:
            if self.pv is not Precision.FP16:
                raise ValueError(f"pv must be fp16 when qk is fp16, got {self.pv}")
            for name in _FLAGS:  # nothing is quantized, so nothing is smoothed
                set_field(self, name, False)
            set_field(self, "granularity", "token")
        if not self.balance or self.pv not in SAMPLED:
            set_field(self, "sample_v", False)
        if not self.clip:
            set_field(self, "unbiased", False)
        if self.pv is not Precision.INT8:
            set_field(self, "tile_v", False)
        if self.pv_accumulator == "fp16" and self.pv is not Precision.FP8:
            raise ValueError(f"pv_accumulator='fp16' needs pv='fp8', got pv={self.pv.value!r}")
        if self.unsigned_p and self.pv is not Precision.INT8:
            raise ValueError(f"unsigned_p needs pv='int8', got pv={self.pv.value!r}")
        if self.clip and self.qk not in (Precision.INT4, Precision.FP4):
            raise ValueError(f"clip needs qk='int4' or 'fp4', got qk={self.qk.value!r}")
        if self.clip and self.granularity != "token":
            raise ValueError("clip needs granularity='token', got 'block'")
        if self.qk is Precision.FP4 and self.granularity != "token":
            raise ValueError("qk='fp4' needs granularity='token', got 'block'")

    @property
    def quantized(self) -> bool:
        """False for ``fp16``: the model's own attention, untouched."""
        return self.qk is not Precision.FP16

    @property
    def formats(self) -> str:
        """The name without switches: what distinguishes an attention kernel from another."""
        if not self.quantized:
            return "fp16"
        fast = "-fast" if self.pv_accumulator == "fp16" else ""
        return f"{self.qk.value}/{self.pv.value}{fast}"

    @classmethod
    def parse(cls, text: str | AttentionSpec, edition: int = EDITION) -> AttentionSpec:
        """A ladder name such as ``"int8/fp8"``, with switches: ``"int8/fp16+rotate-smooth_k"``.

        ``int8``, ``int4``, ``fp8`` and ``fp4`` are short for :data:`ALIASES`.

        A quantized name switches on smooth_k, rotate and balance, one that begins with int4 or fp4
        smooth_q, clip and unbiased too, one whose P and V are int8 smooth_v, tile_v and unsigned_p,
        and one whose P and V are fp8 or fp4 sample_v.

        Args:
            text: the name; an AttentionSpec is returned as it is.
            edition: of the names, up to :data:`EDITION`.

        Raises:
            ValueError: the text is no spec; the message lists the ladder.
            TypeError: ``text`` is neither a string nor an AttentionSpec.
        """
        if isinstance(text, AttentionSpec):
            return text
        if not isinstance(text, str):
            raise TypeError(f"spec must be a string or an AttentionSpec, got {type(text).__name__}")
        spec = _PARSED.get(text) if edition == EDITION else None
        if spec is None:
            spec = _parse(text, edition)
        return spec

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], default: AttentionSpec) -> AttentionSpec:
        """A spec from JSON fields; missing ones come from ``default``."""
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown field {_quoted(min(unknown))}")
        return replace(default, **data)

    def __str__(self) -> str:
        """The name that :meth:`parse` reads back; ladder names where there is one."""
        base = self.formats
        preset = _PARSED.get(base) or _preset(self.qk, self.pv, self.pv_accumulator, EDITION)
        changes = "".join(
            ("+" if getattr(self, name) else "-") + name
            for name in _FLAGS
            if getattr(self, name) != getattr(preset, name)
            and (name != "sample_v" or self.balance)  # without it off anyway
            and (name != "unbiased" or self.clip)
        )
        return base + changes + ("+block" if self.granularity == "block" else "")


def _quoted(value: object) -> str:
    """What a message quotes of a value: no megabytes."""
    text = repr(value.value if isinstance(value, Precision) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _preset(
    qk: Precision, pv: Precision, accumulator: Literal["fp32", "fp16"], edition: int
) -> AttentionSpec:
    four_bit = qk in (Precision.INT4, Precision.FP4)
    int8_value = edition > 1 and pv is Precision.INT8
    return AttentionSpec(
        qk,
        pv,
        accumulator,
        smooth_q=four_bit,
        smooth_v=int8_value,
        rotate=four_bit or edition > 1,
        balance=edition > 1,
        sample_v=edition > 2,
        tile_v=edition > 4,
        clip=four_bit,
        unbiased=four_bit and edition > 3,
        unsigned_p=int8_value,
    )


_NAME = re.compile(
    r"(?P<qk>[a-z0-9]+)(?:/(?P<pv>[a-z0-9]+))?(?P<fast>-fast)?(?P<switches>(?:[+-][a-z_]+)*)"
)


def _parse(text: str, edition: int = EDITION) -> AttentionSpec:
    hint = f"the ladder is {', '.join(LADDER)}"
    match = _NAME.fullmatch(text.strip().lower())
    if match is not None and match["pv"] is None and not match["fast"]:
        name = ALIASES.get(match["qk"], match["qk"]) + match["switches"]
        match = _NAME.fullmatch(name)
    if match is None or (match["pv"] is None and match["qk"] != "fp16"):
        raise ValueError(f"{_quoted(text)} is not an attention spec; {hint}")
    pv = match["pv"] or "fp16"
    if match["qk"] not in _QK or pv not in _PV:
        raise ValueError(f"{_quoted(text)} is not an attention spec; {hint}")
    try:
        accumulator: Literal["fp32", "fp16"] = "fp16" if match["fast"] else "fp32"
        spec = _preset(Precision(match["qk"]), Precision(pv), accumulator, edition)
        changes: dict[str, Any] = {}
        for sign, name in re.findall(r"([+-])([a-z_]+)", match["switches"]):
            if name in _FLAGS:
                changes[name] = sign == "+"
            elif name == "block" and sign == "+":
                changes["granularity"] = "block"
            else:
                raise ValueError(
                    f"unknown switch {_quoted(sign + name)}, known are {', '.join(_FLAGS)}, block"
                )
        return replace(spec, **changes)
    except ValueError as error:
        raise ValueError(f"{_quoted(text)} is not an attention spec: {error}; {hint}") from None


_PARSED: dict[str, AttentionSpec] = {}
_PARSED.update({name: _parse(name) for name in LADDER})

#: Not quantized: the model's own half type through the host's own attention.
FP16 = AttentionSpec.parse("fp16")

#: What runs where nothing is said: the most accurate that is quantized.
DEFAULT = AttentionSpec.parse("int8/fp16")
