"""Load, run and compare diffusers pipelines: the same seeds in FP16 and with plans."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sage_diffusion.accuracy.compare import Generation, compare
from sage_diffusion.accuracy.report import AccuracyReport
from sage_diffusion.attend.session import AttentionSession
from sage_diffusion.json_files import JSONError, read_json
from sage_diffusion.kernels.spec import AttentionSpec
from sage_diffusion.plan import PrecisionPlan


@dataclass(frozen=True)
class PipelineRun:
    """A :data:`sage_diffusion.accuracy.compare.Run` over a diffusers pipeline.

    Attributes:
        pipe: any pipeline with a scheduler.
        seeds: one call per seed; the results count as one batch.
        arguments: of every call.
        labels: of the pictures of one call, numbers if empty.
        on_step: called after every scheduler step, e.g. by a progress bar.
    """

    pipe: Any
    seeds: Sequence[int] = (0,)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    labels: Sequence[str] = ()
    on_step: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds must hold at least one seed")
        if "generator" in self.arguments:
            raise ValueError("give seeds instead of a generator: both runs need the same noise")

    def __call__(self, session: AttentionSession) -> Generation:
        """Sample every seed with the session attached, then detach it."""
        from sage_diffusion.integrations.diffusers.control import apply

        arguments = dict(self.arguments)
        parameters = inspect.signature(self.pipe.__call__).parameters
        if "output_type" in parameters:
            # 8-bit pictures would round a small error away.
            arguments.setdefault("output_type", "np")
        images: list[Tensor] = []
        latents: list[list[Tensor]] = []
        with apply(self.pipe, session):
            for seed in self.seeds:
                with torch.random.fork_rng(), _latents_of(self.pipe, self.on_step) as steps:
                    torch.manual_seed(seed)
                    if "generator" in parameters:
                        arguments["generator"] = torch.Generator().manual_seed(seed)
                    result = self.pipe(**arguments)
                latents.append(steps)
                if arguments.get("output_type") != "latent":
                    images.append(images_of(result))
        counts = {len(steps) for steps in latents}
        if len(counts) != 1:
            raise ValueError(f"every seed must take the same number of steps, got {counts}")
        return Generation(
            torch.cat(images) if images else None,
            tuple(torch.cat(same) for same in zip(*latents, strict=True)),
            self._labels(images),
        )

    def _labels(self, images: Sequence[Tensor]) -> tuple[str, ...]:
        found = []
        for seed, batch in zip(self.seeds, images, strict=False):
            names = list(self.labels)
            if len(names) != len(batch):
                names = [f"picture {i}" for i in range(len(batch))] if len(batch) > 1 else names[:1]
            if len(self.seeds) > 1 or not names:
                names = [f"{name}, seed {seed}" for name in names] or [f"seed {seed}"]
            found += names
        return tuple(found)


def compare_pipeline(
    pipe: Any,
    plan: PrecisionPlan | AttentionSpec | str,
    *,
    seeds: Sequence[int] = (0,),
    backend: str = "auto",
    strict: bool = False,
    rows: int | None = None,
    **arguments: Any,
) -> AccuracyReport:
    """Run a pipeline in FP16 and with a plan on the same seeds, and report what the plan cost.

    Args:
        pipe: a diffusers pipeline; left as it was.
        plan: a plan, a spec, a spec's name or a path of a plan.
        seeds: one call each.
        backend, strict, rows: see :func:`sage_diffusion.accuracy.compare.compare`.
        arguments: of the pipeline's call, without a generator.
    """
    run = PipelineRun(pipe, tuple(seeds), arguments)
    return compare(run, plan, backend=backend, strict=strict, rows=rows)


@contextlib.contextmanager
def _latents_of(pipe: Any, on_step: Callable[[], None] | None) -> Iterator[list[Tensor]]:
    """Collects the latents after every scheduler step, on the CPU in float32."""
    found: list[Tensor] = []
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        yield found
        return
    had = "step" in vars(scheduler)
    original = scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        sample = result[0] if isinstance(result, tuple) else result.prev_sample
        found.append(sample.detach().float().cpu())
        if on_step is not None:
            on_step()
        return result

    # Pipelines look into the step's signature for `eta` and `generator`.
    step.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    scheduler.step = step
    try:
        yield found
    finally:
        if had:
            scheduler.step = original
        else:
            del scheduler.step


def images_of(result: Any) -> Tensor:
    """Pictures ``[N, C, H, W]`` float32 in 0 .. 1 of a pipeline's output; frames are pictures.

    Raises:
        ValueError: the output holds nothing that is a picture.
    """
    for name in ("images", "frames", "sample"):
        if hasattr(result, name):
            return _pixels(getattr(result, name))
    if isinstance(result, tuple) and result:
        return _pixels(result[0])
    raise ValueError(f"the pipeline returned no pictures but {type(result).__name__}")


def _pixels(found: Any) -> Tensor:
    if isinstance(found, Tensor):
        pixels = found.detach().float().cpu()
        return pixels.reshape(-1, *pixels.shape[-3:])
    if isinstance(found, np.ndarray):
        if found.ndim < 3 or found.dtype.kind not in "fu":
            raise ValueError(f"the pipeline returned no pictures but {found.dtype} {found.shape}")
        scale = 255.0 if found.dtype.kind == "u" else 1.0
        pixels = torch.from_numpy(found.astype(np.float32) / scale)
        return pixels.reshape(-1, *pixels.shape[-3:]).permute(0, 3, 1, 2)
    if isinstance(found, (list, tuple)) and found:
        return torch.cat([_pixels(part) for part in found])
    if hasattr(found, "convert"):  # a PIL picture
        return _pixels(np.asarray(found.convert("RGB"))[None])
    raise ValueError(f"the pipeline returned no pictures but {type(found).__name__}")


def _class_name(index: Path) -> Any:
    """Of the pipeline that a ``model_index.json`` describes; diffusers says what else is wrong."""
    try:
        found = read_json(index)
    except JSONError as error:
        raise OSError(f"{index}: {error}") from None
    return found.get("_class_name") if isinstance(found, dict) else None


def load_pipeline(name: str, *, dtype: torch.dtype | None = None, device: str | None = None) -> Any:
    """A pipeline by the name "bundled", by folder, or by its name on the Hugging Face hub.

    Args:
        name: see above.
        dtype: bfloat16 on a GPU and float32 elsewhere if None.
        device: the GPU where there is one if None.

    Raises:
        OSError: there is no such folder or hub name, or it can't be read.
    """
    from diffusers import DiffusionPipeline

    from sage_diffusion.integrations.diffusers.bundled import EmojiPipeline, dtype_argument

    gpu = torch.cuda.is_available()
    dtype = dtype or (torch.bfloat16 if gpu else torch.float32)
    if name == "bundled":
        pipe = EmojiPipeline.bundled(dtype=dtype)
    else:
        index = Path(name) / "model_index.json"
        is_ours = index.is_file() and _class_name(index) == EmojiPipeline.__name__
        if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "~", "/"))):
            raise FileNotFoundError(
                f"{name} is neither a folder of a pipeline, nor a name on the Hugging Face hub "
                "(owner/name), nor bundled"
            )
        kind = EmojiPipeline if is_ours else DiffusionPipeline
        pipe = kind.from_pretrained(name, **dtype_argument(dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device or ("cuda" if gpu else "cpu"))
