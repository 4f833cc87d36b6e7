"""How users switch quantized attention on: ``apply``, ``enable`` and ``SageAttnProcessor``."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import diffusers
from torch import nn

from sage_diffusion.attend.guard import Guard
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.attend.summary import SessionSummary
from sage_diffusion.integrations.diffusers.guidance import is_pipeline
from sage_diffusion.integrations.diffusers.patch import Patch, PatchSummary
from sage_diffusion.integrations.diffusers.processors import is_routed, route
from sage_diffusion.integrations.diffusers.weak import WeakLink
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan import PrecisionPlan


def session_of(
    source: Any, backend: str = "auto", strict: bool = False, guard: Guard | None = None
) -> AttentionSession:
    """A session of whatever says what to run.

    Raises:
        ValueError: a session has its own options.
    """
    if isinstance(source, SageAttnProcessor):
        source = source.session
    if isinstance(source, AttentionSession):
        if backend != "auto" or strict or guard is not None:
            raise ValueError("a session has its own backend, strict and guard: set them there")
        return source
    return AttentionSession(source, backend=backend, strict=strict, guard=guard)


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
    return Patch(target, session_of(session)).install()


class PipeControl:
    """What :func:`enable` gives a pipeline, as ``pipe.sage``."""

    def __init__(self, pipe: Any):
        self._pipe = WeakLink(pipe)
        self.patch: Patch | None = None
        _controls.add(self)

    @property
    def pipe(self) -> Any:
        """The pipeline or model, which owns this object; None once it is gone."""
        return self._pipe()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _controls.add(self)

    def __repr__(self) -> str:
        state = "nothing is set" if self.patch is None else repr(self.patch.session)
        return f"<sage of {type(self.pipe).__name__}: {state}>"

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
            source: a spec ("int8/fp8"), a plan, the path of one, the name of one that ships with
                the package ("wan"), a session, a :class:`SageAttnProcessor`, or None to restore
                the model.
            backend: as in :func:`sage_diffusion.attention`.
            strict: raise where a call can't be quantized as planned.
            guard: drift checks; a layer that strays from exact attention is stepped up.

        Returns:
            The patch, which works as a context manager; None when restored.

        Raises:
            PlanError, ValueError, AttentionRefused: the plan or the target won't do; what was set
                before stays.
        """
        if source is None:
            self.unset_attn_processor()
            return None
        patch = Patch(self.pipe, session_of(source, backend, strict, guard))
        before = self.patch
        self.unset_attn_processor()
        try:
            self.patch = patch.install()
        except BaseException:
            if before is not None:
                self.patch = before.install()
            raise
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


def enable(
    target: Any,
    plan: Any = None,
    *,
    backend: str = "auto",
    strict: bool = False,
    guard: Guard | None = None,
) -> Any:
    """Give a pipeline or a model ``sage``, and a pipeline ``set_attn_processor``.

    Args:
        target: a pipeline or a model.  Pipelines that are made of its parts afterwards
            (``from_pipe``) have the same ``sage``.
        plan: acts at once: a spec, a plan, the name of one that ships with the package, a path, a
            session, or a :class:`SageAttnProcessor`.  With None nothing changes until
            ``set_attn_processor`` is called.
        backend, strict, guard: as in :meth:`PipeControl.set_attn_processor`.

    Returns:
        The target.

    Raises:
        TypeError: it is neither a pipeline nor a model.
        PlanError, ValueError: as :meth:`PipeControl.set_attn_processor`.
    """
    if not is_pipeline(target) and not isinstance(target, nn.Module):
        raise TypeError(f"pipe must be a diffusers pipeline or model, got {type(target).__name__}")
    control = vars(target).get("sage")
    if not isinstance(control, PipeControl):
        control = PipeControl(target)
        if plan is not None:  # what can't be patched is left as it is
            control.set_attn_processor(plan, backend=backend, strict=strict, guard=guard)
        target.sage = control
        if is_pipeline(target):
            target.set_attn_processor = control.set_attn_processor
            target.unset_attn_processor = control.unset_attn_processor
            _share()
    elif plan is not None:
        control.set_attn_processor(plan, backend=backend, strict=strict, guard=guard)
    return target


_controls: weakref.WeakSet[PipeControl] = weakref.WeakSet()


class _SharedControl:
    """``sage`` of pipelines that were made of an enabled one's parts."""

    def __get__(self, pipe: Any, owner: type) -> Any:
        if pipe is None:
            return self
        parts = {id(part) for part in pipe.components.values() if isinstance(part, nn.Module)}
        for control in list(_controls):
            patch = control.patch
            if patch is not None and any(id(model) in parts for model in patch.models()):
                return control
        raise AttributeError("sage")  # of a stranger: call enable


def _share() -> None:
    """A pipeline's own ``sage`` comes first: this is asked where it has none."""
    if "sage" not in vars(diffusers.DiffusionPipeline):
        diffusers.DiffusionPipeline.sage = _SharedControl()


# ---------------------------------------------------------------------- a marker for models
class SageAttnProcessor:
    """For a model's own method: ``unet.set_attn_processor(SageAttnProcessor("int8/fp8"))``.

    Every attention module keeps its own processor, routed to :attr:`session`; any processor that is
    set afterwards takes its place.  Without a pipeline nobody says where sampling stands: progress
    stays 0, with a warning if the plan has rules of time, unless ``session.at`` is used, or
    ``session.start`` and ``session.begin_step``.

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
        self.session = session_of(plan, backend, strict, guard)
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
    ``set_processor`` of modules understands it too, for the first marker of a program: Python looks
    a model's method up, as diffusers has it, before it makes the method's argument.
    """
    from diffusers.models import attention, attention_processor

    for module in (attention_processor.Attention, attention.AttentionModuleMixin):
        if not hasattr(module.set_processor, "_sage_original"):
            module.set_processor = _marker_aware_module(module.set_processor)
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
        before = dict(self.attn_processors)
        result = original(self, kept, *args, **kwargs)
        try:
            for session, names in sessions.values():
                Patch(self, session, frozenset(names)).install()
        except BaseException:
            original(self, before)
            raise
        return result

    set_attn_processor._sage_original = original  # type: ignore[attr-defined]
    return set_attn_processor


def _marker_aware_module(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_processor(self: Any, processor: Any) -> Any:
        called = _unaware_call() if isinstance(processor, SageAttnProcessor) else None
        if called is None:
            return original(self, processor)
        model, given = called
        mine = self.processor
        if is_routed(mine) and mine._sage_slot.session is processor.session:
            return None  # with the first of the model's modules
        if isinstance(given, dict):  # from which the call has taken this module's entry
            name = next(name for name, module in model.named_modules() if module is self)
            given = {**model.attn_processors, **given, f"{name}.processor": processor}
        return model.set_attn_processor(given)

    set_processor._sage_original = original  # type: ignore[attr-defined]
    return set_processor


def _unaware_call() -> tuple[Any, Any] | None:
    """Model and argument of a ``set_attn_processor`` that runs and knows no marker."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "set_attn_processor":
            model, given = (frame.f_locals[name] for name in frame.f_code.co_varnames[:2])
            aware = getattr(type(model), "set_attn_processor", None)
            if getattr(getattr(aware, "_sage_original", None), "__code__", None) is frame.f_code:
                return model, given
        frame = frame.f_back
    return None
