import html.parser
import json
import math
import re
import sys

import pytest

from sage_diffusion import AttentionSpec, PrecisionPlan, Rule
from sage_diffusion.accuracy import charts
from sage_diffusion.accuracy.findings import ReportError
from sage_diffusion.accuracy.records import EndToEnd, Limits, Picture, Row, Violation
from sage_diffusion.accuracy.report import AccuracyReport

INT4, INT8, FP16 = (AttentionSpec.parse(x) for x in ("int4/fp8-fast", "int8/fp8", "fp16"))
LAYERS = ("blocks.0.attn1", "blocks.1.attn1", "blocks.1.attn2")
PNG = b"\x89PNG\r\n\x1a\n"


def row(layer: str, step: int, spec: AttentionSpec, rel_l1: float, cosine: float) -> Row:
    return Row(layer, step, step / 3, None, spec, cosine, rel_l1, rel_l1 / 10, rel_l1 * 2)


def make_report(**changes) -> AccuracyReport:
    rows = [
        row("blocks.0.attn1", 0, INT4, 0.10, 0.98),
        row("blocks.0.attn1", 3, INT8, 0.02, 0.999),
        row("blocks.1.attn1", 0, INT4, 0.30, 0.90),
        row("blocks.1.attn1", 3, INT4, 0.20, 0.95),
        row("blocks.1.attn2", 3, FP16, 0.0, 1.0),  # and its step 0 never ran
    ]
    plan = PrecisionPlan(INT4, (Rule(FP16, "*.attn2"), Rule(INT8, "blocks.0.*", 0.5, 1.0)), "DiT")
    summary = {
        "calls": 5,
        "quantized": 4,
        "specs": {"int4/fp8-fast": 3, "int8/fp8": 1, "fp16": 1},
        "declined": {"mask <b>": 2},
        "layers": [
            {"name": "blocks.0.attn1", "ran": [], "declined": {"mask <b>": 2}}
            | {"non_finite_steps": [1]}
        ],
    }
    values = {
        "name": "by & hand",
        "rows": tuple(rows),
        "end_to_end": EndToEnd(("cat", "dog"), (30.0, math.inf), (0.9, None), (1.0, 0.99)),
        "environment": {"python": "3.11.7", "torch": "2.13.0"},
        "summary": summary,
        "plan": plan,
        "pictures": (Picture("cat", PNG + b"a", PNG + b"b", PNG + b"c", 8),),
    } | changes
    report = AccuracyReport(**values)
    return (
        report
        if "variants" in changes
        else AccuracyReport(**(values | {"variants": (report.variant(), report.variant(1.25))}))
    )


def test_worst_row_follows_the_metric() -> None:
    report = make_report()
    for metric in ("rel_l1", "cosine", "score", "rmse", "max_abs"):
        assert report.worst(metric).rel_l1 == 0.30, metric
    nan = row("blocks.0.attn1", 1, INT8, math.nan, math.nan)
    broken = make_report(rows=(*report.rows, nan))
    assert broken.worst("cosine") is nan and broken.worst("rel_l1") is nan
    with pytest.raises(ValueError, match=r"metric must be one of cosine, .*, got 'psnr'"):
        report.worst("psnr")
    with pytest.raises(ValueError, match="no quantized call"):
        make_report(rows=report.rows[-1:]).worst()


def test_aggregates_leave_fp16_and_unknown_cells_out_of_the_means() -> None:
    report = make_report()
    first, second, third = report.per_layer()
    assert [first.name, second.name, third.name] == list(LAYERS)
    assert first.rel_l1 == pytest.approx(0.06) and first.worst_rel_l1 == 0.10
    assert first.cosine == pytest.approx(0.9895) and first.worst_cosine == 0.98
    assert second.calls == 2 and second.max_abs == pytest.approx(0.6)
    assert third.calls == 1 and third.rel_l1 is None and third.specs == {"fp16": 1}
    noisy, clean = report.per_step()
    assert (noisy.name, clean.name) == ("0", "3")
    assert noisy.rel_l1 == pytest.approx(0.20)
    assert clean.rel_l1 == pytest.approx(0.11) and clean.calls == 3
    assert report.mean("rel_l1") == pytest.approx(0.155)
    assert ("blocks.1.attn2", 0) not in report.cells()


