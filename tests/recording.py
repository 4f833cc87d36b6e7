"""What a call starts on its device: Triton's kernels and Torch's operators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Torch operators that give out memory and start nothing.
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

#: Views whose schema doesn't say so, and questions about a tensor.
STARTS_NOTHING = {"_unsafe_view", "_reshape_alias", "device"}

#: Operators for which the host waits until the device is done; the tensor that is made of a list is
#: then copied to the device, and the copy waited for.
WAITS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "repeat_interleave.Tensor",
    "unique",
    "_unique2",
}


class Launches(TorchDispatchMode):
    """Names of what was started, in order.

    Attributes:
        triton: kernels.
        torch: operators that compute something.
        waits: those of them for which the host waits.
        elsewhere: kernels that were started while another card than their tensors' was current.
    """

    def __init__(self) -> None:
        super().__init__()
        self.triton: list[str] = []
        self.torch: list[str] = []
        self.waits: list[str] = []
        self.elsewhere: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        views = [r.alias_info for r in func._schema.returns]
        is_view = bool(views) and all(v is not None and not v.is_write for v in views)
        device = (kwargs or {}).get("device")
        moved = name == "_to_copy" and device is not None and args[0].device != device
        if moved or {name, f"{name}.{func._schema.overload_name}"} & WAITS:
            self.waits.append(name)
        if not is_view and name not in ALLOCATES | STARTS_NOTHING:
            self.torch.append(name)
        return func(*args, **(kwargs or {}))


class FakeCards:
    """Stands for ``torch.cuda.device_of``: which of several cards is the current one."""

    current = 0

    def __init__(self, x: Tensor):
        self.index = x.get_device()

    def __enter__(self) -> None:
        self.before = FakeCards.current
        if self.index >= 0:
            FakeCards.current = self.index

    def __exit__(self, *error: object) -> None:
        FakeCards.current = self.before


@contextlib.contextmanager
def recorded() -> Iterator[Launches]:
    """Inside the block Triton's kernels are noted and not run, Torch's operators noted and run.

    With tensors on the device "meta" nothing is computed at all, and who looks at a value fails;
    with those of a ``FakeTensorMode`` there are as many cards as one likes.
    """
    found = Launches()

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        found.triton.append(self.fn.__name__)
        cards = {x.get_device() for x in args if isinstance(x, Tensor)} - {-1}
        if cards - {FakeCards.current}:
            found.elsewhere.append(self.fn.__name__)

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            from triton.runtime.jit import JITFunction

            from sage_diffusion.kernels import start

            stack.enter_context(mock.patch.object(JITFunction, "run", run))
            # There is no device to have compiled anything for, nor an address to be aligned.
            stack.enter_context(mock.patch.object(start, "table_of", lambda kernel: {}))
            stack.enter_context(mock.patch.object(start, "key_of", lambda *_: ()))
        stack.enter_context(mock.patch.object(torch.cuda, "device_of", FakeCards))
        stack.enter_context(found)
        yield found
