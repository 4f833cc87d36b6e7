"""Where several sampling runs of one node stand: the page's bar, previews, and the time left."""

from __future__ import annotations

import time
from typing import Any

import comfy.utils
import latent_preview
from torch import Tensor

from sage_diffusion.nodes.host import show


class SamplingProgress:
    """Called after every step of every run; cancelling on the page raises from here.

    Args:
        node_id: of the node.
        model: whose latents are previewed, a ``ModelPatcher``.
        runs: what each of them does, in words; runs beyond go on with the last.
    """

    def __init__(self, node_id: Any, model: Any, runs: list[str]):
        self.node_id, self.runs = node_id, runs
        self.bar = comfy.utils.ProgressBar(1, node_id=node_id)
        self.previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self.run, self.step = 0, -1
        self.calls, self.first, self.told = 0, 0.0, 0.0

    def stands(self, runs: list[str], done: int) -> None:
        """So many runs are done of these, which may be others than before."""
        self.runs, self.run, self.step = runs, done, -1

    def __call__(self, step: int, denoised: Tensor, steps: int) -> None:
        now = time.monotonic()
        if step <= self.step:
            self.run += 1
        self.step = step
        self.calls += 1
        runs = max(len(self.runs), self.run + 1)
        done, total = self.run * steps + step + 1, runs * steps
        if self.calls == 1:
            self.first = now  # loading the model is no part of a step
        what = self.runs[min(self.run, len(self.runs) - 1)]
        text = f"{what}: step {step + 1} of {steps}, run {self.run + 1} of {runs}"
        if self.calls > 1:
            left = (now - self.first) / (self.calls - 1) * (total - done)
            text += f"\n{clock(left)} left"
        if now - self.told > 0.5 or done == total:
            self.told = now
            show(self.node_id, text, "sampling")
        preview = None
        if self.previewer is not None:
            preview = self.previewer.decode_latent_to_preview_image("JPEG", denoised)
        self.bar.update_absolute(done, total, preview)


def clock(seconds: float) -> str:
    """``2:05 min`` or ``12 s``."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02} min" if whole >= 60 else f"{whole} s"