def test_mean_psnr_averages_the_error_and_not_the_decibels() -> None:
    end = EndToEnd(("a", "b"), (30.0, math.inf), (0.9, None), ())
    assert end.mean_psnr == pytest.approx(30 + 10 * math.log10(2))
    assert end.mean_ssim == 0.9
    assert EndToEnd(("a",), (math.inf,), (1.0,), ()).mean_psnr == math.inf
    assert EndToEnd().mean_psnr is None and EndToEnd().final_cosine is None


def test_violations_name_call_picture_and_step() -> None:
    report = make_report()
    assert report.violations(Limits()) == ()
    assert report.violations(Limits(cosine=0.5, rel_l1=1, psnr=20, ssim=0.5)) == ()
    found = report.violations(Limits(cosine=0.95, rel_l1=0.2, psnr=31, latent_cosine=0.995))
    assert found == (
        Violation("cosine", 0.90, 0.95, "blocks.1.attn1, step 0 (int4/fp8-fast)"),
        Violation("rel_l1", 0.30, 0.2, "blocks.1.attn1, step 0 (int4/fp8-fast)"),
        Violation("psnr", 30.0, 31, "picture 'cat'"),
        Violation("latent_cosine", 0.99, 0.995, "latents after step 1"),
    )
    assert str(found[1]).endswith("(int4/fp8-fast): rel_l1 is 0.3, must be at most 0.2")
    assert str(found[2]) == "picture 'cat': psnr is 30, must be at least 31"
    nan = make_report(rows=(row("blocks.0.attn1", 1, INT8, math.nan, math.nan),))
    assert {v.metric for v in nan.violations(Limits(cosine=0, rel_l1=9))} == {"cosine", "rel_l1"}


def test_json_round_trip() -> None:
    report = make_report()
    text = report.to_json()
    back = AccuracyReport.from_json(text)
    assert back == report and back.pictures == ()
    assert back.to_json() == text
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert data["version"] == 5
    assert data["end_to_end"]["psnr"] == [30.0, "inf"]
    assert data["end_to_end"]["ssim"] == [0.9, None]
    assert data["rows"][0][:5] == ["blocks.0.attn1", 0, 0.0, None, "int4/fp8-fast"]
    empty = AccuracyReport("nothing", ())
    assert AccuracyReport.from_json(empty.to_json()) == empty
    nan = AccuracyReport("x", (row("a", 0, INT8, math.inf, math.nan),))
    again = AccuracyReport.from_json(nan.to_json()).rows[0]
    assert again.rel_l1 == math.inf and math.isnan(again.cosine)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_specs_of_an_older_report_are_those_that_ran(version: int) -> None:
    """In version 1 8 bit did not rotate, in version 2 V was read twice."""
    data = json.loads(make_report().to_json())
    data["version"] = version
    data["rows"] = [[*data["rows"][0][:4], "int8/fp8", *data["rows"][0][5:]]]
    data["variants"] = [{"name": "x", "specs": {"int8/int8": 2, "fp16": 1}}]
    data["variants"][0] |= dict.fromkeys(("psnr", "ssim", "latent_cosine", "rel_l1"))
    old = AccuracyReport.from_json(json.dumps(data))
    assert old.rows[0].spec == AttentionSpec.parse("int8/fp8", version)
    (name, _), exact = old.variants[0].specs.items()
    assert AttentionSpec.parse(name) == AttentionSpec.parse("int8/int8", version)
    assert exact == ("fp16", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=6), "version: this report has version 6"),
        (lambda d: d.update(version=0), "version: must be 1 to 5, got 0"),
        (lambda d: d.update(extra=1), "extra: "),
        (lambda d: d["rows"][1].__setitem__(6, "low"), r"rows\[1\]\[6\]"),
        (lambda d: d["rows"][1].__setitem__(4, "int5/fp8"), r"rows\[1\]\[4\]: 'int5/fp8' is not"),
        (lambda d: d["columns"].reverse(), "columns: must be layer, step"),
        (lambda d: d["plan"].update(default="int9"), "plan.default: 'int9' is not"),
        (lambda d: d.pop("rows"), "rows: is missing"),
        (lambda d: d.update(version=True), "version: "),
        (lambda d: d["rows"][0].__setitem__(5, math.nan), r"^rows\[0\]\[5\] must be a finite"),
        (lambda d: d["rows"][0].__setitem__(5, "0.5"), r"^rows\[0\]\[5\]: .* got '0.5'"),
        (lambda d: d["rows"][0].__setitem__(5, True), r"^rows\[0\]\[5\]: .* got True"),
        (lambda d: d["rows"][0].__setitem__(1, "0"), r"^rows\[0\]\[1\]: "),
        (lambda d: d["rows"][0].__setitem__(2, False), r"^rows\[0\]\[2\]: "),
        (lambda d: d["rows"][0].__setitem__(0, "x\ud800"), r"^rows\[0\]\[0\] must be Unicode"),
        (lambda d: d["rows"][0].__setitem__(4, "y" * 10**6), r"^rows\[0\]\[4\]: 'yyy"),
        (lambda d: d.update(columns=["c" * 1000] * 1000), "^columns: must be layer"),
        (lambda d: d["plan"].update(schedule=[True, 0]), r"^plan.schedule\[0\]: "),
    ],
)
def test_json_errors_name_the_path(change, message: str) -> None:
    data = json.loads(make_report().to_json())
    change(data)
    with pytest.raises(ReportError, match=message) as caught:
        AccuracyReport.from_json("\ufeff" + json.dumps(data))
    assert len(str(caught.value)) < 400


