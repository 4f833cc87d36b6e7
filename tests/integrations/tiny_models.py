"""Every diffusers denoiser that can be built from a config, with a few weights and an input."""

from __future__ import annotations

import diffusers
import torch
from integrations.tiny_further_models import FURTHER
from integrations.tiny_image_models import IMAGE
from integrations.tiny_inputs import Entry
from integrations.tiny_other_models import OTHER
from integrations.tiny_video_models import VIDEO
from torch import nn

# On tensors this small, threads only wait for each other.
torch.set_num_threads(1)

MODELS: dict[str, Entry] = {**IMAGE, **VIDEO, **OTHER, **FURTHER}


def build(name: str) -> nn.Module:
    """A model with finite weights that all matter.

    Raises:
        AttributeError: this diffusers has no such class.
        ImportError: the class needs a package that is not installed.
    """
    torch.manual_seed(0)
    cls = getattr(diffusers, name)
    model = cls(**MODELS[name][0]).eval()
    with torch.no_grad():  # some constructors leave torch.empty, or zeros that hide everything
        for parameter in model.parameters():
            if not parameter.isfinite().all() or not parameter.any():
                parameter.normal_(std=0.1)
    return model
