"""Peak memory of some PyTorch code, without a profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that operators make and that live at the same time.

    Tensors that were there before do not count, nor does scratch memory inside one operator.

    Attributes:
        peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._sum = 0  # of _live, in which some may have died since it was last looked through

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and tensor.device.type != "meta":
                self._add(storage)
        # Only a sum above the peak can be a new one; looking through all at every operator is slow.
        if self._sum > self.peak:
            self._live = {key: kept for key, kept in self._live.items() if not kept[0].expired()}
            self._sum = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._sum)
        return result

    def _add(self, storage: UntypedStorage) -> None:
        size, before = storage.nbytes(), self._live.get(storage._cdata)
        self._live[storage._cdata] = StorageWeakRef(storage), size
        self._sum += size - (before[1] if before else 0)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def peak_memory(run: Callable[[], Any]) -> tuple[Any, int]:
    """The result of ``run()`` and the peak of :class:`PeakMemory` meanwhile."""
    with PeakMemory() as memory:
        result = run()
    return result, memory.peak


def mebibytes(count: int) -> str:
    """ "12.5 MiB"."""
    return f"{count / 2**20:.1f} MiB"
