"""What quantization adds to a call: the bytes are tests/test_quantize_bytes.py's, here the time."""

import json
from pathlib import Path

import pytest

from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.speed.traffic import call_milliseconds, quantize_milliseconds, starts

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "h200-2026-11-26.json"

#: GB/s of an H200.
H200 = 4800


def measured():
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["apart"]
    return [row for row in rows if row.get("quantize_ms") and row["kernel"].split()[0] != "sdpa"]


def test_the_quantizers_of_an_h200_took_as_long_as_predicted():
    rows = measured()
    assert len(rows) >= 18 and len({row["length"] for row in rows}) >= 3
    for row in rows:
        spec = AttentionSpec.parse(row["kernel"].split()[1], edition=1)
        shape = row["length"], row["head_dim"], row["heads"]
        predicted = quantize_milliseconds(H200, spec, *shape)
        assert predicted == pytest.approx(row["quantize_ms"], rel=0.03), row["kernel"]


@pytest.mark.parametrize("name", ["int8/fp16", "int8/fp8-fast", "int4/fp8-fast", "fp4/fp4"])
def test_a_calls_time_beyond_its_main_loop(name):
    """It shrinks beside the loop as calls grow, and is most of a short one."""
    spec = AttentionSpec.parse(name)

    def beyond(length, heads=24, gbs=1008, in_columns=True):
        loop = 4 * heads * length**2 * 128 / 700 / 1e9
        call = call_milliseconds(gbs, spec, length, 128, heads, loop=loop, in_columns=in_columns)
        return (call - loop) / loop

    shares = [beyond(length) for length in (1024, 2048, 4096, 8192, 16384, 32768)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 2 and shares[-1] < 0.3
    assert beyond(4096, gbs=2016) < beyond(4096) < beyond(4096, gbs=504)
    assert beyond(4096, in_columns=False) < beyond(4096)
    assert beyond(256, heads=48) < beyond(256)  # launches are shared


def test_launches_are_those_of_the_docs():
    """Of docs/kernels.md's table, without the attention kernel, K's columns and delta-S."""
    parse = AttentionSpec.parse
    assert starts(parse("int8/fp16"), 4096) == 2
    assert starts(parse("int8/fp8"), 4096) == starts(parse("int4/fp8-fast"), 4096) == 2
    assert starts(parse("int8/int8"), 4096) == starts(parse("int4/int8"), 4096) == 2
    assert starts(parse("int8/int8-tile_v"), 4096) == 2 + 1
    assert starts(parse("int8/int8-tile_v"), 128) == 2
    assert starts(parse("int8/int8-tile_v-balance"), 4096) == 5 + 3
    assert starts(parse("int8/int8-balance"), 4096) == 5 + 2
