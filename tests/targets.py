"""Which kernel is native on which card, and what its machine code must contain.  Plain data.

A new kernel is a row of :data:`ATTENTION` or :data:`QUANTIZERS`; a new card is one of
:data:`SHARED_MEMORY` and one of :data:`PRODUCTS`.
"""

from __future__ import annotations

#: Bytes of shared memory (LDS) that one program may use on every target.  CUDA C++ Programming
#: Guide, table of compute capabilities; AMD's instruction set manuals, chapter on LDS.
SHARED_MEMORY = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx90a": 65536,
    "gfx942": 65536,
    "gfx950": 163840,
    "gfx1100": 65536,
    "gfx1201": 65536,
}

#: Instruction (a regular expression) that a product of these formats must become: SASS on NVIDIA,
#: assembly on AMD.  "fp8-fast" accumulates in FP16 where the card has it; "uint8" is an unsigned P,
#: which only Gluon multiplies as such.
PRODUCTS = {
    "sm_80": {
        "tf32": r"HMMA\.1688\.F32\.TF32",
        "int4": r"IMMA\.16864\.S4\.S4",
        "int8": r"IMMA\.16832\.S8\.S8",
        "uint8": r"IMMA\.16832\.U8\.S8",
        "fp16": r"HMMA\.16816\.F32",
    },
    "sm_86": {
        "tf32": r"HMMA\.1688\.F32\.TF32",
        "int4": r"IMMA\.16864\.S4\.S4",
        "int8": r"IMMA\.16832\.S8\.S8",
        "uint8": r"IMMA\.16832\.U8\.S8",
        "fp16": r"HMMA\.16816\.F32",
    },
    "sm_89": {
        "tf32": r"HMMA\.1688\.F32\.TF32",
        "int4": r"IMMA\.16864\.S4\.S4",
        "int8": r"IMMA\.16832\.S8\.S8",
        "uint8": r"IMMA\.16832\.U8\.S8",
        "fp16": r"HMMA\.16816\.F32",
        "fp8": r"QMMA\.16832\.F32\.E4M3\.E4M3",
        "fp8-fast": r"QMMA\.16832\.F16\.E4M3\.E4M3",
    },
    "sm_90": {
        "tf32": r"HGMMA\.64x\d+x8\.F32\.TF32",
        "int8": r"IGMMA\.64x\d+x32\.S8\.S8",
        "fp16": r"HGMMA\.64x\d+x16\.F32",
        "fp8": r"QGMMA\.64x\d+x32\.F32\.E4M3\.E4M3",
        "fp8-fast": r"QGMMA\.64x\d+x32\.F16\.E4M3\.E4M3",
    },
    "sm_100": {
        "tf32": r"UTCHMMA",
        "int8": r"UTCIMMA",
        "fp4": r"UTCOMMA\.4X",
        "fp16": r"UTCHMMA",
        "fp8": r"UTCQMMA",
        "fp8-fast": r"UTCQMMA",
    },
    "sm_120": {
        "tf32": r"HMMA\.1688\.F32\.TF32",
        "int8": r"IMMA\.16832\.S8\.S8",
        "uint8": r"IMMA\.16832\.U8\.S8",
        "fp4": r"OMMA\.SF\.16864\.F32\.E2M1\.E2M1\.UE4M3",
        "fp16": r"HMMA\.16816\.F32",
        "fp8": r"QMMA\.16832\.F32\.E4M3\.E4M3",
        "fp8-fast": r"QMMA\.16832\.F16\.E4M3\.E4M3",
    },
    "gfx90a": {"int8": r"v_mfma_i32_\d+x\d+x\d+i8", "fp16": r"v_mfma_f32_\d+x\d+x\d+f16"},
    "gfx942": {"int8": r"v_mfma_i32_\d+x\d+x\d+_i8", "fp16": r"v_mfma_f32_\d+x\d+x\d+_f16"},
    "gfx950": {
        "int8": r"v_mfma_i32_\d+x\d+x\d+_i8",
        "fp16": r"v_mfma_f32_\d+x\d+x\d+_f16",
        "fp8": r"v_mfma_f32_\d+x\d+x\d+_f8f6f4",
        "fp8-fast": r"v_mfma_f32_\d+x\d+x\d+_f8f6f4",
    },
    "gfx1100": {"int8": r"v_wmma_i32_16x16x16_iu8", "fp16": r"v_wmma_f32_16x16x16_f16"},
    "gfx1201": {
        "int8": r"v_wmma_i32_16x16x16_iu8",
        "fp16": r"v_wmma_f32_16x16x16_f16",
        "fp8": r"v_wmma_f32_16x16x16_fp8_fp8",
        "fp8-fast": r"v_wmma_f32_16x16x16_fp8_fp8",
    },
}

