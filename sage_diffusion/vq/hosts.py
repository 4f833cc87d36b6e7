"""Nearest-code search inside tokenizers that live in other libraries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sage_diffusion.vq.codebooks import picking, searching
from sage_diffusion.vq.memory import mebibytes, peak_memory
from sage_diffusion.vq.scores import LazyScores

_MODELS = "transformers.models"

#: How a method searches: the functions that it writes latents x codes with
#: (:class:`~sage_diffusion.vq.scores.LazyScores`), or what makes another of the module and it.
How = tuple[str, ...] | Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]

#: Quantizers: the method that writes latents x codes, and how it searches instead.  The one line
#: that another quantizer adds.
HOSTS: dict[str, tuple[str, How]] = {
    "diffusers.models.autoencoders.vae.VectorQuantizer": ("forward", ("cdist",)),
    f"{_MODELS}.emu3.modeling_emu3.Emu3VQVAEVectorQuantizer": ("forward", ("matmul", "add")),
    f"{_MODELS}.janus.modeling_janus.JanusVQVAEVectorQuantizer": ("forward", ("einsum", "add")),
    f"{_MODELS}.chameleon.modeling_chameleon.ChameleonVQVAEVectorQuantizer": (
        "forward",
        ("einsum", "add"),
    ),
    f"{_MODELS}.glm_image.modeling_glm_image.GlmImageVQVAEVectorQuantizer": (
        "forward",
        ("einsum", "add"),
    ),
    f"{_MODELS}.apertus1p5.modeling_apertus1p5.Apertus1p5VisionTokenizerVectorQuantizer": (
        "forward",
        ("linear",),
    ),
    f"{_MODELS}.mimi.modeling_mimi.MimiEuclideanCodebook": ("quantize", ("cdist",)),
    "vector_quantize_pytorch.sim_vq.SimVQ": ("forward", ("cdist",)),
    "vector_quantize_pytorch.vector_quantize_pytorch.Codebook": ("forward", searching),
    "comfy.ldm.cascade.stage_a.VectorQuantize": ("vq", picking),
}


class Measured(NamedTuple):
    """What the quantizers of a model held at most, by themselves and with the search.

    Attributes:
        before, after: bytes.
        calls: of quantizers.
        same_ids: whether all integers that they returned were the same.
    """

    before: int
    after: int
    calls: int
    same_ids: bool

    def __str__(self) -> str:
        ids = "the same ids" if self.same_ids else "other ids"
        return (
            f"peak memory of {self.calls} quantizer calls: {mebibytes(self.before)} before, "
            f"{mebibytes(self.after)} after, {ids}"
        )


class Searching:
    """Quantizers that search; :meth:`remove` leaves them as they were.  Also a context manager."""

    def __init__(
        self,
        found: dict[str, tuple[nn.Module, str, How]],
        report: Callable[[Measured], None] | None = None,
    ):
        self.names, self._report = tuple(found), report
        self._undo: list[Callable[[], None]] = []
        self._measured: list[tuple[int, int, bool]] | None = None
        for module, method, how in found.values():
            self._patch(module, method, how)

    def _patch(self, module: nn.Module, method: str, how: How) -> None:
        original, own = getattr(module, method), vars(module).get(method)
        changed = how(module, original) if callable(how) else _lazily(original, how)
        reported = self._report is None

        def searched(*args: Any, **kwargs: Any) -> Any:
            nonlocal reported

            def search() -> Any:
                return changed(*args, **kwargs)

            if self._measured is None and reported:
                return search()
            want, before = peak_memory(lambda: original(*args, **kwargs))
            got, after = peak_memory(search)
            row = (before, after, _ids_equal(got, want))
            if self._measured is not None:
                self._measured.append(row)
            elif self._report is not None:
                reported = True
                self._report(Measured(before, after, 1, row[2]))
            return got

        def undo() -> None:
            if own is None:
                delattr(module, method)
            else:
                setattr(module, method, own)

        setattr(module, method, searched)
        self._undo.append(undo)

    def measure(self, run: Callable[[], Any]) -> Measured:
        """Run something that uses the model, each quantizer both ways, and compare.

        Raises:
            ValueError: no quantizer was called.
        """
        self._measured = []
        try:
            run()
            rows = self._measured
        finally:
            self._measured = None
        if not rows:
            raise ValueError("run must call the model's quantizers, none was called")
        before, after, same = zip(*rows, strict=True)
        return Measured(max(before), max(after), len(rows), all(same))

    def remove(self) -> None:
        """Undo; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Searching:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def _lazily(original: Callable[..., Any], functions: tuple[str, ...]) -> Callable[..., Any]:
    def changed(*args: Any, **kwargs: Any) -> Any:
        with LazyScores(functions):
            return original(*args, **kwargs)

    return changed


