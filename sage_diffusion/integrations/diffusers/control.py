"""How users switch quantized attention on: ``apply``, ``enable`` and ``SageAttnProcessor``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
from torch import nn

from sage_diffusion.attend.guard import Guard
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.attend.summary import SessionSummary
from sage_diffusion.integrations.diffusers.patch import Patch, PatchSummary, is_pipeline
from sage_diffusion.integrations.diffusers.processors import route
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan import PrecisionPlan


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
        self.pipe = pipe
        self.patch: Patch | None = None

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
