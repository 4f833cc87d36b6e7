"""What a report ran on."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

#: Packages whose version can change a result, in the order of a report.
PACKAGES = ("torch", "triton", "diffusers", "transformers", "sageattention", "comfy-kitchen")


def version(package: str) -> str | None:
    """Version of an installed distribution, None without one.  Imports nothing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_name() -> str:
    """The accelerator, or the CPU with its thread count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return "Apple GPU (mps)"
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def environment(**more: str) -> dict[str, str]:
    """Versions and device as short texts, and whatever else the caller knows."""
    found = {
        "sage-diffusion": version("sage-diffusion") or "not installed",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device_name(),
    }
    found.update({name: text for name in PACKAGES if (text := version(name)) is not None})
    return found | more
