"""Backward passes through ComfyUI's sampling, one call of the network at a time.

The sampler's function runs outside inference mode, around calls of the network whose outputs are
leaves: the run's own graph holds what the sampler and guidance compute, a few latents a step.  Each
call is made anew with its graph when its gradient is due (:class:`.Replayer`), so memory is that of
one call.  How much that is, a first call tells that counts what it would have kept.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from sage_diffusion.adapt.sampling import ModelCall, NoGradient
from sage_diffusion.integrations.comfy.accuracy import KSampling

#: Key of the wrapper around calls of the network.
KEY = "sage_diffusion.replay"

#: Of the free memory, what a call's graph may take.
_PART = 0.9

_GIB = 2**30


class Replay:
    """Model calls of the picture that is sampled, if one is.

    A MODEL must have :meth:`wrapper` around ``apply_model``, and Sage Attention's own inside of it.
    """

    def __init__(self) -> None:
        self._calls: list[ModelCall] | None = None
        self._beat: Callable[[], None] = lambda: None
        self._checked: set[tuple[int, ...]] = set()

    def wrapper(self, executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Around ``apply_model``."""
        if self._calls is None:
            return executor(x, *args, **kwargs)
        if "transformer_options" in kwargs:  # the next step writes into them
            kwargs["transformer_options"] = dict(kwargs["transformer_options"])

        def call(x: Tensor) -> Tensor:
            with torch.enable_grad():
                found: Tensor = executor(x, *args, **kwargs)
            return found

        def again(x: Tensor) -> Tensor:
            out = call(x)
            self._beat()
            return out

        if tuple(x.shape) not in self._checked:
            check_memory(kept_bytes(call, x, executor.class_obj), x.device)
            self._checked.add(tuple(x.shape))
        with torch.no_grad():
            out = executor(x.detach(), *args, **kwargs)
        out = out.detach().requires_grad_()
        self._calls.append(ModelCall(x, out, again))
        return out

    def run(
        self,
        model: Any,
        sampling: KSampling,
        use: Callable[[Tensor, Sequence[ModelCall]], None],
    ) -> None:
        """Sample the first picture of a latent, and use its graph.

        ``sampling.on_step`` is told twice as many steps: those of the way back follow.

        Args:
            model: a ``ModelPatcher`` with this wrapper.
            sampling: everything else.
            use: gets the final latents and the model calls.

        Raises:
            NoGradient: the model or the sampler can't be differentiated, or memory is short.
        """
        calls: list[ModelCall] = []
        self._calls = calls
        way = _ThereAndBack(sampling.on_step)

        def with_calls(final: Tensor) -> None:
            self._beat = way.back(len(calls))
            # Networks add to what they have saved (Flux), as they sample without gradients.
            with torch.autograd.graph.allow_mutation_on_saved_tensors():
                use(final, calls)

        try:
            with training():
                sample_with(model, replace(sampling, on_step=way.there), with_calls)
        except RuntimeError as error:  # of what is not implemented, and out of memory, too
            name = type(model.model).__name__
            raise NoGradient(f"{name} can't be differentiated here: {error}") from error
        finally:
            self._calls, self._beat = None, lambda: None


