"""Copies, shared parts and saved files of patched pipelines."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import threading
import weakref

import diffusers
import torch
from integrations.tiny_pipelines import Tiny, build
from routed import calls_per_step, plain, processors, routed
from torch import Tensor

from sage_diffusion import AttentionSession, PrecisionPlan, Rule, enable
from sage_diffusion.integrations.diffusers import apply


# ---------------------------------------------------------------------- copies, sharing, saving
def test_a_deep_copied_pipe_has_a_session_and_a_schedule_of_its_own():
    tiny = build("wan")
    enable(tiny.pipe).set_attn_processor(PrecisionPlan("fp16", (Rule("int8/fp8", start=0.5),)))
    other = Tiny(copy.deepcopy(tiny.pipe), tiny.kwargs)
    assert other.pipe.sage.session is not tiny.pipe.sage.session
    out = other(steps=2)
    theirs = other.pipe.sage.summary()
    assert theirs.specs == {"fp16": 8, "int8/fp8": 8}
    assert tiny.pipe.sage.summary().calls == 0
    assert tiny.pipe.sage.session.where.steps == 0
    assert torch.equal(tiny(steps=2), out)
    assert other.pipe.sage.summary().calls == theirs.calls

    other.pipe.set_attn_processor(None)
    assert torch.equal(other(steps=2), plain("wan"))
    assert routed(other.denoiser) == 0 < routed(tiny.denoiser)
    assert "progress_bar" in vars(tiny.pipe) and "progress_bar" not in vars(other.pipe)


def test_a_deep_copied_model_has_a_session_of_its_own():
    tiny = build("flux")
    patch = apply(tiny.pipe, AttentionSession("int8/fp8"))
    model = copy.deepcopy(tiny.denoiser)
    slots = {id(p._sage_slot.session) for p in processors(model)}
    assert len(slots) == 1 and id(patch.session) not in slots
    tiny.pipe.transformer = model
    patch.refresh()  # a component exchanged by the host comes to the pipe's session
    tiny(steps=1)
    assert patch.summary().quantized == calls_per_step("flux")


def test_a_copied_scheduler_drives_nothing():
    tiny = build("flux")
    patch = apply(tiny.pipe, AttentionSession("fp16"))
    audio = copy.deepcopy(tiny.pipe.scheduler)  # as pipelines with sound do in mid-call
    audio.set_timesteps(7)
    assert patch.session.where.steps == 0
    assert len(audio.timesteps) == 7


def test_pickled_models_and_pipes_come_back():
    tiny = build("flux")
    enable(tiny.pipe).set_attn_processor("int8/fp8")
    expected = tiny(steps=1)
    other = Tiny(pickle.loads(pickle.dumps(tiny.pipe)), tiny.kwargs)
    assert torch.equal(other(steps=1), expected)
    assert other.pipe.sage.session.where.steps == 1  # it follows its own scheduler
    assert other.denoiser.transformer_blocks[0].attn.processor._sage_slot.layers[0].ran
    other.pipe.set_attn_processor("fp16")
    assert torch.equal(other(steps=2), plain("flux"))


def test_pickles_are_read_in_a_fresh_process(tmp_path):
    tiny = build("flux")
    apply(tiny.pipe, AttentionSession("int8/fp8"))
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(tiny.denoiser.transformer_blocks[0].attn.processor))
    code = f"import pickle; print(type(pickle.load(open({str(path)!r}, 'rb'))).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "SageFluxAttnProcessor"


def test_from_pipe_shares_the_patched_model():
    tiny = build("sd15")
    patch = enable(tiny.pipe).set_attn_processor("int8/fp8")
    other = Tiny(diffusers.StableDiffusionPipeline.from_pipe(tiny.pipe), tiny.kwargs)
    other(steps=2)
    assert patch.summary().quantized == 2 * calls_per_step("sd15")
    tiny.pipe.set_attn_processor(None)
    assert torch.equal(other(steps=2), plain("sd15"))


def test_two_pipes_sampling_at_once_do_not_mix():
    tinies = [build("flux"), build("flux")]
    specs = ["int8/fp8", "fp16"]
    patches = [apply(t.pipe, AttentionSession(s)) for t, s in zip(tinies, specs, strict=True)]
    outs: list[Tensor | None] = [None, None]

    def sample(i: int) -> None:
        outs[i] = tinies[i](steps=6)

    threads = [threading.Thread(target=sample, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for patch, spec in zip(patches, specs, strict=True):
        assert patch.summary().specs == {spec: 6 * calls_per_step("flux")}
    assert torch.equal(outs[1], plain("flux", 6))


def test_saved_pipelines_are_the_same(tmp_path):
    tiny = build("flux")
    tiny.pipe.save_pretrained(tmp_path / "plain")
    enable(tiny.pipe).set_attn_processor("int8/fp8")
    tiny(steps=1)
    tiny.pipe.save_pretrained(tmp_path / "patched")
    plain_files = sorted(p.relative_to(tmp_path / "plain") for p in tmp_path.glob("plain/**/*"))
    files = sorted(p.relative_to(tmp_path / "patched") for p in tmp_path.glob("patched/**/*"))
    assert files == plain_files
    for file in files:
        if file.suffix == ".json":
            same = [json.loads((tmp_path / d / file).read_text()) for d in ("plain", "patched")]
            assert same[0] == same[1]
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "patched/transformer")
    assert loaded.state_dict().keys() == tiny.denoiser.state_dict().keys()


def test_a_removed_patch_keeps_nothing_alive():
    tiny = build("flux")
    patch = apply(tiny.pipe, AttentionSession("int8/fp8"))
    tiny(steps=1)
    session = weakref.ref(patch.session)
    patch.remove()
    del patch
    gc.collect()
    assert session() is None
