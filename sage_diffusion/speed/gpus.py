"""What GPUs can do at most, as plain data: rates of an SM, clocks, memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Rates of one SM, from the CUDA C++ Programming Guide and the architecture white papers.

    Attributes:
        arch: "sm_89".
        tensor: multiply-accumulates per clock, by operand format and accumulator; a format that is
            missing has no tensor cores on this card.
        fp32: FP32 lanes.
        half2: lanes of packed FP16 arithmetic.
        sms, ghz: SMs and boost clock.
        gbs: bandwidth of the memory, GB/s.
        packing: lanes of packing floats to narrower ones; 16 are those of special functions.
    """

    arch: str
    tensor: dict[str, int]
    fp32: int
    half2: int
    sms: int
    ghz: float
    gbs: float
    packing: int = 16

    @property
    def capability(self) -> tuple[int, int]:
        """(8, 9)"""
        number = int(self.arch[3:])
        return number // 10, number % 10


def _geforce(fp16: int, **more: int) -> dict[str, int]:
    """GeForce cards run products with an FP32 accumulator at half rate."""
    return {"f16/f16": fp16, "f16/f32": fp16 // 2, "i8": 2 * fp16, **more}


#: Cards by the names that the command line takes.
GPUS = {
    "rtx2080ti": Gpu("sm_75", _geforce(512, i4=2048), 64, 64, 68, 1.545, 616),
    "a100": Gpu(
        "sm_80",
        {"f16/f16": 1024, "f16/f32": 1024, "i8": 2048, "i4": 4096},
        64,
        128,
        108,
        1.41,
        2039,
    ),
    "rtx3090": Gpu("sm_86", _geforce(512, i4=2048), 128, 64, 82, 1.695, 936),
    "rtx4090": Gpu(
        "sm_89", _geforce(512, i4=2048, **{"f8/f16": 1024, "f8/f32": 512}), 128, 64, 128, 2.52, 1008
    ),
    "l40s": Gpu(
        "sm_89",
        {"f16/f16": 512, "f16/f32": 512, "i8": 1024, "i4": 2048, "f8/f16": 1024, "f8/f32": 1024},
        128,
        64,
        142,
        2.52,
        864,
    ),
    "h100": Gpu(
        "sm_90",
        {"f16/f16": 2048, "f16/f32": 2048, "i8": 4096, "f8/f16": 4096, "f8/f32": 4096},
        128,
        128,
        132,
        1.83,
        3350,
        packing=64,  # an H200 issues one every 3 cycles beside other work, in 8 it could not
    ),
    "rtx5090": Gpu(
        "sm_120",
        _geforce(512, **{"f8/f16": 1024, "f8/f32": 512, "f4": 2048}),
        128,
        64,
        170,
        2.407,
        1792,
    ),
}
