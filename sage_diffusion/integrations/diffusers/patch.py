"""diffusers: any pipeline's or model's attention through an :class:`AttentionSession`.

from sage_diffusion import enable
enable(pipe).set_attn_processor("int8/fp8")     # a spec, a plan or the path of one
image = pipe("a cat").images[0]
print(pipe.sage.summary())                      # which layer ran what
pipe.set_attn_processor(None)                   # as it was, bit for bit
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

try:
    import diffusers
except ImportError as error:
    raise ImportError(
        "sage_diffusion.integrations.diffusers needs diffusers: "
        "pip install 'sage-diffusion[diffusers]'"
    ) from error

from sage_diffusion.attend.guard import Guard
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.attend.summary import SessionSummary
from sage_diffusion.integrations.diffusers.guidance import Guidance, is_pipeline
from sage_diffusion.integrations.diffusers.processors import is_routed, layer_names, route, unroute
from sage_diffusion.integrations.diffusers.rebind import attention_sites
from sage_diffusion.integrations.diffusers.schedule import HostMethod, ScheduleDriver, ends_with
from sage_diffusion.integrations.diffusers.weak import WeakCall, WeakLink
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan import PrecisionPlan
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
        self._target = WeakLink(target)
        self.session = session
        _denoisers(target)  # is it a target at all?
        self.skipped: dict[str, str] = {}
        self._only = only
        self._known: set[str] = set()  # stay denoisers whatever processors the host gives them
        self._routed: list[tuple[WeakLink, Any]] = []
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
        names = [
            layer
            for name, module in self._attention_modules()
            for layer in layer_names(name, _class_of(_processor(module)))
        ]
        if not names:
            raise ValueError(
                f"{type(self.target).__name__} has no attention to quantize: none of its denoisers "
                f"({', '.join(_denoisers(self.target)) or 'it has none'}) has a processor that "
                "calls scaled_dot_product_attention or diffusers' dispatcher"
            )
        plan, model = self.session.plan, model_name(self.target)
        for warning in plan.check(names, model=model, strict=self.session.strict):
            log.warning("%s", warning)

    def _attention_modules(self) -> Iterator[tuple[LayerName, nn.Module]]:
        """Layer name and module of everything that has an attention processor."""
        denoisers = _denoisers(self.target, self._known)
        self._known.update(denoisers)
        main = next((name for name in _MAIN if name in denoisers), next(iter(denoisers), ""))
        for component, model in denoisers.items():
            for path, module in model.named_modules():
                if _processor(module) is not None and (self._only is None or path in self._only):
                    yield LayerName(path, component, component == main), module

    # ------------------------------------------------------------------ install
    def install(self) -> Patch:
        """Patch; what another patch holds of the target is taken over."""
        self._live = True
        if is_pipeline(self.target):
            self._driver.follow(_schedulers(self.target))
            self._watch_loop(self.target)
        self.refresh()
        return self

    def _stand_before(self, host: Any, name: str, handler: Callable[..., Any]) -> None:
        if callable(getattr(host, name, None)) and not isinstance(vars(host).get(name), HostMethod):
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
        for model in _denoisers(self.target).values():
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
                self.skipped[name] = type(processor).__name__
                continue
            routed = route(processor, self.session, name)
            module.processor = routed
            self._routed.append((WeakLink(module), routed))

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
        if track is not None and (new or self.session.step < 0):
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
        # The target is still being read: its schedulers are followed when a loop begins.
        vars(self).update(state)
        self._guidance.aim(self.target)
        self._driver = self._new_driver()

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

    def summary(self) -> PatchSummary:
        """Which layer ran what, and what fell back and why."""
        summary = self.session.summary()
        fields = {f.name: getattr(summary, f.name) for f in dataclasses.fields(summary)}
        return PatchSummary(**fields, skipped=dict(self.skipped))


def apply(target: Any, session: AttentionSession | PrecisionPlan | AttentionSpec | str) -> Patch:
    """Send the attention of a pipeline's denoisers, or of one model, through a session.

    Args:
        target: a ``DiffusionPipeline`` or ``ModelMixin``.  A pipeline's scheduler steers the
            session; a model alone leaves that to the caller (:meth:`AttentionSession.at`).
        session: a session, or what one can be made of.

    Raises:
        PlanError: the plan was made for another model.
        TypeError: the target is neither a pipeline nor a model.
        ValueError: it has no attention that can be routed.
    """
    return Patch(target, _session(session)).install()


class PipeControl:
    """What :func:`enable` gives a pipeline, as ``pipe.sage``."""

    def __init__(self, pipe: Any):
        self._pipe = WeakLink(pipe)
        self.patch: Patch | None = None

    @property
    def pipe(self) -> Any:
        """The pipeline, which owns this object; None once it is gone."""
        return self._pipe()

    @property
    def session(self) -> AttentionSession | None:
        """The session that runs the pipeline's attention, None while nothing is set."""
        return None if self.patch is None else self.patch.session

    def set_attn_processor(
        self,
        source: Any,
        *,
        backend: str = "auto",
        strict: bool = False,
        guard: Guard | None = None,
    ) -> Patch | None:
        """Quantize the pipeline's attention.

        Args:
            source: a spec ("int8/fp8"), a plan, the path of one, a session, a
                :class:`SageAttnProcessor`, or None to restore the model.
            backend: as in :func:`sage_diffusion.attention`.
            strict: raise where a call can't be quantized as planned.
            guard: drift checks; a layer that strays from exact attention is stepped up.

        Returns:
            The patch, which works as a context manager; None when restored.
        """
        if source is None:
            self.unset_attn_processor()
            return None
        patch = Patch(self.pipe, _session(source, backend, strict, guard))
        self.unset_attn_processor()
        self.patch = patch.install()
        return patch

    def unset_attn_processor(self) -> None:
        """Restore the model, bit for bit."""
        if self.patch is not None:
            self.patch.remove()
            self.patch = None

    def summary(self) -> PatchSummary:
        """Which layer ran what, and what fell back and why."""
        if self.patch is None:
            return PatchSummary(())
        return self.patch.summary()


