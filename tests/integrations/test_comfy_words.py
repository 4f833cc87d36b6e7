"""The page says a headline in its own language."""

import json
import re
from pathlib import Path

import pytest

from sage_diffusion.attend.runs import Nothing
from sage_diffusion.integrations.comfy.headline import (
    MISSING,
    OFF,
    broken_off,
    elsewhere,
    ready,
    sampling,
)
from sage_diffusion.integrations.comfy.timing import Timing

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = json.loads((ROOT / "web" / "words.json").read_text(encoding="utf-8"))
LANGUAGES = {"de", "fr", "es", "ja", "zh"}


class InterruptProcessingException(Exception):
    """ComfyUI's, by its name."""


def translated(line, language):
    """As ``web/text.js`` does it."""
    for word in WORDS:
        found = re.fullmatch(word["en"], line)
        if found:
            parts = [translated(part, language) for part in found.groups()]
            return re.sub(r"\$(\d)", lambda n, parts=parts: parts[int(n[1]) - 1], word[language])
    return line


def test_every_phrase_is_there_in_every_language_with_its_parts():
    for word in WORDS:
        assert set(word) == LANGUAGES | {"en"}
        parts = {f"${i + 1}" for i in range(re.compile(word["en"]).groups)}
        for language in LANGUAGES:
            assert set(re.findall(r"\$\d", word[language])) == parts, word
            assert word[language] != word["en"]


def test_no_phrase_hides_behind_an_earlier_one():
    plain = [word["en"] for word in WORDS if not re.compile(word["en"]).groups]
    for line in plain:
        first = next(word["en"] for word in WORDS if re.fullmatch(word["en"], line))
        assert first == line


@pytest.mark.parametrize("language", sorted(LANGUAGES))
@pytest.mark.parametrize(
    "headline",
    [
        OFF,
        MISSING,
        ready("fast"),
        sampling("fast"),
        elsewhere("Attention Accuracy Check"),
        broken_off(InterruptProcessingException()),
    ],
    ids=lambda headline: headline.state,
)
def test_every_state_is_said_in_every_language(headline, language):
    for line in headline[1:]:
        assert translated(line, language) != line


def test_what_a_run_says_is_translated_whole():
    cause = "min_tokens is 4096, and the longest call has 170 keys"
    nothing = Nothing(6, cause, "lower min_tokens, or sample a larger picture")
    assert translated(f"NOT QUANTIZED: {nothing.cause}", "de") == (
        "NICHT QUANTISIERT: min_tokens ist 4096, der längste Aufruf hat 170 Schlüssel"
    )
    assert translated(f"Remedy: {nothing.remedy}", "de").startswith("Abhilfe: min_tokens senken")
    timing = Timing(1.4, 3.1, 0.98, 1.2, 2**34, 3)
    assert translated(timing.brief(), "de") == (
        "Attention 3.1 -> 1.4 s, Schritt 1.2 -> 0.98 s, Spitze 16.0 GB"
    )
    slow = Timing(1.4, None, None, None, None, 0, fast=False).brief()
    assert translated(slow, "de") != slow
    line = "int8/fp8, int8/fp16: 40 of 42 attention calls"
    assert translated(line, "de") == "int8/fp8, int8/fp16: 40 von 42 Attention-Aufrufen"
    assert translated("measure: step 2 of 3, run 1 of 2", "de") == (
        "messen: Schritt 2 von 3, Lauf 1 von 2"
    )
    assert translated("anything else", "de") == "anything else"