def search(model: nn.Module, report: Callable[[Measured], None] | None = None) -> Searching:
    """Let the quantizers in a model search instead of writing latents x codes.

    Ids are the exact best for the numbers that the quantizer is given.  A quantizer that computes
    its scores in half precision rounds them and returns others now and then: these become exact.
    ``VectorQuantize`` searches outside of training only: its averages write latents x codes anyway.

    Args:
        model: of diffusers, transformers or ``vector_quantize_pytorch``, or any module that holds
            such; see :data:`HOSTS`.
        report: is told of each quantizer's first call, which then runs both ways.

    Raises:
        ValueError: it holds no quantizer that is known, or one that searches already.
    """
    found = dict(_quantizers(model))
    if not found:
        known = ", ".join(name.rpartition(".")[2] for name in HOSTS)
        raise ValueError(
            f"the model must hold a quantizer of {known}; found none in {type(model).__name__}"
        )
    for name, (module, method, _) in found.items():
        if getattr(vars(module).get(method), "__qualname__", "").startswith("Searching."):
            raise ValueError(f"{name or type(module).__name__} searches already; remove that first")
    return Searching(found, report)


def searching_copy(
    model: Any, report: Callable[[Measured], None] | None = None
) -> tuple[Any, tuple[str, ...]]:
    """A copy that searches, of a model that others hold too: it shares all weights and buffers.

    Only the quantizers and the modules around them are copied.

    Args:
        model: a module, or any object that has modules as attributes (a pipeline, a VAE).
        report: as of :func:`search`.

    Returns:
        The copy, and the names of the quantizers in it.

    Raises:
        ValueError: as :func:`search`.
    """
    if isinstance(model, nn.Module):
        made = _copied(model, {})
        return made, search(made, report).names
    attributes = vars(model) if hasattr(model, "__dict__") else {}
    parts = {name: x for name, x in attributes.items() if isinstance(x, nn.Module)}
    parts = {name: x for name, x in parts.items() if any(_quantizers(x))}
    if not parts:
        search(nn.Identity())  # raises
    made, names = copy.copy(model), []
    for name, part in parts.items():
        changed, found = searching_copy(part, report)
        setattr(made, name, changed)
        names += [f"{name}.{inside}".rstrip(".") for inside in found]
    return made, tuple(names)


def _copied(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module if no quantizer is in it, else a copy with the same tensors."""
    if module not in done:
        made = module
        if any(_quantizers(module)):
            made = copy.copy(module)
            children = {
                name: None if child is None else _copied(child, done)
                for name, child in module._modules.items()
            }
            made.__dict__["_modules"] = children
        done[module] = made
    return done[module]


def _quantizers(
    model: nn.Module,
) -> Iterator[tuple[str, tuple[nn.Module, str, How]]]:
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            host = HOSTS.get(f"{kind.__module__}.{kind.__qualname__}")
            if host is not None:
                yield name, (module, *host)
                break


def _ids_equal(got: Any, want: Any) -> bool:
    pairs = zip(tree_leaves(got), tree_leaves(want), strict=True)
    return all(
        torch.equal(a, b) for a, b in pairs if isinstance(b, Tensor) and not b.is_floating_point()
    )
