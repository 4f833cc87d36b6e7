"""Machine code of every kernel on every card where it is native, and refusals everywhere else.

``tests/targets.py`` says what is native where.  By default every kernel is compiled for every
target once; ``make matrix`` adds the other head dims, masks and causal variants.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import targets

from sage_diffusion.attend.backends import BACKENDS, BackendUnavailable, select
from sage_diffusion.attend.calls import AttentionCall
from sage_diffusion.kernels.attention import gluon_columns
from sage_diffusion.kernels.formats import Precision, Sample
from sage_diffusion.kernels.quantize import triton as quantize
from sage_diffusion.kernels.rope import Rope
from sage_diffusion.kernels.spec import LADDER, AttentionSpec
from sage_diffusion.kernels.versions import TRITON
from sage_diffusion.kernels.vq import triton as search
from sage_diffusion.kernels.vq.terms import terms
from sage_diffusion.speed import cost_sass
from sage_diffusion.speed.cost_compile import (
    BATCH,
    HEADS,
    LENGTH,
    Kernel,
    compile_backend,
    compiling_for,
)

#: Every instruction of a matrix unit: SASS and AMD's assembly.
_MATRIX = re.compile(r"[A-Z]*MMA\b|v_(mfma|wmma|smfmac|swmmac)_")


class Code(NamedTuple):
    """What counts of a kernel's machine code."""

    opcodes: set[str]
    spills: int
    shared: int
    spills_in_loop: int = 0

    @property
    def matrix(self) -> set[str]:
        """Opcodes of the matrix units."""
        return {op for op in self.opcodes if _MATRIX.match(op)}


def read(kernel: Kernel, target: str) -> Code:
    """Opcodes, spills (registers on AMD, instructions on NVIDIA) and shared memory."""
    if target.startswith("gfx"):
        text = kernel.assembly
        counts = [
            int(re.search(rf"\.{name}:\s*(\d+)", text)[1])
            for name in ("vgpr_spill_count", "private_segment_fixed_size")
        ]
        return Code(set(re.findall(r"^\s+(v_\w+)", text, re.M)), sum(counts), kernel.shared)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.cubin)
        (function,) = cost_sass.functions(path)
    opcodes = list(map(cost_sass.opcode, function.code))
    in_loop = sum(cost_sass.is_spill(i) for i in cost_sass.main_loop(function))
    return Code(set(opcodes), function.spills, kernel.shared, in_loop)


def skip_where_triton_aborts(formats: str, target: str) -> None:
    """Alone, these kernels compile under Triton 3.6 too."""
    if TRITON < (3, 7) and target == "gfx1201" and "fp8" in formats:
        pytest.skip("Triton 3.6 aborts on FP8 for gfx1201 in a process that compiled for gfx950")


def attention_cases() -> Iterator[Any]:
    """Backend, spec, target, head dim and variant; those that ``make test`` leaves out are marked.

    It takes each kernel without mask on each target, at head dim 64 or 128 in turn.
    """
    for i, ((backend, spec), native) in enumerate(targets.attention(TRITON).items()):
        largest = targets.LARGEST_HEAD_DIM.get((backend, spec.split("/")[0]), 256)
        for target in native:
            turn = (i + targets.EVERY.index(target)) % 2
            for dim in targets.HEAD_DIMS:
                for variant in targets.VARIANTS[: None if dim <= targets.FREE_OF_SPILLS else 1]:
                    if dim > largest:
                        continue
                    always = (dim, variant) == (targets.HEAD_DIMS[turn], "plain")
                    yield pytest.param(
                        backend,
                        spec,
                        target,
                        dim,
                        variant,
                        marks=() if always else pytest.mark.exhaustive,
                        id=f"{backend}-{spec}-{target}-{dim}-{variant}",
                    )


