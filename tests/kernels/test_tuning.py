"""Who refuses which spec, and launch configurations, as plain data."""

import subprocess
import sys

import pytest

from sage_diffusion.kernels.attention import tuning
from sage_diffusion.kernels.spec import AttentionSpec


@pytest.mark.parametrize(
    "name,capability,hip_arch,reason",
    [
        ("int8/fp16", (7, 5), None, "Triton needs sm_80 or newer, found sm_75"),
        ("int8/fp16", (8, 0), None, None),
        ("int8/int8", (8, 6), None, None),
        ("int8/fp8", (8, 6), None, "fp8 needs sm_89 or newer, found sm_86"),
        ("int8/fp8", (8, 9), None, None),
        ("int8/fp8-fast", (12, 0), None, None),
        ("int8/fp8", None, "gfx942", "fp8 needs gfx950 or gfx12, found gfx942"),
        ("int8/fp8", None, "gfx1201", None),
        ("int8/int8", None, "gfx1100", None),
        ("int8/fp16", None, "gfx1030", "gfx1030 has no matrix instructions that Triton uses"),
        ("int8/fp16", None, None, "needs a CUDA or ROCm device"),
        ("int8/fp16+smooth_q", (9, 0), None, "smooth_q is not part of the kernel"),
        ("fp16", (9, 0), None, "the kernel quantizes, fp16 is the model's own attention"),
        ("int4/int8", (8, 9), None, "the kernel reads Q and K in int8 or fp4, not in int4"),
        ("fp4/fp4", (10, 0), None, None),
        ("fp4/fp8-fast", (10, 3), None, None),
        ("fp4/fp4", (9, 0), None, "fp4 products of Triton are native on sm_10x, found sm_90"),
        ("fp4/fp8", None, "gfx950", "fp4 products of Triton are native on sm_10x, found gfx950"),
        (
            "fp4/int8",
            (10, 0),
            None,
            "with fp4 Q and K the kernel reads P and V in fp8 or fp4, not in int8",
        ),
        ("int8/fp4", (12, 0), None, "the kernel reads P and V in fp16, int8 or fp8, not in fp4"),
    ],
)
def test_refusals(name, capability, hip_arch, reason):
    assert tuning.unsupported(AttentionSpec.parse(name), capability, hip_arch) == reason


@pytest.mark.parametrize(
    "arch", ["sm_80", "sm_89", "sm_120", "gfx942", "gfx1100", "gfx1201", "cpu"]
)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_every_architecture_has_a_launch(arch, dim):
    plain, masked = tuning.launch(arch, dim), tuning.launch(arch, dim, "rows")
    assert 128 % plain.block_m == 0  # a program must not straddle two means of Q
    assert plain.num_stages == 1 or not arch.startswith("gfx")
    assert masked.num_stages <= 2 and masked.block_m <= 16 * masked.num_warps
    assert tuning.launch(arch, dim, "keys").num_warps >= (8 if arch.startswith("sm") else 4)
    assert plain.shift == (arch == "sm_80")


def test_launches_of_one_format():
    """INT8 values spill at 128 rows on sm_80, FP8 ones with three stages on sm_120."""
    assert tuning.launch("sm_80", 128, pv="int8").block_m == 64
    assert tuning.launch("sm_80", 128).block_m == tuning.launch("sm_86", 128, pv="int8").block_m
    assert tuning.launch("sm_120", 128, pv="fp8").num_stages == 2
    measured = tuning.Launch(128, 4, 3)
    assert tuning.launch("sm_120", 128, pv="fp8", measured=measured) == measured


def test_importing_the_kernels_does_not_import_triton():
    code = (
        "import sys, sage_diffusion.kernels.attention, sage_diffusion.kernels.quantize\n"
        "from sage_diffusion.kernels.attention import reference, tuning\n"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_fp4_launches_have_the_rows_of_block_scaled_products():
    assert all(tuning.fp4_launch(dim).block_m == 128 for dim in (64, 128, 256))
    assert tuning.fp4_launch(64, row_mask=True).num_stages == 2
    with pytest.raises(ValueError, match="block_m must be 128 for fp4, got 64"):
        tuning.fp4_launch(64, measured=tuning.Launch(64, 8, 2))
