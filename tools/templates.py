"""The workflows of attention nodes in ``workflows/``, with their cards in the template browser.

    .venv-comfy/bin/python tools/templates.py --comfy .cache/comfyui-0.30.0

Notes name gains that are predicted, so it is to be run again when predictions change;
``tests/comfy/test_templates.py`` says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tools"), str(ROOT / "tests" / "comfy"), str(ROOT)]  # not before ComfyUI

import template_flows as flows  # noqa: E402
from template_graph import Template  # noqa: E402
from template_parts import CARDS, Calls, addresses, attention_times, gains  # noqa: E402

FLUX = Calls(4608, 24)


@dataclass(frozen=True)
class Entry:
    """One workflow: what it draws and how its note explains it.

    Attributes:
        build: adds the nodes.
        heading: of the note.
        text: what the workflow does.
        kind: preset whose gains the note tells, empty where it tells none.
        further: what to do next.
        calls: of the model.
    """

    build: Callable[[Template], None]
    heading: str
    text: str
    kind: str
    further: str
    calls: Calls = FLUX


ENTRIES = {
    "First try - SD 1.5": Entry(
        flows.first_try,
        "First try with Stable Diffusion 1.5",
        "**Sage Attention** stands between loader and sampler. After the run its first line says "
        "what ran, its second how much faster that was; **Sage Attention Report** lists every "
        "layer. Runs without a GPU too (128 x 128, 3 steps): there it shows accuracy, not speed.",
        "quality",
        "switch *enabled* off and run again to compare, then open a workflow of the model that "
        "you use. Small pictures gain little: attention pays from 1024 x 1024 on, and in videos.",
        Calls(4096, 16, 40),
    ),
    "SDXL - balanced": Entry(
        flows.sdxl,
        "SDXL, balanced",
        "The preset **balanced** takes INT8 scores, and INT8 or FP8 values, whichever are the "
        "more accurate ones at the card's best speed. Cross-attention to the text has 77 tokens "
        "and stays as it is.",
        "balanced",
        "replace *Sage Attention* by *Auto-tune Attention* for a plan of your own checkpoint.",
        Calls(4096, 20, 64),
    ),
    "SD 3.5 - custom": Entry(
        flows.sd35,
        "SD 3.5 with a plan of your own",
        "The preset **custom** opens its inputs: the spec, the part of the run, and the layers. "
        "Here the first tenth of the steps and the first block (`!double.00`) keep the model's "
        "own attention. Layer names are in the report after the first run.",
        "int8/fp16",
        "choose a faster spec, and see what it costs with *Attention Accuracy Check* in the "
        "sampler's place.",
        Calls(4250, 76, 64),
    ),
    "Flux.1 - fast": Entry(
        flows.flux_fast,
        "Flux.1, fast",
        "The preset **fast** takes 4-bit scores where the GPU has them, else INT8.",
        "fast",
        "*Flux.1 - accuracy check* shows what that costs; *Flux.1 - auto-tune* makes a plan as "
        "fast and better.",
    ),
    "Flux.1 - auto-tune": Entry(
        flows.flux_autotune,
        "Flux.1 with a plan of its own",
        "**Auto-tune Attention** samples your prompt twice with the model's own attention, "
        "measures what each spec does to each layer and step, makes the best plan that takes no "
        "longer than *fast* would, and runs the model with it. Later runs take the plan at once; "
        "it travels in the workflow and in the pictures.",
        "fast",
        "prove the plan on other prompts with *Flux.1 - accuracy check*: connect the *plan* "
        "output to it.",
    ),
    "Flux.1 - accuracy check": Entry(
        flows.flux_check,
        "What does a plan cost?",
        "**Attention Accuracy Check** takes the sampler's place: it samples with the plan and "
        "without on the same noise. Drag the line across *Compare Images*; the heat map shows the "
        "error of every layer at every step; the text has PSNR, SSIM, seconds and the verdict. A "
        "JSON report goes to `output/sage_reports`. It runs the sampler twice.",
        "fast",
        "where it says FAILED, choose *balanced* or *quality*, or let *Auto-tune Attention* "
        "protect the layers that err most.",
    ),
    "Flux.1 - calibrate": Entry(
        flows.flux_calibrate,
        "A plan in steps",
        "**Calibrate Precision Plan** is what *Auto-tune Attention* does, with every setting open "
        "and two prompts. The plan is saved to `models/sage_plans` and drawn: layers down, steps "
        "across. Cancelled, it goes on where it stopped.",
        "fast",
        "use it with Sage Attention's preset *plan file*, and prove it on prompts that it never "
        "saw with *Flux.1 - accuracy check*.",
    ),
    "Flux.1 - three specs side by side": Entry(
        flows.flux_three,
        "Three specs side by side",
        "The same prompt and seed in `int8/fp16`, `int8/fp8` and `int4/fp8-fast`, each with its "
        "own report. Specs that the card lacks leave the model's own attention in place, and the "
        "node says so in red.",
        "",
        "find the spec whose picture you still like, and take it in *custom*; or let *Auto-tune "
        "Attention* mix them by layer and step.",
    ),
    "Flux.2 - by model": Entry(
        flows.flux2,
        "Flux.2 by rules of thumb",
        "The preset **by model** knows the model's family: first and last block and the first "
        "tenth of the steps get INT8 with FP16 values, everything else 8 bits. These rules are "
        "**not calibrated**; their reasons stand in the node's help page.",
        "by model",
        "*Auto-tune Attention* in its place measures a plan of this model.",
        Calls(4608, 48),
    ),
    "Z-Image - by model": Entry(
        flows.z_image,
        "Z-Image Turbo by rules of thumb",
        "Eight steps at 1536 x 1536: the larger the picture, the more of a step is attention. The "
        "preset **by model** is **not calibrated**.",
        "by model",
        "with so few steps each counts: compare with *enabled* off before you rely on it.",
        Calls(9728, 30),
    ),
    "Qwen-Image - plan from a file": Entry(
        flows.qwen_image,
        "A plan from a file, changed and drawn",
        "**Load Precision Plan** reads `models/sage_plans` and the pack's own plans, **Edit** adds "
        "a rule (here the first ten blocks stay as they are), **Preview** draws layers x steps, "
        "**Sage Attention** takes it by its *plan* input. The plan travels in the workflow.",
        "int8/fp16",
        "make a plan of your own with *Auto-tune Attention* and load it here by its name.",
        Calls(7200, 48),
    ),
    "Wan 2.1 - video": Entry(
        flows.wan21,
        "Video with Wan 2.1",
        "Video models spend most of their time in attention: here it pays most. The preset **by "
        "model** leaves the text's cross-attention (`double.07.1` in the eighth block) alone and "
        "is careful with the last steps, which flicker. **Not calibrated.**",
        "by model",
        "raise *length*: time saved grows with the square of the tokens.",
        Calls(14040, 24),
    ),
    "Wan 2.2 - two stages": Entry(
        flows.wan22,
        "Wan 2.2 in two stages",
        "Two MODELs, so two **Sage Attention** nodes: one for the high noise of the first ten "
        "steps, one for the rest. Each reports on its own stage. **Not calibrated.**",
        "by model",
        "bypass one of the two to see what each stage gains.",
        Calls(32760, 80),
    ),
    "HunyuanVideo 1.5 - by model": Entry(
        flows.hunyuan,
        "HunyuanVideo 1.5 by rules of thumb",
        "121 frames at 1280 x 720: nearly all of a step is attention. Refiners of the prompt have "
        "few tokens and stay as they are. **Not calibrated.**",
        "by model",
        "*Auto-tune Attention* in its place, at a smaller size first: it samples twice.",
        Calls(111600, 32),
    ),
    "LTX-2 - by model": Entry(
        flows.ltx2,
        "LTX-2 by rules of thumb",
        "Five seconds of video with sound at 1280 x 704, in one stage. Attention between picture "
        "and sound, and to the text, stays as it is. **Not calibrated.**",
        "by model",
        "*Auto-tune Attention* in its place measures a plan of this model.",
        Calls(14080, 64),
    ),
    "MiniMax H3 - by model": Entry(
        flows.minimax,
        "MiniMax H3 by rules of thumb",
        "Five seconds of video with sound at 1344 x 768. Users of INT8 without rotation report "
        "that what is seen morphs, as keys of the last blocks concentrate in few channels: Sage "
        "Attention rotates and balances every 8-bit call. **Not calibrated.**",
        "by model",
        "*Auto-tune Attention* in its place measures a plan of this model.",
        Calls(37600, 40),
    ),
}


def template(name: str) -> Template:
    """One workflow, built."""
    entry = ENTRIES[name]
    gain = gains(entry.kind, entry.calls) if entry.kind else ""
    text = "\n\n".join(x for x in (f"# {entry.heading}", entry.text, gain) if x)
    found = Template(name, f"{text}\n\n**Next:** {entry.further}", addresses())
    entry.build(found)
    return found


def main() -> None:
    """Write every workflow and its card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfy", type=Path, required=True)
    comfy = parser.parse_args().comfy

    import tiny_models

    tiny_models.start_comfy(comfy.resolve())
    from template_card import card

    for name, entry in ENTRIES.items():
        path = ROOT / "workflows" / f"{name}.json"
        path.write_text(template(name).to_json(), encoding="utf-8")
        times = attention_times(entry.kind, entry.calls) if entry.kind else {}
        shown = {CARDS[key]: time for key, time in times.items()}
        card(name, entry.heading, shown, entry.calls.tokens).save(
            path.with_suffix(".jpg"), quality=88
        )


if __name__ == "__main__":
    main()