def mask_of(variant: str) -> torch.Tensor | None:
    """For all queries, or one of its own for each, in rows of 16 bytes or not."""
    if variant in ("plain", "causal"):
        return None
    dtype = torch.float16 if variant == "additive" else torch.bool
    rows = 1 if variant == "keys" else LENGTH
    mask = torch.zeros(BATCH, 1, rows, LENGTH + 3, dtype=dtype)
    return mask[..., 3:] if variant == "unaligned" else mask[..., :LENGTH].contiguous()


@pytest.mark.parametrize("backend,spec,target,dim,variant", list(attention_cases()))
def test_attention(backend, spec, target, dim, variant):
    skip_where_triton_aborts(spec, target)
    kernel = compile_backend(
        backend,
        AttentionSpec.parse(spec),
        dim,
        target,
        mask=mask_of(variant),
        is_causal=variant == "causal",
    )
    code = read(kernel, target)
    names = spec.split("/")
    if backend == "gluon" and names[1] == "int8":
        names[1] = "uint8"
    expected = [targets.product(target, name, TRITON) for name in names]
    for pattern in expected:
        assert any(re.match(pattern, op) for op in code.matrix), (pattern, code.matrix)
    for op in code.matrix:
        assert any(re.match(pattern, op) for pattern in expected), f"{op} too"
    assert code.shared <= targets.SHARED_MEMORY[target]
    if dim <= targets.FREE_OF_SPILLS:
        known = targets.spills(backend, spec, dim, variant, TRITON)
        spills = code.spills_in_loop if backend in targets.CAPPED else code.spills
        assert (spills > 0) == (target in known), spills


@functools.cache
def _x() -> torch.Tensor:
    """As handed over by a fused projection of 128 channels: zeros, since nothing is executed."""
    return torch.zeros(BATCH, LENGTH, 3, HEADS, 128, dtype=torch.float16)[:, :, 1].transpose(1, 2)