#: What a product becomes under Triton before a version, where that differs.
OLDER_PRODUCTS = {("sm_100", "int8"): ((3, 8), r"IMMA\.16832\.S8\.S8")}


def product(target: str, name: str, triton: tuple[int, ...]) -> str:
    """Of :data:`PRODUCTS`, under this version of Triton."""
    before, older = OLDER_PRODUCTS.get((target, name), ((0,), ""))
    return older if triton < before else PRODUCTS[target][name]


EVERY = tuple(SHARED_MEMORY)
WITH_FP8 = tuple(target for target in EVERY if "fp8" in PRODUCTS[target])
WITH_INT4 = ("sm_80", "sm_86", "sm_89")

#: Targets on which a backend computes a spec.  On every other one it must refuse with a reason.
ATTENTION = {
    ("triton", "int8/fp16"): EVERY,
    ("triton", "int8/int8"): EVERY,
    ("triton", "int8/fp8"): WITH_FP8,
    ("triton", "int8/fp8-fast"): WITH_FP8,
    ("triton", "fp4/fp8-fast"): ("sm_100",),
    ("triton", "fp4/fp4"): ("sm_100",),
    ("gluon", "int8/int8"): (*WITH_INT4, "sm_120"),
    ("gluon", "int8/fp8-fast"): ("sm_89", "sm_120"),
    ("gluon", "int4/int8"): WITH_INT4,
    ("gluon", "int4/fp8-fast"): ("sm_89",),
    ("gluon", "fp4/int8"): ("sm_120",),
    ("gluon", "fp4/fp8-fast"): ("sm_120",),
    ("gluon", "fp4/fp4"): ("sm_120",),
    ("hopper", "int8/fp8"): ("sm_90",),
    ("hopper", "fp8/fp8"): ("sm_90",),
}

#: Triton's first version for what not all of them compile.
NEEDS = {("triton", "fp4/fp8-fast"): (3, 9), ("triton", "fp4/fp4"): (3, 9)}


def attention(triton: tuple[int, ...]) -> dict[tuple[str, str], tuple[str, ...]]:
    """:data:`ATTENTION` under this version of Triton."""
    return {key: native for key, native in ATTENTION.items() if triton >= NEEDS.get(key, (0,))}


#: What a call may look like, first the one without mask.
VARIANTS = ("plain", "causal", "keys", "bool", "additive", "unaligned")

#: Head dims that are compiled; a backend may stop earlier for a format of Q and K.
HEAD_DIMS = (64, 128, 256)
LARGEST_HEAD_DIM = {("gluon", "int8"): 128, ("hopper", "int8"): 128, ("hopper", "fp8"): 128}

#: Spills are allowed above this head dim.
FREE_OF_SPILLS = 128

#: Backends whose registers are capped so that more programs share a multiprocessor: what they spill
#: around the main loop is the price, within it they must not.
CAPPED = ("hopper",)

_MASKS = ("keys", "bool", "additive")
_ADA = ("sm_86", "sm_89")
_GLUON_MASKS = {("gluon", "int8/int8", 128, v): _ADA for v in _MASKS}
_GLUON_FP4 = {("gluon", "fp4/int8", 128, v): ("sm_120",) for v in _MASKS}  # not on the ladder

#: A launch that an H200 was fastest with all the same.
_HALF_90 = {("triton", "int8/fp16", 128, v): ("sm_90",) for v in ("plain", "causal")}

