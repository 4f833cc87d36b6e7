"""Runs compiled kernels on the CPU: the machine, and a simulated GPU for Triton's launcher."""

from .device import SHARED_MEMORY, compile_for, gpu
from .lanes import PTXError, Unsupported
from .machine import Machine

__all__ = ["SHARED_MEMORY", "Machine", "PTXError", "Unsupported", "compile_for", "gpu"]