def prepare(name: str, interleaved: bool = True, amd: bool = False) -> None:
    """Launch one kernel of :data:`targets.QUANTIZERS`, which must be the last that is launched."""
    x = _x()
    rope = None
    if name.startswith("rope "):
        rope, name = Rope(*torch.zeros(2, LENGTH, 64), interleaved), name.removeprefix("rope ")
    kind, _, precision = name.rpartition(" ")
    smooth = torch.zeros(BATCH, HEADS, 128)
    balance = {"factor": smooth[:, :2], "rotation": True}
    if name == "statistics":
        quantize.channel_stats(x)
    elif name.startswith("sample"):
        spec = AttentionSpec.parse(precision if kind else "int4/fp8-fast+smooth_v")
        quantize.sample(x, x[:, :2], x[:, :2], spec, rope_q=rope, rope_k=rope)
    elif kind == "together":
        spec = AttentionSpec.parse(precision)
        some = smooth[:, :2]
        v_mean, v_scale = some if spec.smooth_v else None, some if spec.sample_v else None
        found = Sample(some, v_mean, some, some, v_scale)
        quantize.quantize_together(
            x,
            x[:, :2],
            x[:, :2],
            spec,
            found,
            permuted=not amd,
            column_factor=None if amd else 1.0,
            rope_q=rope,
            rope_k=rope,
        )
    elif name == "mean":
        quantize.token_mean(x, rope)
    elif kind == "rows":
        four_bit = precision in ("int4", "fp4")
        quantize.quantize_rows(
            x, Precision(precision), mean=smooth, clip=four_bit, rope=rope, **balance
        )
    elif kind == "smoothed rows":
        quantize.quantize_smoothed_rows(x, Precision(precision), clip=True, rope=rope, **balance)
    elif kind in ("value", "permuted value"):
        quantize.quantize_value(
            x,
            Precision(precision),
            mean=smooth,
            fast=precision == "fp8",
            clip=precision == "fp4",
            sums=name == "value int8",
            permuted=kind == "permuted value",
        )
    elif name == "key scales":
        gluon_columns.key_scales(quantize.quantize_rows(x, Precision.INT8))
    else:
        gluon_columns.key_bias(
            HEADS,
            x,
            q_mean=torch.zeros(BATCH, HEADS, LENGTH // 128, 128),
            k_mean=smooth,
            blocks=LENGTH // 128,
            rope=rope,
        )


@pytest.mark.parametrize(
    "name,target", [(n, t) for n, native in targets.QUANTIZERS.items() for t in native]
)
def test_quantizers(name, target):
    skip_where_triton_aborts(name, target)
    spills = 0
    for interleaved in (True, False) if name.startswith("rope") else (True,):
        with compiling_for(target) as driver:
            prepare(name, interleaved, target.startswith("gfx"))
        code = read(driver.kernels[-1], target)
        spills += code.spills
        assert code.shared <= targets.SHARED_MEMORY[target]
    assert (spills > 0) == (target in targets.spills_of_quantizer(name, TRITON)), spills


def search_cases() -> Iterator[Any]:
    """Type, product, target and dim; ``make test`` takes one dim of each."""
    for name, (product, native) in targets.NEAREST_CODE.items():
        for i, target in enumerate(native):
            for dim in targets.LATENT_DIMS:
                always = dim == targets.LATENT_DIMS[i % 2]
                marks = () if always else pytest.mark.exhaustive
                yield pytest.param(name, product, target, dim, marks=marks)


@pytest.mark.parametrize("dtype,product,target,dim", list(search_cases()))
def test_nearest_code(dtype, product, target, dim):
    kind = torch.float16 if dtype == "fp16" else torch.float32  # on AMD too, there "fp32 "
    table = torch.zeros(4096, dim, dtype=kind)
    with compiling_for(target) as driver:
        search.nearest_code(torch.zeros(1024, dim, dtype=kind), table, terms(table, "l2"), split=8)
    codes = [read(kernel, target) for kernel in driver.kernels]
    spills = {kernel.name: code.spills for kernel, code in zip(driver.kernels, codes, strict=True)}
    known = targets.spills_of_search(dtype, dim, TRITON)
    assert any(spills.values()) == (target in known), spills
    assert all(code.shared <= targets.SHARED_MEMORY[target] for code in codes)
    matrix = read(driver.kernels[0], target).matrix
    if product:
        pattern = targets.PRODUCTS[target][product]
        assert matrix and all(re.match(pattern, op) for op in matrix), matrix


def call_of(spec: str, target: str, dim: int = 128) -> AttentionCall:
    """A call on a card, without tensors."""
    return AttentionCall.typical(AttentionSpec.parse(spec), target, dim, 1024)


@pytest.mark.parametrize("target", (*targets.EVERY, *targets.REFUSED))
@pytest.mark.parametrize("backend", sorted({backend for backend, _ in targets.ATTENTION}))
def test_what_is_not_native_is_refused_with_a_reason(backend, target):
    """Nothing is compiled: ``refuse`` sees no tensors, and no kernel is imported by it."""
    refuse = next(b.refuse for b in BACKENDS if b.name == backend)
    known = {spec for _, spec in targets.ATTENTION}
    for spec in sorted(known.union(LADDER)):
        native = target in targets.attention(TRITON).get((backend, spec), ())
        largest = targets.LARGEST_HEAD_DIM.get((backend, spec.split("/")[0]), 256)
        for dim in (1, *targets.HEAD_DIMS):
            reason = refuse(call_of(spec, target, dim))
            if native and dim <= largest:
                assert reason is None, (spec, dim, reason)
            else:
                assert reason, (spec, dim)


@pytest.mark.parametrize("target", targets.REFUSED)
def test_a_card_without_kernels_says_why(target):
    """Turing left Triton at 3.3 and RDNA 2 has no matrix instructions."""
    with pytest.raises(BackendUnavailable, match=rf"triton: .*{target}.*"):
        select(call_of("int8/fp16", target), "triton")