def test_text_that_is_no_report() -> None:
    with pytest.raises(ReportError, match=r"is not JSON: .* \(line 1"):
        AccuracyReport.from_json("{")
    with pytest.raises(ReportError, match="must be a JSON object, got list"):
        AccuracyReport.from_json("[]")
    for deep in ("[" * 20_000, '{"rows": ' * 20_000):
        with pytest.raises(ReportError, match="must have at most 64 lists and objects"):
            AccuracyReport.from_json(deep)


def test_markdown_holds_every_part() -> None:
    text = make_report().to_markdown()
    assert text.startswith("# Accuracy of by & hand\n")
    for part in ("## Side by side", "## Pictures", "## Layers", "## Steps", "## Plan"):
        assert part in text
    assert "| cat | 30.00 | 0.9000 |" in text and "| dog | ∞ | - |" in text
    assert "| 0 | \\*.attn2 | 0% to 100% |  | fp16 |" in text
    assert "- `blocks.0.attn1` x2: mask <b>" in text
    assert "`blocks.0.attn1`: not finite at steps 1" in text
    table = text.split("## Layers\n\n")[1].split("\n\n")[0].splitlines()
    assert len(table) == 2 + len(LAYERS)
    assert len({line.count(" |") for line in table if "---" not in line}) == 1


class _Page(html.parser.HTMLParser):
    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(page: str) -> _Page:
    parsed = _Page()
    parsed.feed(page)
    parsed.close()
    assert not parsed.open
    return parsed


def test_html_is_one_self_contained_page() -> None:
    page = make_report().to_html()
    parsed = read(page)
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "http" not in page and "@import" not in page
    assert [*re.findall(r"url\((.*?)\)", page)] == ["#hatch"]
    assert "prefers-color-scheme: dark" in page
    assert "by & hand" in parsed.text and "mask <b>" in parsed.text  # escaped
    assert "Outputs were not finite" in parsed.text
    images = [a["src"] for tag, a in parsed.tags if tag == "img"]
    assert len(images) == 3 and len(set(images)) == 3


