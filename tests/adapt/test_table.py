"""Score tables as files: whole, or refused with one clear sentence."""

import copy
import json
import math

import pytest
from adapt_host import TinySampler

from sage_diffusion.adapt.calibrate import calibrate
from sage_diffusion.adapt.table import ScoreTable
from sage_diffusion.adapt.table_json import TableError
from sage_diffusion.kernels.spec import AttentionSpec

SPECS = ("int8/fp8-fast", "int4/fp8-fast")


@pytest.fixture(scope="module")
def stored():
    sampler = TinySampler(layers=2, steps=4)
    options = {"share": 1, "rows": 8, "sensitivity": 1}
    table = calibrate(sampler, ["a", "bb"], specs=SPECS, **options)
    return table.to_dict()


def test_a_table_reads_back_to_itself(stored, tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(stored))
    assert ScoreTable.load(path).to_dict() == stored
    older = {key: value for key, value in stored.items() if key != "unfinished"}
    assert ScoreTable.from_dict(older).to_dict() == stored


@pytest.mark.parametrize("version", [1, 2, 3])
def test_specs_of_an_older_table_are_those_that_were_measured(stored, version):
    """In version 1 8 bit did not rotate, in version 2 V was read twice."""
    older = ScoreTable.from_dict({**stored, "version": version})
    want = [str(AttentionSpec.parse(name, edition=version)) for name in stored["specs"]]
    assert list(older.specs) == want != stored["specs"]
    assert older.to_dict() == {**stored, "specs": want}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "version is missing"),
        ('{"version": 9}', "version 9, this program reads up to 5"),
        ('{"version": true}', "version is missing"),
        ('{"version": 1}', "metrics is missing"),
        ("\xff", "is not UTF-8"),
        ("[" * 20_000, r"\[0\].* must have at most 64 lists"),
        ('{"steps": ' + "9" * 5000 + "}", "steps must be a finite number"),
        ('{"mean": [[NaN]]}', r"mean\[0\]\[0\] must be a finite number"),
        ('{"version": 1, "version": 1}', "version must occur once"),
        (f'{{"version": {"9" * 299}}}', "of version 9999"),
        ('{"runs": ["\\ud800"]}', r"runs\[0\] must be Unicode text"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, text, message):
    path = tmp_path / "scores.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(TableError, match=message) as found:
        ScoreTable.load(path)
    assert str(path) in str(found.value)


def test_a_truncated_table_is_refused(stored, tmp_path):
    path = tmp_path / "scores.json"
    text = json.dumps(stored)
    for share in (0, 0.3, 0.9, 0.9999):
        path.write_text(text[: int(len(text) * share)])
        with pytest.raises(TableError, match="is not JSON"):
            ScoreTable.load(path)
        assert path.read_text() == text[: int(len(text) * share)]  # left for its owner to look at


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("specs", 1), "int9", r"specs\[1\]: 'int9' is not an attention spec"),
        (("specs",), "int8/fp8", "specs must be a list of different names, got 'int8/fp8'"),
        (("steps",), 10**9, r"count must be numbers in lists of 2 x 1000000000 x 1, got '2 x 4 x"),
        (("steps",), math.inf, "steps must be a whole number, got inf"),
        (("layers", 1), "blocks.0.attn", "layers must be a list of different names"),
        (("layers",), ["a"], "count must be numbers in lists of 1 x 4 x 1, got '2 x 4 x 1'"),
        (("metrics",), ["psnr"], "metrics must be cosine, rel_l1, error, got"),
        (("mean", 0, 0, 0, 0, 2), -1, r"mean must be not negative and finite, got \[-1.0\]"),
        (("work", 0, 0, 0), math.inf, "work must be not negative and finite"),
        (("work", 0), "x", r"work\[0\] must be numbers in lists of 2 x 4 x 1, got 'x'"),
        (("work", 1, 2, 0), "1.0", r"work\[1\]\[2\]\[0\] must be numbers .*, got '1.0'"),
        (("work", 1, 2, 0), True, r"work\[1\]\[2\]\[0\] must be numbers .*, got True"),
        (("work", 1), [], "work must be numbers in lists of 2 x 4 x 1, got lists of different"),
        (("work",), {"a" * 10**6: 1}, "work must be numbers in lists of 2 x 4 x 1, got {'aaa"),
        (("steps",), True, "steps must be a whole number, got True"),
        (("steps",), 10**18, "steps must be a whole number, got 1000"),
        (("schedule", 0), "9", "schedule must be 4 strictly"),
        (("schedule", 0), True, "schedule must be 4 strictly"),
        (("runs", 0, 1), "3", r"runs\[0\] must be"),
        (("fingerprint", "head_dims", "blocks.0.attn"), True, "head_dims.blocks.0.attn must be"),
        (("calls", 0, 0, 0), None, "calls must be numbers, got 'null'"),
        (("schedule", 1), 2.0, "schedule must be 4 strictly descending numbers or null"),
        (("schedule",), 3, "schedule must be 4 strictly"),
        (("fingerprint",), [], "fingerprint must be an object"),
        (("fingerprint", "layers"), 3, "fingerprint.layers must be a list"),
        (("fingerprint", "head_dims", "blocks.0.attn"), "x", "head_dims.blocks.0.attn must be"),
        (("settings",), 1, "settings must be an object"),
        (("runs", 0), "a", r"runs\[0\] must be \[prompt, seed\], got 'a'"),
        (("extra",), [["a", 1]], r"extra\[0\] must be \[layer, step, branch\]"),
        (("sensitivity",), [], "sensitivity must be an object or null"),
        (("sensitivity", "peak"), 0, "sensitivity.peak must be positive, got 0"),
        (("sensitivity", "factor"), [1], "sensitivity.factor must be numbers in lists of 2"),
        (("sensitivity", "layers", 0), ["c"], r"sensitivity.layers\[0\] must be layers of the"),
        (("sensitivity", "steps", 0), [0, 9], r"sensitivity.steps\[0\] must be \[first, stop\]"),
        (("sensitivity", "weight", 0, 0, 0), None, "sensitivity.weight must be numbers"),
        (("sensitivity", "branches", 0), ["up"], r"sensitivity.branches\[0\] must be branches of"),
        (("sensitivity", "method"), "gradient", "sensitivity.layers must be a list of different"),
        (("unfinished",), 3, "unfinished must be an object or null, got 3"),
    ],
)
def test_an_edited_table_is_refused_with_the_path(stored, path, value, message):
    data = copy.deepcopy(stored)
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(TableError, match=message) as caught:
        ScoreTable.from_dict(data)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("key", ["specs", "count", "mean", "sensitivity", "runs", "fingerprint"])
def test_a_missing_key_is_named(stored, key):
    with pytest.raises(TableError, match=f"is not a score table: {key} is missing"):
        ScoreTable.from_dict({k: v for k, v in stored.items() if k != key})


def test_a_broken_unfinished_stage_is_refused(stored, tmp_path):
    path = tmp_path / "scores.json"
    sampler = TinySampler(layers=2, steps=4)
    options = {"specs": SPECS, "share": 1, "rows": 8, "sensitivity": 1, "path": path}

    def stop(progress):
        if progress.stage == "sensitivity" and progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(sampler, ["a", "bb"], progress=stop, **options)
    data = json.loads(path.read_text())
    data["unfinished"]["runs"] = [["x"]]
    path.write_text(json.dumps(data))
    with pytest.raises(TableError, match=r"the unfinished end-to-end stage .* can't be read"):
        calibrate(sampler, ["a", "bb"], **options)
