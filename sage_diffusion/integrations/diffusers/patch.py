"""One patched pipeline or model: its attention modules routed, its scheduler followed, undone."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
from torch import nn

from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.attend.summary import SessionSummary
from sage_diffusion.integrations.diffusers.processors import is_routed, layer_names, route, unroute
from sage_diffusion.integrations.diffusers.rebind import attention_sites
from sage_diffusion.integrations.diffusers.schedule import (
    BranchHook,
    HostMethod,
    ScheduleDriver,
    guidance_chunks,
)

log = logging.getLogger("sage_diffusion")

# Components that run once, outside of sampling, or decode pictures: never touched.
_NOT_DENOISERS = (
    "vae",
    "vq",
    "text_encoder",
    "image_encoder",
    "condition_encoder",
    "safety",
    "vocoder",
    "connector",
    "tokenizer",
)


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
        self.target = target
        self.session = session
        self.skipped: dict[str, str] = {}
        self._only = only
        self._known: set[str] = set()  # stay denoisers whatever processors the host gives them
        self._routed: list[tuple[nn.Module, Any]] = []
        self._methods: list[HostMethod] = []
        self._driver: ScheduleDriver | None = None
        self._live = False
        self._check()

    def _check(self) -> None:
        names = [
            layer
            for name, module in self._attention_modules()
            for layer in layer_names(name, _class_of(_processor(module)))
        ]
        if not names:
            raise ValueError(
                f"{type(self.target).__name__} has no attention to quantize: none of its denoisers "
                f"({', '.join(denoisers(self.target)) or 'it has none'}) has a processor that "
                "calls scaled_dot_product_attention or diffusers' dispatcher"
            )
        plan, model = self.session.plan, model_name(self.target)
        for warning in plan.check(names, model=model, strict=self.session.strict):
            log.warning("%s", warning)

    def _attention_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Layer name and module of everything that has an attention processor."""
        found = denoisers(self.target, self._known)
        self._known.update(found)
        for component, model in found.items():
            prefix = f"{component}." if len(found) > 1 else ""
            for path, module in model.named_modules():
                if _processor(module) is not None and (self._only is None or path in self._only):
                    yield prefix + path, module

    # ------------------------------------------------------------------ install
    def install(self) -> Patch:
        """Patch; what another patch holds of the target is taken over."""
        self._live = True
        for model in denoisers(self.target).values():
            if callable(getattr(model, "cache_context", None)):
                hook = BranchHook(self.session).cache_context
                self._methods.append(HostMethod(model, "cache_context", hook, model).install())
        if is_pipeline(self.target):
            self._follow_scheduler()
            if callable(getattr(self.target, "progress_bar", None)):
                method = HostMethod(self.target, "progress_bar", self._loop_begins, self.target)
                self._methods.append(method.install())
        self.refresh()
        return self

    def refresh(self) -> None:
        """Patch anew what the host has changed since; done by itself when sampling begins.

        Hosts replace processors when they fuse projections, load IP-Adapters or reset to defaults.
        """
        if not self._live:
            return
        self.skipped.clear()
        for name, module in self._attention_modules():
            processor = _processor(module)
            if is_routed(processor):
                slot = processor._sage_slot
                ours = slot is not None and slot.session is self.session and slot.live
                if ours and slot.path == name:
                    continue
                processor = slot.original if ours else unroute(processor)
            if not attention_sites(type(processor)):
                self.skipped[name] = type(processor).__name__
                continue
            routed = route(processor, self.session, name)
            module.processor = routed
            self._routed.append((module, routed))

    def _follow_scheduler(self) -> None:
        scheduler = _scheduler(self.target)
        if self._driver is not None:
            self._driver.remove()
        self._driver = (
            None
            if scheduler is None
            else ScheduleDriver(self.session, scheduler, self.target, self._sampling_begins)
        )

    def _sampling_begins(self) -> None:
        self.refresh()
        self.session.set_branch(None, guidance_chunks(self.target))

    def _loop_begins(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # After set_timesteps, before the first step: the last moment to notice another scheduler
        # or swapped processors (perturbed-attention guidance).
        known = None if self._driver is None else self._driver.scheduler
        if _scheduler(self.target) is not known:
            self._follow_scheduler()
            if self._driver is not None:
                self._driver.start()
        else:
            self._sampling_begins()
        return original(*args, **kwargs)

    # ------------------------------------------------------------------ undo
    def remove(self) -> None:
        """Put back what the host had, or has put there since; twice is once."""
        if not self._live:
            return
        self._live = False
        if self._driver is not None:
            self._driver.remove()
        for method in self._methods:
            method.remove()
        for module, routed in self._routed:
            current = _processor(module)
            if is_routed(current):
                slot = current._sage_slot
                if slot is None or slot.session is self.session:
                    module.processor = unroute(current)
            # A host may have kept it and put it back later: then it must be the original.
            routed._sage_slot.live = False
        self._routed.clear()
        self._methods.clear()
        self._driver = None

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    # ------------------------------------------------------------------ what happened
    @property
    def schedule(self) -> tuple[float, ...]:
        """Descending sigmas, or timesteps, of the last sampling; empty before the first."""
        return () if self._driver is None else self._driver.schedule

    def summary(self) -> PatchSummary:
        """Which layer ran what, and what fell back and why."""
        summary = self.session.summary()
        fields = {f.name: getattr(summary, f.name) for f in dataclasses.fields(summary)}
        return PatchSummary(**fields, skipped=dict(self.skipped))


def is_pipeline(target: Any) -> bool:
    """A diffusers pipeline, modular ones included, and no model."""
    # Modular pipelines share no base class with the others.
    return not isinstance(target, nn.Module) and isinstance(
        getattr(target, "components", None), Mapping
    )


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
        if not isinstance(model, diffusers.ModelMixin) or any(x in name for x in _NOT_DENOISERS):
            continue
        if name in known or any(attention_sites(_class_of(_processor(m))) for m in model.modules()):
            found[name] = model
    return found


def model_name(target: Any) -> str:
    """What plans call a pipeline's or model's denoisers: their classes."""
    return " + ".join(type(module).__name__ for module in denoisers(target).values())


def _unwrapped(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)  # torch.compile's wrapper


def _scheduler(pipe: Any) -> Any:
    """The pipeline's scheduler, None if it has none that steps."""
    candidates = [getattr(pipe, "scheduler", None), *pipe.components.values()]
    for candidate in candidates:
        if hasattr(candidate, "set_timesteps") and hasattr(candidate, "step"):
            return candidate
    return None


def _processor(module: nn.Module) -> Any:
    """The module's attention processor, None if it has none."""
    found = vars(module).get("processor")
    return module._modules.get("processor") if found is None else found


def _class_of(processor: Any) -> type:
    """The class that a processor has or, routed, stands for."""
    return processor._sage_base if is_routed(processor) else type(processor)