def replayed(clone: Any, replay: Replay) -> Any:
    """Put the wrapper on a clone that is the caller's own; returns the clone."""
    from comfy.patcher_extension import WrappersMP

    def wrapper(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return replay.wrapper(executor, x, *args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, wrapper)
    return clone


class _ThereAndBack:
    """Tells of a run's steps, and of as many on the way back."""

    def __init__(self, on_step: Callable[[int, Tensor, int], None] | None):
        self.on_step = on_step or (lambda step, denoised, total: None)
        self.steps = 0
        self.last = torch.empty(0)

    def there(self, step: int, denoised: Tensor, total: int) -> None:
        """A step is done."""
        self.steps, self.last = total, denoised.detach()
        self.on_step(step, self.last, 2 * total)

    def back(self, calls: int) -> Callable[[], None]:
        """To be called after each of so many model calls on the way back."""
        done = 0

        def beat() -> None:
            nonlocal done
            before, now = (n * self.steps // max(calls, 1) for n in (done, done + 1))
            done += 1
            if now > before:
                self.on_step(self.steps + now - 1, self.last, 2 * self.steps)

        return beat


def sample_with(model: Any, sampling: KSampling, use: Callable[[Tensor], None]) -> None:
    """ComfyUI's KSampler with a graph from the network's outputs to the final latents."""
    import comfy.sample
    import comfy.samplers

    first = replace(sampling, latent=_first_of(sampling.latent))
    image = comfy.sample.fix_empty_latent_channels(model, first.latent["samples"])
    noise = comfy.sample.prepare_noise(image, first.seed, first.latent.get("batch_index"))
    plan = comfy.samplers.KSampler(
        model,
        first.steps,
        model.load_device,
        first.sampler_name,
        first.scheduler,
        first.denoise,
        model.model_options,
    )
    sampler = comfy.samplers.sampler_object(first.sampler_name)
    plain = with_gradients(sampler.sampler_function)

    def traced(
        guided: Any, noise: Tensor, sigmas: Tensor, extra_args: Any = None, **more: Any
    ) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad(), differentiable(model.model):
            args = {k: _ordinary(v) for k, v in (extra_args or {}).items()}
            final = plain(guided, _ordinary(noise), _ordinary(sigmas), extra_args=args, **more)
            if not final.requires_grad:
                raise NoGradient(f"the sampler {first.sampler_name} leaves no gradient")
            use(final)
            return final.detach()

    sampler.sampler_function = traced

    comfy.sample.sample_custom(
        model,
        noise,
        first.cfg,
        sampler,
        plan.sigmas,
        first.positive,
        first.negative,
        image,
        noise_mask=first.latent.get("noise_mask"),
        callback=lambda step, denoised, x, total: first.tell(step, denoised, total),
        disable_pbar=True,
        seed=first.seed,
    )


def with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """A sampler's function without the decorator that turns gradients off, and so the functions of
    its module that it calls; the module stays as it is."""

    def bare(wrapped: Any) -> Any:
        plain = inspect.unwrap(wrapped)
        copy = FunctionType(
            plain.__code__, space, plain.__name__, plain.__defaults__, plain.__closure__
        )
        copy.__kwdefaults__ = plain.__kwdefaults__
        return copy

    if not isinstance(inspect.unwrap(function), FunctionType):
        return function
    space = dict(inspect.unwrap(function).__globals__)
    for name, value in space.items():
        if isinstance(value, FunctionType) and hasattr(value, "__wrapped__"):
            space[name] = bare(value)
    return bare(function)  # type: ignore[no-any-return]


def _first_of(latent: dict[str, Any]) -> dict[str, Any]:
    """A LATENT's first picture."""
    found = {**latent, "samples": latent["samples"][:1]}
    if found.get("batch_index") is not None:
        found["batch_index"] = found["batch_index"][:1]
    if found.get("noise_mask") is not None:
        found["noise_mask"] = found["noise_mask"][:1]
    return found


def _ordinary(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


@contextlib.contextmanager
def training() -> Iterator[None]:
    """ComfyUI takes operations that have a gradient, as in its own training nodes."""
    import comfy.model_management

    before = getattr(comfy.model_management, "in_training", False)  # older ones have none
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


@contextlib.contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Gradients flow through a model inside the block, whatever mode its weights were loaded in.

    Another tensor stands for each of inference mode, on the same memory.  Only vectors (biases,
    norms) ask for a gradient: that starts a graph in every layer, of the prompt's too, and keeps
    none of the activations that the gradient of a matrix would need.
    """
    aliases: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
    try:
        for module in model.modules():
            for kept in _kept(module):
                for name, value in kept.items():
                    if value is not None and type(value.data) is Tensor and value.is_inference():
                        aliases.append((kept, name, value, _alias(value)))
                        kept[name] = aliases[-1][-1]
        asking = [p for p in model.parameters() if _is_vector(p) and not p.requires_grad]
        for parameter in asking:
            parameter.requires_grad_()
        try:
            yield
        finally:
            for parameter in asking:
                parameter.requires_grad_(False)
    finally:
        for kept, name, value, alias in aliases:
            if kept.get(name) is alias and alias.data_ptr() == value.data_ptr():
                kept[name] = value


def _kept(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's own parameters and buffers, to be replaced."""
    return module._parameters, module._buffers


def _is_vector(parameter: nn.Parameter) -> bool:
    plain = type(parameter.data) is Tensor and parameter.is_floating_point()
    return plain and parameter.ndim == 1


def _alias(value: Tensor) -> Tensor:
    """An ordinary tensor, or parameter, on the memory of one of inference mode."""
    alias = torch.empty(0, dtype=value.dtype, device=value.device).set_(
        value.untyped_storage(), value.storage_offset(), value.shape, value.stride()
    )
    return nn.Parameter(alias, False) if isinstance(value, nn.Parameter) else alias


def kept_bytes(call: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> int:
    """What the graph of a call keeps beside the model's weights, counted without keeping it."""
    weights = (p for p in model.parameters() if type(p.data) is Tensor)
    fixed = {p.untyped_storage()._cdata for p in weights}
    seen: dict[tuple[int, int], StorageWeakRef] = {}
    total = 0

    def count(tensor: Tensor) -> None:
        nonlocal total
        storage = tensor.untyped_storage()
        key = storage._cdata, tensor._version  # what is written to is copied before
        if storage._cdata not in fixed and (key not in seen or seen[key].expired()):
            seen[key] = StorageWeakRef(storage)
            total += storage.nbytes()

    with torch.autograd.graph.saved_tensors_hooks(count, _never):
        call(x.detach().requires_grad_())
    return total


def _never(_: Any) -> Tensor:
    raise RuntimeError("a graph that is only counted has no backward pass")


def check_memory(needed: int, device: torch.device) -> None:
    """Refuse what does not fit.

    Raises:
        NoGradient: with how much is needed and there is.
    """
    import comfy.model_management

    free = comfy.model_management.get_free_memory(device)
    if needed > _PART * free:
        raise NoGradient(
            f"the graph of one step needs about {needed / _GIB:.1f} GiB, {free / _GIB:.1f} GiB of "
            f"{device} are free"
        )
