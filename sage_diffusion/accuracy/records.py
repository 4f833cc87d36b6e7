"""What an accuracy report is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sage_diffusion.accuracy.metrics import score
from sage_diffusion.kernels.spec import AttentionSpec

#: Metrics of a row, and whether a larger value is better.
ROW_METRICS: Mapping[str, bool] = {
    "cosine": True,
    "rel_l1": False,
    "rmse": False,
    "max_abs": False,
    "score": True,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One attention call against exact attention on the same inputs.

    Attributes:
        layer, step, progress, branch: where it happened; ``step`` is -1 outside sampling.
        spec: what ran.
        cosine, rel_l1, rmse, max_abs: see :mod:`sage_diffusion.accuracy.metrics`.
    """

    layer: str
    step: int
    progress: float
    branch: str | None
    spec: AttentionSpec
    cosine: float
    rel_l1: float
    rmse: float
    max_abs: float

    @property
    def score(self) -> float:
        """``cosine * (1 - rel_l1)``."""
        return score(self.cosine, self.rel_l1)


@dataclass(frozen=True)
class EndToEnd:
    """The finished pictures and the latents on the way against those of FP16, same seeds.

    Attributes:
        labels: what each picture shows.
        psnr: dB per picture, infinite where two pictures are equal.
        ssim: per picture, None where a picture is smaller than SSIM's window.
        latent_cosine: per step, after the step.
    """

    labels: tuple[str, ...] = ()
    psnr: tuple[float, ...] = ()
    ssim: tuple[float | None, ...] = ()
    latent_cosine: tuple[float, ...] = ()

    @property
    def mean_psnr(self) -> float | None:
        """PSNR in dB of the squared error averaged over all pictures.

        Not the mean of the decibels: one picture without any error would make that infinite.
        """
        if not self.psnr:
            return None
        error = sum(10 ** (-value / 10) for value in self.psnr) / len(self.psnr)
        return math.inf if error == 0 else -10 * math.log10(error)

    @property
    def mean_ssim(self) -> float | None:
        """Mean over the pictures that have one."""
        return mean([value for value in self.ssim if value is not None])

    @property
    def final_cosine(self) -> float | None:
        """Cosine of the latents after the last step."""
        return self.latent_cosine[-1] if self.latent_cosine else None


@dataclass(frozen=True)
class Picture:
    """A picture of both runs as PNG bytes; ``difference`` is amplified ``gain`` times."""

    label: str
    reference: bytes
    candidate: bytes
    difference: bytes
    gain: float


@dataclass(frozen=True)
class Variant:
    """One plan in a side-by-side table, against the same FP16 run.

    Attributes:
        name: of the plan or spec.
        psnr, ssim, latent_cosine, rel_l1: see :class:`EndToEnd`; the last is the mean over calls.
        specs: spec -> calls.
        predicted_time: relative or absolute, where a cost model gave one.
    """

    name: str
    psnr: float | None
    ssim: float | None
    latent_cosine: float | None
    rel_l1: float | None
    specs: Mapping[str, int]
    predicted_time: float | None = None


#: Values that a limit of a metric can have; others are slips of the hand.
RANGES: Mapping[str, tuple[float, float]] = {
    "cosine": (-1.0, 1.0),
    "rel_l1": (0.0, math.inf),
    "rmse": (0.0, math.inf),
    "max_abs": (0.0, math.inf),
    "psnr": (0.0, 200.0),
    "ssim": (-1.0, 1.0),
    "latent_cosine": (-1.0, 1.0),
}


@dataclass(frozen=True)
class Limits:
    """What a report must keep; None is no limit.

    Raises:
        ValueError: a limit that no value of its metric, or every one, is beyond.
    """

    cosine: float | None = None
    rel_l1: float | None = None
    rmse: float | None = None
    max_abs: float | None = None
    score: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    latent_cosine: float | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"a limit of {name} must be {least:g} .. {most:g}, got {value:g}")


@dataclass(frozen=True)
class Violation:
    """A value beyond its limit; ``where`` names the call, the picture or the step."""

    metric: str
    value: float
    limit: float
    where: str

    def __str__(self) -> str:
        bound = "at most" if ROW_METRICS.get(self.metric) is False else "at least"
        return f"{self.where}: {self.metric} is {self.value:.5g}, must be {bound} {self.limit:.5g}"


class Aggregate(NamedTuple):
    """Rows of one layer or of one step; the metrics cover the quantized ones, None without any."""

    name: str
    calls: int
    specs: Mapping[str, int]
    cosine: float | None
    worst_cosine: float | None
    rel_l1: float | None
    worst_rel_l1: float | None
    rmse: float | None
    max_abs: float | None


def mean(values: list[float]) -> float | None:
    """Arithmetic mean, None of nothing."""
    return sum(values) / len(values) if values else None