#: Spills that are known at smaller head dims, by Triton, then by backend, spec, head dim and
#: variant of the test; those of Gluon's INT8 P and V stand around the main loop, but for 2 to 4
#: instructions before 3.9.  Masks of rows that are not aligned are padded and spill as "bool" does.
_SPILLS: dict[tuple[int, int], dict[tuple[str, str, int, str], tuple[str, ...]]] = {
    (3, 6): {
        **_GLUON_MASKS,
        ("gluon", "int8/int8", 128, "plain"): ("sm_80", *_ADA),
        ("gluon", "fp4/int8", 128, "plain"): ("sm_120",),
        ("hopper", "fp8/fp8", 128, "causal"): ("sm_90",),
        ("triton", "int8/fp16", 128, "plain"): ("sm_90", "gfx1100"),
        ("triton", "int8/fp16", 128, "causal"): ("sm_90",),
        ("triton", "int8/fp16", 128, "keys"): ("sm_120",),
        ("triton", "int8/int8", 64, "plain"): ("sm_100",),
        ("triton", "int8/int8", 64, "causal"): _ADA,
        ("triton", "int8/int8", 64, "keys"): _ADA,
        ("triton", "int8/int8", 128, "plain"): (*_ADA, "sm_120"),
        ("triton", "int8/int8", 128, "causal"): ("sm_80", "sm_120"),
        ("triton", "int8/int8", 128, "keys"): ("sm_100", "sm_120"),
        ("triton", "int8/int8", 128, "bool"): ("sm_80",),
        ("triton", "int8/int8", 128, "additive"): ("sm_80", *_ADA),
        ("triton", "int8/fp8", 64, "causal"): ("sm_89",),
        ("triton", "int8/fp8", 128, "causal"): ("sm_120",),
        ("triton", "int8/fp8-fast", 64, "keys"): ("sm_89", "sm_120"),
    },
    (3, 7): {
        **_GLUON_MASKS,
        **_HALF_90,
        ("hopper", "int8/fp8", 128, "causal"): ("sm_90",),
        ("hopper", "fp8/fp8", 128, "causal"): ("sm_90",),
        ("gluon", "int8/int8", 128, "plain"): ("sm_80", *_ADA, "sm_120"),
        ("gluon", "fp4/int8", 128, "plain"): ("sm_120",),
        ("triton", "int8/int8", 64, "plain"): (*_ADA, "sm_100"),
        ("triton", "int8/int8", 64, "causal"): ("sm_100",),
        ("triton", "int8/int8", 128, "plain"): (*_ADA, "sm_120", "gfx1201"),
        ("triton", "int8/int8", 128, "causal"): ("sm_80", "sm_100", "sm_120"),
        ("triton", "int8/int8", 128, "keys"): ("sm_100",),
        ("triton", "int8/int8", 128, "bool"): ("sm_80",),
        ("triton", "int8/int8", 128, "additive"): ("sm_80", *_ADA, "sm_100", "sm_120"),
        ("triton", "int8/fp8", 64, "causal"): ("sm_100",),
        ("triton", "int8/fp8", 128, "plain"): ("sm_120",),
    },
    (3, 8): {
        **_GLUON_MASKS,
        **_HALF_90,
        ("hopper", "fp8/fp8", 128, "causal"): ("sm_90",),
        ("gluon", "int8/int8", 128, "plain"): ("sm_80", *_ADA, "sm_120"),
        ("gluon", "fp4/int8", 128, "plain"): ("sm_120",),
        ("triton", "int8/int8", 64, "plain"): (*_ADA, "gfx1100"),
        ("triton", "int8/int8", 128, "plain"): (*_ADA, "gfx1201"),
        ("triton", "int8/int8", 128, "causal"): ("sm_80", "sm_120"),
        **{("triton", "int8/fp8", 128, v): ("sm_120",) for v in ("causal", "keys", "bool")},
    },
    (3, 9): {
        **_GLUON_MASKS,
        **_HALF_90,
        **_GLUON_FP4,
        ("gluon", "fp4/int8", 128, "plain"): ("sm_120",),
        ("gluon", "fp4/int8", 128, "causal"): ("sm_120",),
        ("gluon", "int8/int8", 128, "plain"): ("sm_80", *_ADA, "sm_120"),
        ("gluon", "int8/int8", 128, "causal"): (*_ADA, "sm_120"),
        **{("gluon", "int8/int8", 128, v): ("sm_80", *_ADA, "sm_120") for v in _MASKS},
        **{("gluon", "int4/int8", 128, v): _ADA for v in ("plain", "keys", "bool")},
        ("triton", "int8/int8", 64, "plain"): ("sm_80", *_ADA, "sm_100"),
        ("triton", "int8/int8", 64, "causal"): ("sm_80", *_ADA, "sm_100"),
        ("triton", "int8/int8", 128, "plain"): (*_ADA, "sm_120", "gfx1201"),
        ("triton", "int8/int8", 128, "causal"): ("sm_80", *_ADA, "sm_100", "sm_120"),
        ("triton", "int8/int8", 128, "keys"): ("sm_80", *_ADA, "sm_120"),
        **{("triton", "int8/int8", 128, v): (*_ADA, "sm_120") for v in ("bool", "additive")},
        **{("triton", "int8/fp8", 128, v): ("sm_120",) for v in ("causal", "keys", "bool")},
        ("triton", "fp4/fp4", 128, "bool"): ("sm_100",),
        ("triton", "fp4/fp4", 128, "additive"): ("sm_100",),
    },
}