def test_html_heat_map_has_every_cell_with_its_tooltip() -> None:
    report = make_report()
    parsed = read(report.to_html())
    cells = [a["class"].split()[1] for t, a in parsed.tags if "cell" in a.get("class", "").split()]
    errors, specs = cells[:6], cells[6:]
    assert errors[4:] == ["unknown", "exact"]
    assert errors[1] == "e0" and errors[2] == "e8"  # the least and the largest error
    s4, s8 = charts.spec_class("int4/fp8-fast"), charts.spec_class("int8/fp8")
    assert specs == [s4, s8, s4, s4, "unknown", "s0"]
    assert (
        "blocks.1.attn1, step 0\nint4/fp8-fast: cosine 0.90000, relative L1 0.3000" in parsed.text
    )
    assert "blocks.1.attn2, step 0: did not run" in parsed.text


def test_html_of_a_bare_report_leaves_sections_out() -> None:
    parsed = read(AccuracyReport("nothing", ()).to_html())
    assert "Layer by step" not in parsed.text and "Pictures" not in parsed.text
    only_exact = AccuracyReport("fp16", (row("a", 0, FP16, 0, 1),))
    assert "Precision that ran" in read(only_exact.to_html()).text


def test_spec_classes_follow_the_ladder_whatever_the_switches() -> None:
    assert charts.spec_class("fp16") == "s0"
    assert charts.spec_class("int8/fp8-fast-smooth_k+block") == charts.spec_class("int8/fp8-fast")
    assert charts.spec_class("int8/fp8-smooth_k") == charts.spec_class("int8/fp8")
    assert charts.spec_class("int8/fp8") != charts.spec_class("int8/fp8-fast")
    assert charts.spec_class("fp8/fp8") == "s-other"


def test_ticks_are_round_and_reach_the_largest_value() -> None:
    assert charts.nice_ticks(0.3) == (0, 0.1, 0.2, 0.3)
    assert charts.nice_ticks(7.1e-5)[-1] == pytest.approx(8e-5)
    assert charts.nice_ticks(0.0) == (0.0, 1.0)


def test_error_classes_cover_the_range() -> None:
    edges = charts.error_edges([0.01, 0.1, 0.0, math.nan])
    assert len(edges) == charts.ERROR_CLASSES - 1
    assert charts.error_class(0.01, edges) == "e0"
    assert charts.error_class(0.1, edges) == f"e{charts.ERROR_CLASSES - 1}"
    assert charts.error_class(math.nan, edges) == "bad"
    assert charts.error_edges([0.02, 0.02]) == ()


def test_png_needs_matplotlib_and_says_so(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "map.png"
    make_report().heatmap_png(path)
    data = path.read_bytes()
    assert data.startswith(PNG)
    make_report().heatmap_png(tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == data
    with pytest.raises(ValueError, match="no quantized call"):
        AccuracyReport("nothing", ()).heatmap_png(path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'sage-diffusion\[plot\]'"):
        make_report().heatmap_png(path)


def test_save_writes_all_text_forms(tmp_path) -> None:
    report = make_report()
    paths = report.save(tmp_path / "new", "a")
    assert [path.name for path in paths] == ["a.json", "a.md", "a.html"]
    assert AccuracyReport.from_json(paths[0].read_text("utf-8")) == report
    assert paths[2].read_text("utf-8") == report.to_html()


def test_predicted_time_is_a_column_only_where_it_is_known() -> None:
    report = make_report()
    assert "| predicted time |" in report.to_markdown() and "| 1.250 |" in report.to_markdown()
    untimed = make_report(variants=(report.variant(),))
    assert "predicted time" not in untimed.to_markdown() + untimed.to_html()


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"ssim": 2.0}, "a limit of ssim must be -1 .. 1, got 2"),
        ({"cosine": 1.5}, "a limit of cosine must be -1 .. 1, got 1.5"),
        ({"rel_l1": -0.1}, "a limit of rel_l1 must be 0 .. inf, got -0.1"),
        ({"psnr": float("nan")}, "a limit of psnr must be 0 .. 200, got nan"),
    ],
)
def test_a_limit_stays_in_the_range_of_its_metric(limit, words):
    with pytest.raises(ValueError) as caught:
        Limits(**limit)
    assert words in str(caught.value)