def enable(pipe: Any) -> Any:
    """Give a pipeline ``set_attn_processor``, ``unset_attn_processor`` and ``sage``.

    Nothing changes until ``set_attn_processor`` is called.

    Returns:
        The pipeline.

    Raises:
        TypeError: it is no pipeline.
    """
    if not is_pipeline(pipe):
        raise TypeError(
            f"pipe must be a diffusers pipeline, got {type(pipe).__name__}; for a single model use "
            "sage_diffusion.integrations.diffusers.apply(model, session)"
        )
    if not isinstance(vars(pipe).get("sage"), PipeControl):
        control = PipeControl(pipe)
        pipe.sage = control
        pipe.set_attn_processor = control.set_attn_processor
        pipe.unset_attn_processor = control.unset_attn_processor
    return pipe


# ---------------------------------------------------------------------- a marker for models
class SageAttnProcessor:
    """For a model's own method: ``unet.set_attn_processor(SageAttnProcessor("int8/fp8"))``.

    Every attention module keeps its own processor, routed to :attr:`session`; any processor that is
    set afterwards takes its place.  Without a pipeline nobody says where sampling stands: progress
    stays 0 unless ``session.at``, ``session.start`` and ``session.begin_step`` are used.

    Args:
        plan: as in ``pipe.set_attn_processor``.
        backend: as in :func:`sage_diffusion.attention`.
        strict: raise where a call can't be quantized as planned.
        guard: as in ``pipe.set_attn_processor``.
    """

    def __init__(
        self,
        plan: Any,
        *,
        backend: str = "auto",
        strict: bool = False,
        guard: Guard | None = None,
    ):
        self.session = _session(plan, backend, strict, guard)
        self._direct = 0
        _accept_markers()

    def summary(self) -> SessionSummary:
        """Which layer ran what, and what fell back and why."""
        return self.session.summary()

    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """First call of a module that was given this object directly."""
        default = getattr(attn, "_default_processor_cls", None)
        if default is None:
            raise TypeError(
                f"{type(attn).__name__} names no default processor: give SageAttnProcessor to the "
                "model's set_attn_processor, or use sage_diffusion.enable(pipe)"
            )
        name = f"{type(attn).__name__}.{self._direct}"
        self._direct += 1
        routed = route(default(), self.session, name)
        attn.processor = routed
        return routed(attn, *args, **kwargs)


def _accept_markers() -> None:
    """Make ``set_attn_processor`` of every model class understand :class:`SageAttnProcessor`.

    diffusers would put the one object into each module and lose the modules' own processors.
    """
    from diffusers.models import attention

    classes: list[type] = [diffusers.ModelMixin]
    for cls in classes:
        classes += cls.__subclasses__()
    mixin = getattr(attention, "AttentionMixin", None)
    for cls in [*([mixin] if mixin is not None else []), *classes]:
        original = vars(cls).get("set_attn_processor")
        if original is not None and not hasattr(original, "_sage_original"):
            cls.set_attn_processor = _marker_aware(original)


def _marker_aware(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_attn_processor(self: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(processor, SageAttnProcessor):
            Patch(self, processor.session).install()
            return None
        if not isinstance(processor, dict):
            return original(self, processor, *args, **kwargs)
        sessions: dict[int, tuple[AttentionSession, set[str]]] = {}
        kept = dict(processor)
        for key, value in processor.items():
            if isinstance(value, SageAttnProcessor):
                kept[key] = self.attn_processors[key]
                names = sessions.setdefault(id(value), (value.session, set()))[1]
                names.add(key.removesuffix(".processor"))
        result = original(self, kept, *args, **kwargs)
        for session, names in sessions.values():
            Patch(self, session, frozenset(names)).install()
        return result

    set_attn_processor._sage_original = original  # type: ignore[attr-defined]
    return set_attn_processor


# ---------------------------------------------------------------------- helpers
def _session(
    source: Any, backend: str = "auto", strict: bool = False, guard: Guard | None = None
) -> AttentionSession:
    if isinstance(source, SageAttnProcessor):
        source = source.session
    if isinstance(source, AttentionSession):
        if backend != "auto" or strict or guard is not None:
            raise ValueError("a session has its own backend, strict and guard: set them there")
        return source
    return AttentionSession(source, backend=backend, strict=strict, guard=guard)


def _denoisers(target: Any, known: Container[str] = ()) -> dict[str, nn.Module]:
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


def _takes_time(model: nn.Module) -> bool:
    """Is a model told how much noise there is?  Text conditioners and decoders are not."""
    return any(map(_TIME.search, inspect.signature(type(model).forward).parameters))


def model_name(target: Any) -> str:
    """What plans call a pipeline's or model's denoisers: their classes."""
    return " + ".join(type(module).__name__ for module in _denoisers(target).values())


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
