"""Which branch of classifier-free guidance a pipeline's calls belong to.

Four sources, as hosts differ: the pipeline that is sampling (does it guide, and does it double its
batch for that), the model's ``cache_context``, a guider of modular pipelines, and the pipeline
itself, where it has an attribute ``guidance_chunks``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.plan import BRANCHES

#: In the source of a pipeline that guides with one batch, the negative prompt first.
_DOUBLED = (r"\[\s*latents\s*\]\s*\*\s*2", r"\[\s*negative_prompt_embeds,\s*prompt_embeds\b")

#: What speaks of a second branch in a pipeline's source (a `guidance_scale` may be embedded).
_GUIDED = re.compile(r"negative|uncond|cfg|classifier_free|guider")

#: What `cache_context` calls the branches, in modular pipelines by a guider's names.
_CONTEXTS = {
    "cond": "cond",
    "uncond": "uncond",
    "pred_cond": "cond",
    "pred_uncond": "uncond",
    "pred_cond_skip": "cond",
}


def is_pipeline(target: Any) -> bool:
    """Is it a pipeline?  Modular ones share no base class with the others."""
    try:
        components = getattr(target, "components", None)
    except ValueError:  # half initialized
        return False
    return isinstance(components, Mapping) and not isinstance(target, nn.Module)


class Guidance:
    """Reads the branches of the pipeline that is sampling, which need not be the patched one.

    Two pipelines often share their parts (``from_pipe``, image-to-image after text-to-image) and
    only one of them is patched; who samples stands in the call stack.

    Args:
        session: told of the branches.
        target: whose guidance counts where no pipeline is in the call stack.
    """

    def __init__(self, session: AttentionSession, target: Any = None):
        self.session = session
        self.aim(target)
        self._said: bool | None = None  # by a variable of the pipeline's call
        self._pictures = 0

    def aim(self, target: Any) -> None:
        """Set the target anew."""
        self._target: Callable[[], Any] = _nobody if target is None else weakref.ref(target)
        self._pipe = self._target

    def look(self) -> Any:
        """Find who is sampling.  Once a run: a frame that was asked keeps its variables' values.

        Returns:
            The pipeline, None if it is gone.
        """
        frame = sys._getframe(1)
        self._pipe, self._said, self._pictures = self._target, None, 0
        while frame is not None:
            if frame.f_code.co_name == "__call__":
                pipe = frame.f_locals.get("self")
                if is_pipeline(pipe):
                    self._pipe = weakref.ref(pipe)
                    self._said = frame.f_locals.get("do_classifier_free_guidance")
                    self._pictures = _batch(frame.f_locals.get("latents"))
                    break
            frame = frame.f_back  # type: ignore[assignment]
        self.ask_again()
        return self._pipe()

    def ask_again(self) -> None:
        """Let the session ask at its next call: callbacks before it may switch guidance off."""
        self.session.before_call = self._tell

    def __deepcopy__(self, memo: dict[int, Any]) -> Guidance:
        target = self._target()
        new = Guidance(copy.deepcopy(self.session, memo), memo.get(id(target), target))
        memo[id(self)] = new
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return Guidance, (self.session,)

    def _tell(self) -> None:
        pipe = self._pipe()
        branch, chunks = (None, ()) if pipe is None else branches_of(pipe, self._said)
        self.session.set_branch(branch, chunks, self._pictures)

    def cache_context(
        self, original: Callable[..., Any], name: str, *args: Any, **kwargs: Any
    ) -> contextlib.AbstractContextManager[None]:
        """The model's ``cache_context``."""
        return self._within(_CONTEXTS.get(name), original(name, *args, **kwargs))

    @contextlib.contextmanager
    def _within(self, branch: str | None, context: Any) -> Iterator[None]:
        session = self.session
        session.settle()
        before = session.where.branch
        session.set_branch(branch or before, session.where.chunks, self._pictures)
        try:
            with context:
                yield
        finally:
            session.set_branch(before, session.where.chunks, self._pictures)

    def prepare_models(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A guider is about to call the model for one of its branches."""
        result = original(*args, **kwargs)
        guider = getattr(original, "__self__", None)
        try:
            conditional = bool(guider.is_conditional)  # type: ignore[union-attr]
        except (AttributeError, NotImplementedError):
            return result
        self.session.settle()
        self.session.set_branch(BRANCHES[0] if conditional else BRANCHES[1])
        return result

    def cleanup_models(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A guider has called the model."""
        result = original(*args, **kwargs)
        self.session.set_branch(None)
        return result


def branches_of(pipe: Any, said: bool | None = None) -> tuple[str | None, tuple[str, ...]]:
    """The branch of a pipeline's calls, and the branches of their batch's equal parts.

    A pipeline may name the parts itself (``guidance_chunks``).  diffusers' own say only whether
    they guide; the order is in their source: those that double their latents put the negative
    prompt first.  Without guidance every call is conditional.

    Args:
        pipe: a pipeline in the middle of sampling.
        said: its call's variable ``do_classifier_free_guidance``, which older ones have instead of
            the property.
    """
    chunks = getattr(pipe, "guidance_chunks", None)
    if chunks is not None:
        return None, tuple(chunks)
    if "guider" in pipe.components:
        return None, ()
    guides = getattr(pipe, "do_classifier_free_guidance", None)
    if not isinstance(guides, bool):
        guides = bool(said) if said is not None else None
    kind: Any = type(pipe)
    doubles, guided = _source_of(kind)
    if guides:
        return None, BRANCHES[::-1] if doubles else ()
    return (BRANCHES[0] if guides is False or not guided else None), ()


@functools.lru_cache(maxsize=64)
def _source_of(cls: type) -> tuple[bool, bool]:
    """Does a pipeline's call double its batch, and does it know guidance at all?"""
    try:
        source = inspect.getsource(inspect.unwrap(cls.__call__))
    except (AttributeError, OSError, TypeError):
        return False, True
    return all(re.search(pattern, source) for pattern in _DOUBLED), bool(_GUIDED.search(source))


def _nobody() -> None:
    return None


def _batch(latents: Any) -> int:
    """Pictures or videos in a pipeline's latents, 0 if that can't be said."""
    return len(latents) if isinstance(latents, Tensor) and latents.ndim > 1 else 0
