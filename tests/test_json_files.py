"""JSON from users: taken or refused quickly, with the path of what is wrong."""

import json

import pytest
from paced import at_most

from sage_diffusion.json_files import (
    DEEPEST,
    JSONError,
    NotJSON,
    json_path,
    parse_json,
    read_json,
    shown,
)

DEEP = 20_000

REFUSED = {
    "not a number": ('{"a": [0, NaN]}', r"^a\[1\] must be a finite number"),
    "infinity": ('{"a": {"b": -Infinity}}', r"^a\.b must be a finite number"),
    "beyond float": ('[1, "x", 1e999]', r"^\[2\] must be a finite number"),
    "5000 digits": (f'{{"a": [{"9" * 5000}]}}', r"^a\[0\] must be a finite number"),
    "301 digits": (f'{{"a": -{"9" * 301}}}', r"^a must be a finite number"),
    "half a pair": (r'{"a": ["\ud800x"]}', r"^a\[0\] must be Unicode text, got '\\ud800x'"),
    "key of half a pair": (r'{"a": {"\udc00": 1}}', r"^a\.\\udc00 must be a key of Unicode text"),
    "key twice": ('{"a": [{"b": 1, "c": 2, "b": 1}]}', r"^a\[0\]\.b must occur once"),
    "lists": (f'{{"a": {"[" * DEEP}{"]" * DEEP}}}', r"^a\[0\](\[0\])+\.\. must have at most 64"),
    "objects": ('{"k": 1, "b": ' + '{"c": ' * DEEP, r"^b\.c\.c.*\.\. must have at most 64"),
    "not that deep": ("[" * 65 + "]" * 65, r"^\[0\].* must have at most 64"),
    "second of a list": ('[1, {"x": 2}, [0, ' + "[" * DEEP, r"^\[2\]\[1\]\[0\]"),
    "nothing": ("", r"is not JSON: .*line 1, column 1"),
    "broken off": ('{"a": [1,', r"is not JSON: .*line 1, column"),
    "two documents": ("{} {}", r"is not JSON: Extra data"),
    "null byte": ('{"a": "\0"}', r"is not JSON: Invalid control character"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_named(kind):
    text, message = REFUSED[kind]
    with at_most(1000), pytest.raises(JSONError, match=message) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 250
    assert isinstance(caught.value, NotJSON) == ("is not JSON" in message)


@pytest.mark.parametrize(
    "text",
    [
        r'{"a": "\ud83d\ude00"}',  # a whole pair
        '{"a": [1.5, -0.0, 1e300, null, true, "é"]}',
        f'{{"a": {"9" * 300}}}',
        "[" * DEEPEST + "1" + "]" * DEEPEST,
        f'{{"a": 0.{"1" * 5000}}}',
        "3",
    ],
)
def test_what_python_reads_and_others_too_is_read(text):
    assert parse_json(text) == parse_json("\ufeff" + text) == json.loads(text)


def test_a_large_table_takes_no_longer_than_reading_it_twice():
    data = {"mean": [[[0.123456] * 18] * 60] * 400}
    text = json.dumps(data)
    with at_most(1000):  # 70 measured
        assert parse_json(text) == data


def test_files(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_bytes('{"a": 1}'.encode("utf-16"))
    with pytest.raises(JSONError, match="is not UTF-8 text"):
        read_json(str(path))
    with pytest.raises(OSError):
        read_json(tmp_path)
    monkeypatch.setattr("sage_diffusion.json_files.LARGEST", 1 << 20)
    path.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(JSONError, match="at most 1 MiB"):
        read_json(path)


def test_what_messages_quote_is_short():
    assert shown("a") == "'a'" and shown([1, 2]) == "[1, 2]"
    for value in ("x" * 10**6, ["y" * 1000] * 1000, {"z" * 1000: 1}, 10.0**300, 10**5000):
        assert len(shown(value)) <= 80
    assert json_path(()) == "the document" and json_path((), "plan") == "plan"
    assert json_path(("a", 1, "b", 0)) == "a[1].b[0]"
    assert len(json_path(["k" * 10**6] * 100)) < 600
