"""What a call starts on its device: Triton's kernels and Torch's operators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

#: Torch operators that give out memory and start nothing.
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

#: Views whose schema doesn't say so, and questions about a tensor.
STARTS_NOTHING = {"_unsafe_view", "_reshape_alias", "lift_fresh", "device"}


class Launches(TorchDispatchMode):
    """Names of what was started, in order.

    Attributes:
        triton: kernels.
        torch: operators that compute something.
    """

    def __init__(self) -> None:
        super().__init__()
        self.triton: list[str] = []
        self.torch: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        views = [r.alias_info for r in func._schema.returns]
        is_view = bool(views) and all(v is not None and not v.is_write for v in views)
        if not is_view and name not in ALLOCATES | STARTS_NOTHING:
            self.torch.append(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def recorded() -> Iterator[Launches]:
    """Inside the block Triton's kernels are noted and not run, Torch's operators noted and run.

    With tensors on the device "meta" nothing is computed at all, and who looks at a value fails.
    """
    found = Launches()

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        found.triton.append(self.fn.__name__)

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            from triton.runtime.jit import JITFunction

            stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(found)
        yield found
