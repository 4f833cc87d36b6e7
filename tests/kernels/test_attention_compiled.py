"""Machine code of the attention kernel for cards that the simulated one cannot be."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
from ptxvm import compile_for

from sage_diffusion.kernels.attention import tuning

kernels = pytest.importorskip("sage_diffusion.kernels.attention.triton")
triton = pytest.importorskip("triton")

#: Target and the matrix instructions that Q K^T in INT8 and P V in FP16 must become.
TARGETS = {
    80: ("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8", "m16n8k16.row.col.f32.f16"),
    86: ("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8", "m16n8k16.row.col.f32.f16"),
    89: ("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8", "m16n8k16.row.col.f32.f16"),
    90: ("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8", "k16.f32.f16.f16"),
    100: ("tcgen05.mma.cta_group::1.kind::i8", "tcgen05.mma.cta_group::1.kind::f16"),
    120: ("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8", "m16n8k16.row.col.f32.f16"),
    "gfx942": ("v_mfma_i32_", "v_mfma_f32_32x32x8_f16"),
    "gfx1100": ("v_wmma_i32_16x16x16_iu8", "v_wmma_f32_16x16x16_f16"),
    "gfx1201": ("v_wmma_i32_16x16x16_iu8", "v_wmma_f32_16x16x16_f16"),
}

POINTERS = {"p_q": "*i8", "p_k": "*i8", "p_v": "*fp16", "p_out": "*fp16"}
INTEGERS = ("heads", "group", "q_len", "k_len", "q_groups", "k_groups")
STRIDES = ("stride_vb", "stride_vh", "stride_vn")


def build(target, dim):
    """``int8/fp16`` without mask, as for contiguous tensors of a whole number of tiles."""
    arch = f"sm_{target}" if isinstance(target, int) else target
    config = tuning.launch(arch, dim)
    signature = dict(POINTERS, p_q_scale="*fp32", p_k_scale="*fp32")
    signature.update(dict.fromkeys((*INTEGERS, *STRIDES), "i32"))
    constants = dict.fromkeys(("p_v_scale", "p_v_mean", "p_mask", "p_lse"))
    constants.update(dict.fromkeys(("stride_mb", "stride_mh", "stride_mm", "stride_mn"), 0))
    constants.update(stride_vd=1, D=dim, DP=dim, PV="half", P_RANGE=0.0, Q_BLOCK=1, K_BLOCK=1)
    constants.update(MASK=0, MASK_ROWS=False, CAUSAL=False)
    constants.update(SHIFT=config.shift, BLOCK_M=config.block_m, BLOCK_N=64)
    return compile_for(
        kernels._attention_fwd_kernel,
        signature,
        constants,
        target,
        config.num_warps,
        config.num_stages,
        aligned=tuple(n for n in signature if n not in ("heads", "group")),
        enable_fp_fusion=True,
    )


def spills(kernel, target) -> int:
    """Registers that the main program moves to memory for want of room."""
    if not isinstance(target, int):
        return int(re.search(r"vgpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"])[1])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tools / "nvdisasm"), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"\b(?:STL|LDL)\b", text))


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_matrix_instructions_and_no_spills(target):
    kernel = build(target, 128)
    text = kernel.asm["ptx" if isinstance(target, int) else "amdgcn"]
    for instruction in TARGETS[target]:
        assert instruction in text
    assert spills(kernel, target) == 0
