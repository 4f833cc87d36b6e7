"""Machine code of the decode kernels on every card: matrix instructions, spills, shared memory."""

import itertools

import pytest
import torch
from kv_sides import side

pytest.importorskip("triton")

import targets
from test_compiled_matrix import read

from sage_diffusion.kernels.kv import gluon, layout, triton, tuning
from sage_diffusion.kernels.kv.sides import Turn
from sage_diffusion.kernels.versions import TRITON
from sage_diffusion.speed.cost_compile import compiling_for

NVIDIA, AMD = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120"), ("gfx942", "gfx1100", "gfx1201")

#: Widths, D, query heads of a KV head, channels that share a step of V.
SHAPES = [
    ((2, 2), 128, 8, 128),
    ((4, 4), 128, 8, 128),
    ((3, 2), 128, 4, 32),
    ((8, 8), 64, 16, 64),
    ((2, 2), 256, 16, 64),
    ((1, layout.TERNARY), 64, 8, 16),
    ((4, 8), 256, 8, 256),
    ((2, 3), 128, 16, 32),
]

#: Spills that are known, by Triton, then by widths and D.
SPILLS = {
    (3, 6): {
        ((2, 3), 128): ("sm_80", "sm_86", "sm_89", "sm_120"),
        ((2, 2), 256): ("sm_120",),
    }
}


def operands(widths, dim, group, v_group):
    """Zeros: nothing is executed."""
    q = torch.zeros(1, 2 * group, 1, dim, dtype=torch.float16)
    x = torch.zeros(1, 2, 128, dim)
    return q, side(x, widths[0], "channel", 128), side(x, widths[1], "token", v_group)


def cases():
    """By default two shapes for each card, other ones for the next."""
    for (i, target), (j, shape) in itertools.product(enumerate(NVIDIA), enumerate(SHAPES)):
        marks = () if (i + j) % 4 == 0 else pytest.mark.exhaustive
        name = f"{target}-k{shape[0][0]}v{shape[0][1]}-{shape[1]}"
        yield pytest.param(target, shape, marks=marks, id=name)


@pytest.mark.parametrize("target,shape", list(cases()))
def test_gluon(target, shape):
    widths, dim, group, v_group = shape
    q, k, v = operands(*shape)
    config = tuning.launch(dim, *widths, group, 128, dim // v_group)
    with compiling_for(target) as driver:
        gluon.decode(q, k, v, 1.0, split=1, config=config)
    code = read(driver.kernels[0], target)
    assert code.matrix == {"HMMA.16816.F32"}
    assert "MOVM.16.MT88" in code.opcodes
    assert code.shared <= targets.SHARED_MEMORY[target]
    known = SPILLS.get(TRITON, {}).get((widths, dim), ())
    assert (code.spills > 0) == (target in known), code.spills


@pytest.mark.parametrize("target", [*AMD, "sm_89"])
def test_triton(target):
    q, k, v = operands((3, 2), 96, 8, 32)
    codes = torch.zeros(64, 96, dtype=torch.uint8)
    turn = Turn(torch.zeros(48).double(), 1.0, torch.zeros(1, dtype=torch.int64))
    with compiling_for(target) as driver:
        triton.unpack(triton.pack(codes, 3), 3, 96)
        triton.merge(*triton.decode(q, k, v, 1.0, split=2))
        if tuning.refuse_turn(target, k.group, k.dim) is None:
            triton.decode(q, k, v, 1.0, None, turn, split=2)
    names = [kernel.name for kernel in driver.kernels]
    decoding = ["_decode_kernel", "_merge_kernel", "_decode_kernel"]
    decoding = decoding[:2] if target == "gfx1100" else decoding
    assert names == [*["_pack_kernel"] * 2, "_unpack_kernel", *decoding]
    found = [read(kernel, target) for kernel in driver.kernels]
    assert all(code.spills == 0 for code in found), [code.spills for code in found]
    assert all(code.shared <= targets.SHARED_MEMORY[target] for code in found)
    assert found[3].matrix and (target == "gfx1100" or found[5].matrix)
