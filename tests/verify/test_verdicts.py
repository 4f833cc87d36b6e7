"""What is kept of a verification, and what "auto" makes of it."""

import json
import os
import stat

import pytest
import torch

from sage_diffusion import AttentionSpec, BackendUnavailable, machine
from sage_diffusion.attend import backends, calls, verdicts
from sage_diffusion.attend.backends import select
from sage_diffusion.attend.calls import AttentionCall
from sage_diffusion.attend.verdicts import Known, Stand, VerdictError

CARD = "NVIDIA GeForce RTX 4090"
WRONG = Known("gluon", "int8/fp8-fast", "wrong", "boolean mask: a row is not zero", (128,))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's file, empty; Triton counts as installed."""
    path = tmp_path / "cache" / "verdicts.json"
    monkeypatch.setattr(verdicts, "default_path", lambda: path)
    monkeypatch.setattr(machine, "triton_version", lambda: (3, 9))
    forget()
    yield path
    forget()


def forget():
    verdicts.user_entries.cache_clear()
    select.cache_clear()


def store(path, *kernels, card=CARD, **changes):
    stand = Stand(**{**vars(verdicts.stand_of(card)), **changes})
    verdicts.write(path, stand, "2025-01-31", kernels)
    forget()


def call(spec="int8/fp8-fast", head_dim=128, card=CARD):
    shape = (1, 8, 1024, head_dim)
    parsed = AttentionSpec.parse(spec)
    return AttentionCall(
        shape, shape, torch.float16, "cuda", (8, 9), None, None, False, False, parsed, card=card
    )


def test_auto_takes_the_next_backend_and_the_doctor_tells_why(cache):
    assert select(call()).name == "gluon"
    store(cache, WRONG)
    assert select(call()).name == "triton"
    assert select(call(), "gluon").name == "gluon"  # named: never another one
    told = backends.refusals(call())["gluon"]
    assert told == "sage-diffusion verify found it wrong here: boolean mask: a row is not zero"
    assert verdicts.describe(CARD) == [
        "verified 2025-01-31: 0 of 1 kernels right",
        "gluon int8/fp8-fast wrong, left out by backend='auto': boolean mask: a row is not zero",
    ]


def test_where_nobody_is_left_the_reason_is_in_the_error(cache):
    store(cache, Known("gluon", "int4/int8", "failed", "its process ended", (64, 128, 256)))
    with pytest.raises(BackendUnavailable, match=r"gluon: .* found it failed here: its process"):
        select(call("int4/int8"))


@pytest.mark.parametrize(
    "other",
    [
        {"spec": "int8/int8"},  # another kernel
        {"head_dim": 64},  # a head dim that was right
        {"card": "NVIDIA GeForce RTX 4080"},  # the other card of this machine
        {"card": None},
    ],
)
def test_a_verdict_is_of_one_kernel_on_one_card(cache, other):
    store(cache, WRONG)
    assert select(call(**other)).name == "gluon"


@pytest.mark.parametrize("changed", ["driver", "torch", "triton", "sage_diffusion"])
def test_after_an_update_nothing_is_known(cache, changed):
    store(cache, WRONG, **{changed: "0"})
    assert select(call()).name == "gluon"
    assert "run sage-diffusion verify again" in verdicts.describe(CARD)[0]


def test_every_switch_of_a_spec_has_the_same_kernel(cache):
    store(cache, WRONG)
    assert select(call("int8/fp8-fast+smooth_v-smooth_k")).name == "triton"


def test_what_does_not_compile_is_told_and_not_switched_off(cache):
    store(cache, Known("gluon", "int8/fp8-fast", "not compiled", "out of registers", ()))
    assert select(call()).name == "gluon"
    assert "gluon int8/fp8-fast not compiled: out of registers" in verdicts.describe(CARD)


def test_new_verdicts_replace_those_on_the_same_kernels_only(cache):
    store(cache, WRONG, Known("triton", "int8/int8", "right"))
    store(cache, Known("gluon", "int8/fp8-fast", "right"))
    store(cache, Known("triton", "int8/int8", "wrong", "x", (64,)), card="NVIDIA A100")
    here, there = verdicts.read(cache)
    assert {k.formats: k.status for k in here.kernels} == {
        "int8/fp8-fast": "right",
        "int8/int8": "right",
    }
    assert [k.status for k in there.kernels] == ["wrong"]
    assert select(call()).name == "gluon"


def test_nothing_known_asks_no_driver(cache, monkeypatch):
    monkeypatch.setattr(verdicts, "stand_of", lambda card: pytest.fail("asked"))
    assert select(call()).name == "gluon"
    assert verdicts.describe(CARD) == ["not verified yet: run sage-diffusion verify"]


