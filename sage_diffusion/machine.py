"""The device and what is installed, as facts and as text for a report."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from importlib import metadata, util

import torch

#: Packages whose version can change a result, in the order of a report.
PACKAGES = ("torch", "triton", "diffusers", "transformers", "sageattention", "comfy-kitchen")


@functools.lru_cache(maxsize=64)
def device_arch(device: torch.device) -> tuple[tuple[int, int] | None, str | None]:
    """``(capability, hip_arch)`` of a device; both None where it is no GPU."""
    if device.type != "cuda":
        return None, None
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return None, name.split(":")[0]
    return torch.cuda.get_device_capability(device), None


def parse_arch(name: str) -> tuple[tuple[int, int] | None, str | None]:
    """``(capability, hip_arch)`` of a GPU by its architecture: "sm_89", "gfx942"."""
    if name.startswith("sm_"):
        return (int(name[3:]) // 10, int(name[3:]) % 10), None
    return None, name


@functools.lru_cache(maxsize=64)
def card_name(device: torch.device) -> str | None:
    """PyTorch's name of a GPU, None where the device is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@functools.lru_cache(maxsize=1)
def driver_version() -> str:
    """Of the NVIDIA driver, "550.54.15", by its management library; "unknown" without one."""
    name = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
    try:
        library = ctypes.CDLL(name)
        text = ctypes.create_string_buffer(96)
        if library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(text, 96):
            return "unknown"
        library.nvmlShutdown()
    except (OSError, AttributeError):
        return "unknown"
    return text.value.decode(errors="replace")


@functools.lru_cache(maxsize=16)
def installed(package: str) -> str | None:
    """Version of an installed package, None if it isn't there.  Imports nothing."""
    if util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return "unknown"


@functools.lru_cache(maxsize=1)
def triton_version() -> tuple[int, int] | None:
    """Of ``triton`` or ``triton-windows``, None if neither is installed."""
    if util.find_spec("triton") is None:
        return None
    for name in ("triton", "triton-windows", "pytorch-triton-rocm", "pytorch-triton"):
        try:
            major, minor = metadata.version(name).split(".")[:2]
        except metadata.PackageNotFoundError:
            continue
        return int(major), int(minor)
    return None


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