#: The same of quantizers, by their names.
_QUANTIZER_SPILLS = {
    (3, 6): {"rope sample": ("gfx1100", "gfx1201")},
    (3, 7): {
        "rope sample": ("gfx1100", "gfx1201"),
        "together fp4/fp4": ("sm_120",),
    },
    (3, 8): {"sample int8/int8-tile_v": ("sm_90",)},
    (3, 9): {"rope together int4/int8": ("sm_80",)},
}


def spills(
    backend: str, spec: str, dim: int, variant: str, triton: tuple[int, ...]
) -> tuple[str, ...]:
    """Targets for which an attention kernel is known to spill under this version of Triton."""
    variant = "bool" if variant == "unaligned" else variant
    known = _SPILLS[max(version for version in _SPILLS if version <= triton)]
    return known.get((backend, spec, dim, variant), ())


def spills_of_quantizer(name: str, triton: tuple[int, ...]) -> tuple[str, ...]:
    """As :func:`spills`."""
    return _QUANTIZER_SPILLS.get(triton[:2], {}).get(name, ())


#: Cards that none of our kernels runs on.
REFUSED = ("sm_75", "gfx1030")

#: Types of latents and codes that nearest-code search is compiled for, and the product that each
#: must become (:data:`PRODUCTS`): float32 is three products of TF32 on NVIDIA, itself on AMD.
NEAREST_CODE = {
    "fp16": ("fp16", EVERY),
    "fp32": ("tf32", tuple(t for t in EVERY if t.startswith("sm_"))),
    "fp32 ": ("", tuple(t for t in EVERY if t.startswith("gfx"))),
}

#: Dims of a latent that are compiled.
LATENT_DIMS = (32, 128, 256)

#: Spills of the search that are known, by Triton, then by type and dim.
_SEARCH_SPILLS = {
    (3, 6): {("fp16", 128): ("sm_120", "gfx1100")},
    (3, 8): {("fp32", dim): ("sm_80", *_ADA, "sm_120") for dim in (128, 256)},
}


def spills_of_search(dtype: str, dim: int, triton: tuple[int, ...]) -> tuple[str, ...]:
    """As :func:`spills`."""
    return _SEARCH_SPILLS.get(triton[:2], {}).get((dtype, dim), ())


#: Kernels that prepare operands, and the targets whose attention reads what they write.
QUANTIZERS = {
    "statistics": EVERY,
    "mean": EVERY,
    "sample": EVERY,
    "sample int8/int8-tile_v": ("sm_80", "sm_90", "gfx90a"),
    "rows int8": EVERY,
    "rows int4": WITH_INT4,
    "smoothed rows int4": WITH_INT4,
    "rows fp4": ("sm_100", "sm_120"),
    "smoothed rows fp4": ("sm_100", "sm_120"),
    "value int8": EVERY,
    "value fp8": WITH_FP8,
    "permuted value int8": (*WITH_INT4, "sm_120"),
    "permuted value fp8": ("sm_89", "sm_120"),
    "permuted value fp4": ("sm_100", "sm_120"),
    "key scales": (*WITH_INT4, "sm_120"),
    "key bias": (*WITH_INT4, "sm_100", "sm_120"),
    "rope mean": EVERY,
    "rope sample": EVERY,
    "rope rows int8": ("sm_80", "gfx90a"),
    "rope smoothed rows int4": ("sm_89",),
    "rope rows fp4": ("sm_120",),
    "together int8/fp16": EVERY,
    "together int8/int8": ("sm_80", "sm_90", "gfx90a", "gfx1100"),
    "together int8/int8-tile_v": ("sm_80", "gfx90a"),
    "together int8/fp8": WITH_FP8,
    "together int8/fp8-fast": ("sm_89", "sm_120"),
    "together int4/int8": WITH_INT4,
    "together int4/fp8-fast": ("sm_89",),
    "together fp4/fp8-fast": ("sm_100", "sm_120"),
    "together fp4/fp4": ("sm_100", "sm_120"),
    "rope together int8/fp8": ("sm_90", "gfx950"),
    "rope together int4/int8": ("sm_80", "sm_89"),
    "rope key bias": ("sm_80", "sm_89", "sm_100", "sm_120"),
}
