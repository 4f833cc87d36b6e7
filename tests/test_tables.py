"""The README's table of speed is what the command makes of the results."""

import json
from pathlib import Path

import pytest
from from_file import benchmark

tables = benchmark("tables")

ROOT = Path(__file__).parent.parent
PREDICTED = [
    {"gpu": "rtx4090", "spec": "int4/fp8-fast", "cycles": 192, "bound": "tensor", "second": 0.64}
    | {"tops": 800},
    {"gpu": "h100", "spec": "int8/fp8", "cycles": 100, "bound": "mufu", "second": 0.91}
    | {"tops": 1200},
]


def test_the_readme_is_up_to_date():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.written(text, tables.current()) == text, "python -m benchmarks.tables --write"


def test_the_bounds_are_those_of_the_cost_model():
    """One row, compiled now; Triton's versions differ by a few instructions."""
    cost, sass = pytest.importorskip("sage_diffusion.speed.cost"), "cuobjdump"
    pytest.importorskip("triton")
    try:
        from sage_diffusion.speed.cost_sass import tool

        tool(sass)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    rows = json.loads((tables.RESULTS / "predicted.json").read_text())
    row = next(row for row in rows if row["gpu"] == "h100")
    (found,) = cost.kernel_costs(("h100",), (row["spec"],), (tables.HEAD_DIM,))
    assert found.cycles == pytest.approx(row["cycles"], rel=0.02) and found.bound == row["bound"]
    assert found.tops == pytest.approx(row["tops"], rel=0.02)
    assert len(rows) == sum(len(specs) for _, specs in tables.CARDS.values())


def timed(kernel, milliseconds, kernel_ms=None, length=tables.LENGTH):
    row = {"kernel": kernel, "length": length, "head_dim": 128, "milliseconds": milliseconds}
    tops = None if kernel_ms is None else 1000 / kernel_ms
    return {**row, "kernel_ms": kernel_ms, "kernel_tops": tops}


def document(card, *rows, date="2025-02-01", emulated=False):
    return {"date": date, "machine": {"card": card, "emulated": emulated}, "apart": list(rows)}


def test_without_a_measurement_there_are_predicted_columns_only():
    text = tables.table(PREDICTED, [])
    assert "| RTX 4090 | `int4/fp8-fast` | 192, tensor cores | 0.64 | 800 |" in text
    assert "measured TOPS" not in text and "No card has been measured yet" in text


def test_measured_beside_predicted():
    rows = [
        timed("sdpa-flash", 5.0),
        timed("sdpa-cudnn", 4.0),
        timed("sdpa-efficient", None),
        timed("triton int8/fp8", 2.5, 2.0),
        timed("hopper int8/fp8", 2.0, 1.25),  # the fastest of the spec counts
        timed("hopper int8/fp8", 0.1, 0.1, length=4096),  # another length
        timed("triton int8/fp16", None, None),  # failed
    ]
    other = [timed("sdpa-flash", 3.0), timed("triton int8/int8", 2.0, 2.0)]
    text = tables.table(
        PREDICTED, [document("NVIDIA H100 80GB HBM3", *rows), document("NVIDIA L4", *other)]
    )
    assert "| RTX 4090 | `int4/fp8-fast` | 192, tensor cores | 0.64 | 800 | - | - | - |" in text
    assert "| 100, special functions | 0.91 | 1200 | 800 | 67% | 2.00 x |" in text
    assert "| NVIDIA L4 | `int8/int8` | - | - | - | 500 | - | 1.50 x |" in text
    assert "No card" not in text and "Measured at 16384 tokens" in text


def test_the_last_file_of_a_card_counts_and_no_emulated_one(tmp_path):
    for name, content in {
        "predicted.json": PREDICTED,
        "a.json": document("NVIDIA L4", date="2025-02-01"),
        "b.json": document("NVIDIA L4", date="2025-01-01"),
        "c.json": document("emulated sm_90", emulated=True),
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert [d["date"] for d in tables.latest(tmp_path)] == ["2025-02-01"]


def test_only_what_is_between_the_markers_is_written(tmp_path, capsys):
    path = tmp_path / "page.md"
    path.write_text(f"a\n{tables.BEGIN}\nold\n{tables.END}\nz\n")
    tables.main(["--write", str(path)])
    assert path.read_text() == f"a\n{tables.BEGIN}\n{tables.current()}\n{tables.END}\nz\n"
    tables.main([])
    assert capsys.readouterr().out == tables.current() + "\n"
    for broken in ("", tables.BEGIN, tables.END + tables.BEGIN, path.read_text() * 2):
        with pytest.raises(ValueError, match="once each, in this order"):
            tables.written(broken, "x")