BROKEN = {
    "{": "can't be read: is not JSON: Expecting property name",
    "[]": "holds no verdicts: the document must be an object",
    '{"version": 2, "cards": []}': "version must be 1, got 2",
    '{"version": 1}': "cards is missing",
    '{"version": true, "cards": []}': "version must be a whole number, got True",
    '{"version": 1, "cards": [{"stand": {}, "date": "", "kernels": []}]}': "stand.card is missing",
    '{"version": 1, "cards": [], "more": 1}': "more must not be there",
    '{"version": 1, "cards": NaN}': "cards must be a finite number",
    '{"version": 1, "cards": ' + "[" * 20_000: "must have at most 64 lists",
    '{"version": 1, "cards": {"' + "x" * 10**6 + '": 1}}': "cards must be a list, got {'xxx",
    '{"version": 1, "cards": [], "cards": []}': "cards must occur once",
}
BAD_FIELDS = {
    **{"head_dims": [100], "reason": 3, "status": None, "backend": True, "formats": ["a" * 10**6]},
    **{"head_dims ": [64.0], "head_dims  ": "64"},
}


@pytest.mark.parametrize("text", [*BROKEN, *BAD_FIELDS])
def test_a_broken_file_is_one_warning_and_stays(cache, caplog, text):
    if text in BAD_FIELDS:
        store(cache, WRONG)
        document = json.loads(cache.read_text())
        document["cards"][0]["kernels"][0][text.strip()] = BAD_FIELDS[text]
        text = json.dumps(document)
    cache.parent.mkdir(exist_ok=True)
    cache.write_text(text)
    forget()
    for _ in range(2):
        select.cache_clear()
        assert select(call()).name == "gluon"
    assert caplog.text.count("no verdict is heeded") == 1 and str(cache) in caplog.text
    assert BROKEN.get(text, "cards[0].kernels[0].") in caplog.text and len(caplog.text) < 600
    with pytest.raises(VerdictError):
        store(cache, WRONG)
    assert cache.read_text() == text and os.listdir(cache.parent) == [cache.name]


@pytest.mark.skipif(os.name == "nt", reason="folders of Windows are not read-only this way")
def test_a_folder_that_can_not_be_written_to_is_left_as_it_is(cache, monkeypatch):
    cache.parent.mkdir()
    if os.geteuid() == 0:  # who may write anywhere is refused by hand

        def refused(*arguments, **options):
            raise PermissionError(13, "Permission denied", str(cache.parent))

        monkeypatch.setattr("tempfile.mkstemp", refused)
    cache.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(OSError, match="denied"):
        store(cache, WRONG)
    assert os.listdir(cache.parent) == []


def test_the_driver_is_asked_by_its_library(monkeypatch):
    class Library:
        @staticmethod
        def nvmlInit_v2():
            return 0

        nvmlShutdown = nvmlInit_v2

        @staticmethod
        def nvmlSystemGetDriverVersion(text, size):
            text.value = b"550.54.15"
            return 0

    machine.driver_version.cache_clear()
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: Library)
    assert machine.driver_version() == "550.54.15"
    machine.driver_version.cache_clear()

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(machine.ctypes, "CDLL", missing)
    assert machine.driver_version() == "unknown"
    machine.driver_version.cache_clear()


def test_the_doctors_show_it(cache, monkeypatch):
    from types import SimpleNamespace

    from sage_diffusion.commands import doctor
    from sage_diffusion.integrations.comfy import doctor as comfy_doctor
    from sage_diffusion.integrations.comfy import verify

    store(cache, WRONG)
    card = SimpleNamespace(name=CARD, total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert doctor._gpu(0)["verdicts"] == verdicts.describe(CARD)
    for module in (calls, comfy_doctor, verify):
        monkeypatch.setattr(module, "card_name", lambda device: CARD)
    text = comfy_doctor.diagnosis("cuda")
    assert "gluon int8/fp8-fast wrong, left out by backend='auto'" in text
    assert "int8/fp8-fast   triton" in text and "int8/int8       gluon" in text
    assert verify.last_verdict("cuda").splitlines() == [CARD, *verdicts.describe(CARD)]


def test_a_run_is_remembered_and_heeded_at_once(cache, monkeypatch):
    from sage_diffusion.verify import record
    from sage_diffusion.verify.kernels import Kernel
    from sage_diffusion.verify.places import Place
    from sage_diffusion.verify.run import Verdict

    kernels = [
        Kernel("gluon", AttentionSpec.parse("int8/fp8-fast")),
        Kernel("triton", AttentionSpec.parse("int8/fp8-fast")),
        Kernel("triton", AttentionSpec.parse("int8/fp16")),
    ]
    found = [
        Verdict("rows int8", "right", cases=3),
        Verdict("gluon int8/fp8-fast", "wrong", "causal: too far", (64, 128), 3),
        Verdict("triton int8/fp8-fast", "right", cases=3),
        Verdict("triton int8/fp16", "not run", "no memory"),
    ]
    assert select(call()).name == "gluon"
    assert record.remember(Place(CARD, torch.device("cpu"), (8, 9)), found, kernels) == cache
    assert select(call()).name == "triton"
    (entry,) = verdicts.read(cache)
    assert [(k.backend, k.formats, k.status) for k in entry.kernels] == [
        ("gluon", "int8/fp8-fast", "wrong"),
        ("triton", "int8/fp8-fast", "right"),
    ]
    assert not set("/\\") & set(entry.stand.card)
