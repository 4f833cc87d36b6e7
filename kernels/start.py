"""``kernel[grid](..)`` for a fraction of its time on the host, from a variant's second launch on.

At every launch Triton binds the arguments, specializes each, forms a key of text and compares the
kernel's globals: 30 to 60 microseconds.  What it decides depends on types, on the alignment of
pointers and on the values of whole numbers and constants; so those are a key here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

#: Keys that a kernel has on a device, lengths and strides included; beyond, all are made anew.
_KEPT = 4096

#: Values that Triton looks at: they stand for themselves.  A float argument's it never knows.
_PLAIN = frozenset((int, bool, str, tuple, type(None), torch.dtype))


def start_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)`` on the current device and its stream.

    Args:
        kernel: a Triton or Gluon kernel, without autotuning.
        grid: its size.
        arguments, options: as Triton takes them, every parameter of the kernel among them.
    """
    # On ROCm a tensor's size matters as well; an interpreted kernel is never compiled.
    if torch.version.hip is not None or not isinstance(kernel, JITFunction):
        kernel[grid](*arguments, **options)
        return
    table = table_of(kernel)
    key = key_of(arguments, options)
    compiled = table.get(key)
    if compiled is None:
        compiled = kernel[grid](*arguments, **options)
        if len(table) >= _KEPT:
            for known in [known for known in table if isinstance(known, tuple)]:
                del table[known]
        table[key] = compiled
        return
    rest = kernel.arg_names[len(arguments) :]
    compiled[(*grid, 1, 1)[:3]](*arguments, *map(options.__getitem__, rest))


def table_of(kernel: JITFunction) -> dict[Any, Any]:
    """What Triton compiled of a kernel for the current device.  Who empties it empties ours."""
    table: dict[Any, Any] = kernel.device_caches[driver.active.get_current_device()][0]
    return table


def key_of(arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """What a launch has in common with all others that run the same compiled kernel."""
    key: list[Any] = [*options]
    for x in (*arguments, *options.values()):
        kind = type(x)
        if kind in _PLAIN:
            key.append(x)
        elif kind is float:
            key.append(float)
        elif isinstance(x, Tensor):
            key.append(x.dtype)
            key.append(x.data_ptr() % 16 == 0)
        elif hasattr(x, "block_shape"):  # a tensor descriptor
            key += (x.base.dtype, x.base.data_ptr() % 16 == 0, *x.block_shape, x.layout)
        else:
            key.append(x)
    # A float that has a name may be a constant of the kernel, whose value Triton does know.
    key += [x for x in options.values() if type(x) is float]
    return tuple(key)
