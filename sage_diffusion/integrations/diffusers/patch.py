"""One patched pipeline or model: its attention modules routed, its scheduler followed, undone."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
from torch import nn

from sage_diffusion.attend.layer import AttentionRefused
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.attend.summary import SessionSummary
from sage_diffusion.integrations.diffusers.guidance import Guidance, is_pipeline
from sage_diffusion.integrations.diffusers.processors import is_routed, layer_names, route, unroute
from sage_diffusion.integrations.diffusers.rebind import attention_sites, computes_softmax
from sage_diffusion.integrations.diffusers.schedule import HostMethod, ScheduleDriver, ends_with
from sage_diffusion.integrations.diffusers.weak import WeakCall, WeakLink
from sage_diffusion.plan.names import LayerName

log = logging.getLogger("sage_diffusion")

#: What pipelines call their main denoiser; where they call it otherwise, it is the first.
_MAIN = ("transformer", "unet")

#: Parameters by which a denoiser is told how much noise there is.
_TIME = re.compile(r"time|sigma|noise_level|^t$")


@dataclass(frozen=True)
class PatchSummary(SessionSummary):
    """A session's summary, and the attention modules that can't be routed.

    Attributes:
        skipped: module -> its processor, which computes no softmax attention or by hand.
    """

    skipped: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**super().to_dict(), "skipped": dict(self.skipped)}

    def __str__(self) -> str:
        lines = [super().__str__()]
        lines += [f"  {name}  not routed: {what}" for name, what in self.skipped.items()]
        return "\n".join(lines)


class Patch:
    """A patched pipeline or model; undone by :meth:`remove` or at the end of a ``with`` block.

    Args:
        target: a pipeline or a model.
        session: what decides and runs.
        only: names of the attention modules to patch; None for all.

    Raises:
        PlanError: the plan was made for another model.
        TypeError: the target is neither a pipeline nor a model.
        ValueError: it has no attention that can be routed.
    """

    def __init__(self, target: Any, session: AttentionSession, only: frozenset[str] | None = None):
        denoisers(target)  # is it a target at all?
        self._target = WeakLink(target)
        self.session = session
        self.skipped: dict[str, str] = {}
        self._only = only
        self._known: set[str] = set()  # stay denoisers whatever processors the host gives them
        self._routed: list[tuple[WeakLink, Any]] = []
        # Owned by their hosts: a second pipeline over the same parts may go before the patch does.
        self._methods: list[WeakLink] = []
        self._guidance = Guidance(session, target)
        self._driver = self._new_driver()
        self._live = False
        self._check()

    @property
    def target(self) -> Any:
        """The pipeline or model, not owned; None once it is gone."""
        return self._target()

    def _new_driver(self) -> ScheduleDriver:
        begins = WeakCall(self, "_sampling_begins")
        return ScheduleDriver(self.session, self._guidance, self.target, begins)

    def _check(self) -> None:
        modules = list(self._attention_modules())
        names = [
            layer
            for name, module in modules
            for layer in layer_names(name, _class_of(_processor(module)))
        ]
        if not names:
            raise ValueError(_nothing_to_route(self.target))
        plan, model = self.session.plan, model_name(self.target)
        for warning in plan.check(names, model=model, strict=self.session.strict):
            log.warning("%s", warning)

    def _attention_modules(self) -> Iterator[tuple[LayerName, nn.Module]]:
        """Layer name and module of everything that has an attention processor."""
        found = denoisers(self.target, self._known)
        self._known.update(found)
        main = next((name for name in _MAIN if name in found), next(iter(found), ""))
        for component, model in found.items():
            for path, module in model.named_modules():
                if _processor(module) is not None and (self._only is None or path in self._only):
                    yield LayerName(path, component, component == main), module

    # ------------------------------------------------------------------ install
    def install(self) -> Patch:
        """Patch; what another patch holds of the target is taken over.

        Raises:
            AttentionRefused: the session is strict, and softmax attention that the plan quantizes
                can't be routed.  Nothing is patched then.
        """
        self._live = True
        try:
            if is_pipeline(self.target):
                self._driver.follow(_schedulers(self.target))
                self._watch_loop(self.target)
            self.refresh()
        except BaseException:
            self.remove()
            raise
        return self

    def _stand_before(self, host: Any, name: str, handler: Callable[..., Any]) -> None:
        there = vars(host).get(name) if host is not None else None
        ours = isinstance(there, HostMethod) and there.handler == handler
        if callable(getattr(host, name, None)) and not ours:
            self._methods.append(WeakLink(HostMethod(host, name, handler, host).install()))

    def _watch_loop(self, pipe: Any) -> None:
        """Notice where a pipeline's loop begins and ends, and its branches of guidance."""
        self._stand_before(pipe, "progress_bar", self._loop_begins)
        guider = pipe.components.get("guider")
        for name in ("prepare_models", "cleanup_models"):
            self._stand_before(guider, name, getattr(self._guidance, name))

    def refresh(self) -> None:
        """Patch anew what the host has changed since; done by itself when sampling begins.

        Hosts replace processors when they fuse projections, load IP-Adapters or reset to defaults.
        """
        if not self._live or self.target is None:
            return
        self.skipped.clear()
        passing: dict[type, list[str]] = {}
        for model in denoisers(self.target).values():
            self._stand_before(model, "cache_context", self._guidance.cache_context)
        for name, module in self._attention_modules():
            processor = _processor(module)
            if is_routed(processor):
                slot = processor._sage_slot
                ours = slot is not None and slot.session is self.session and slot.live
                if ours and slot.path == name:
                    continue
                processor = slot.original if ours else unroute(processor)
            if not attention_sites(type(processor)):
                cls: Any = type(processor)
                self.skipped[name] = cls.__name__
                if computes_softmax(cls) and self.session.plan.may_quantize(name):
                    passing.setdefault(cls, []).append(name)
                continue
            routed = route(processor, self.session, name)
            module.processor = routed
            self._routed.append((WeakLink(module), routed))
        self._tell_of(passing)

    def _tell_of(self, passing: Mapping[type, Sequence[str]]) -> None:
        """Softmax attention that passes us by is one warning; in a strict session an error."""
        for cls, names in passing.items():
            message = (
                f"{len(names)} attention modules ({names[0]} ..) are not quantized: "
                f"{cls.__name__} computes softmax attention by itself; {_cure(cls)}"
            )
            if self.session.strict:
                raise AttentionRefused(message)
            self.session.warn(message)

    def _sampling_begins(self) -> None:
        self.refresh()
        pipe = self._guidance.look()
        if self._live and pipe is not None and is_pipeline(pipe):
            self._watch_loop(pipe)

    def _loop_begins(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # After set_timesteps, before the first step: the last moment to notice another scheduler
        # or swapped processors (perturbed-attention guidance).
        driver = self._driver
        new = is_pipeline(self.target) and driver.follow(_schedulers(self.target))
        track = driver.tracks[-1] if new else driver.current
        if track is not None and (new or self.session.where.step < 0):
            driver.start(track)
        else:
            self._sampling_begins()
        return ends_with(original(*args, **kwargs), self.session)

    # ------------------------------------------------------------------ undo
    def remove(self) -> None:
        """Put back what the host had, or has put there since; twice is once."""
        if not self._live:
            return
        self._live = False
        self._driver.remove()
        for link in self._methods:
            if (method := link()) is not None:
                method.remove()
        for link, routed in self._routed:
            if (module := link()) is None:
                continue
            current = _processor(module)
            if is_routed(current):
                slot = current._sage_slot
                if slot is None or slot.session is self.session:
                    module.processor = unroute(current)
            # A host may have kept it and put it back later: then it must be the original.
            routed._sage_slot.live = False
        self._routed.clear()
        self._methods.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_driver"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The target is still being read, or copied: its schedulers are followed when a loop begins.
        vars(self).update(state)
        self._guidance.aim(self.target)
        self._driver = self._new_driver()

    def __repr__(self) -> str:
        state = repr(self.session) if self._live else "removed"
        return f"<Patch of {type(self.target).__name__}: {state}>"

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    # ------------------------------------------------------------------ what happened
    @property
    def schedule(self) -> tuple[float, ...]:
        """Descending sigmas, or timesteps, of the last sampling; empty before the first."""
        return self._driver.schedule

    @property
    def schedule_unit(self) -> str | None:
        """What :attr:`schedule` counts, as in :attr:`PrecisionPlan.schedule_unit`."""
        return self.session.noise.unit

    def models(self) -> list[nn.Module]:
        """The patched models, as the pipeline holds them."""
        return list(denoisers(self.target, self._known).values())

    def summary(self) -> PatchSummary:
        """Which layer ran what, and what fell back and why."""
        summary = self.session.summary()
        fields = {f.name: getattr(summary, f.name) for f in dataclasses.fields(summary)}
        return PatchSummary(**fields, skipped=dict(self.skipped))


# ---------------------------------------------------------------------- helpers
def denoisers(target: Any, known: Container[str] = ()) -> dict[str, nn.Module]:
    """The models to patch by component name, ``known`` ones included; a lone model's is ""."""
    if isinstance(target, nn.Module):
        return {"": _unwrapped(target)}
    if not is_pipeline(target):
        raise TypeError(
            f"target must be a diffusers pipeline or model, got {type(target).__name__}"
        )
    found = {}
    for name, component in target.components.items():
        model = _unwrapped(component)
        if isinstance(model, diffusers.ModelMixin) and (
            name in known or any(attention_sites(_class_of(_processor(m))) for m in model.modules())
        ):
            found[name] = model
    timed = {name: model for name, model in found.items() if _takes_time(model)}
    # Masked transformers (aMUSEd) take tokens and no time.
    return timed or {name: model for name, model in found.items() if not hasattr(model, "decode")}


#: In a processor's name -> what gives the model one back that can be routed.
_CURES = {
    "Sliced": "call pipe.disable_attention_slicing(): quantized attention needs no slices",
    "XFormers": "call pipe.disable_xformers_memory_efficient_attention()",
}


def _cure(cls: type) -> str:
    return next(
        (cure for part, cure in _CURES.items() if part in cls.__name__),
        "set a processor that calls torch.nn.functional.scaled_dot_product_attention, such as "
        "diffusers' AttnProcessor2_0",
    )


def _nothing_to_route(target: Any) -> str:
    """Why a target can't be patched at all, and what helps."""
    models = [target] if isinstance(target, nn.Module) else list(target.components.values())
    found = {
        type(_processor(module))
        for model in map(_unwrapped, models)
        if isinstance(model, diffusers.ModelMixin) and _takes_time(model)
        for module in model.modules()
    }
    odd = [cls for cls in found if computes_softmax(cls) and not attention_sites(cls)]
    message = f"{type(target).__name__} has no attention to quantize: none of its denoisers ("
    message += ", ".join(denoisers(target)) or "it has none"
    message += ") has a processor that calls scaled_dot_product_attention or diffusers' dispatcher"
    for cls in odd:
        message += f"; {cls.__name__} computes softmax attention by itself: {_cure(cls)}"
    return message


def _takes_time(model: nn.Module) -> bool:
    """Is a model told how much noise there is?  Text conditioners and decoders are not."""
    return any(map(_TIME.search, inspect.signature(type(model).forward).parameters))


def model_name(target: Any) -> str:
    """What plans call a pipeline's or model's denoisers: their classes."""
    return " + ".join(type(module).__name__ for module in denoisers(target).values())


def _unwrapped(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)  # torch.compile's wrapper


def _schedulers(pipe: Any) -> list[Any]:
    """The pipeline's schedulers that step; combined pipelines have several."""
    found: list[Any] = []
    for candidate in [getattr(pipe, "scheduler", None), *pipe.components.values()]:
        steps = hasattr(candidate, "set_timesteps") and hasattr(candidate, "step")
        if steps and not any(candidate is each for each in found):
            found.append(candidate)
    return found


def _processor(module: nn.Module) -> Any:
    """The module's attention processor, None if it has none."""
    found = vars(module).get("processor")
    return module._modules.get("processor") if found is None else found


def _class_of(processor: Any) -> type:
    """The class that a processor has or, routed, stands for."""
    return processor._sage_base if is_routed(processor) else type(processor)
