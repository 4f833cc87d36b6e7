"""The bundled model: a small class-conditional diffusion transformer that draws emoji.

    pipe = EmojiPipeline.bundled()
    pipe(["cat-face", "drink"], seed=0).images

An ordinary diffusers pipeline, in pixel space: a ``DiTTransformer2DModel`` trained as a rectified
flow and a ``FlowMatchEulerDiscreteScheduler``.  How it was trained and what it can't do is in
``sage_diffusion/assets/emoji_dit/README.md``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

#: Where the weights lie.
ASSETS = Path(__file__).resolve().parents[2] / "assets" / "emoji_dit"

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def dtype_argument(dtype: torch.dtype) -> dict[str, Any]:
    """The keyword of ``from_pretrained`` that this diffusers wants; 0.42 renamed it."""
    major, minor = (int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (0, 42) else "torch_dtype": dtype}


class EmojiPipeline(DiffusionPipeline):
    """Draws pictures of a class by integrating a rectified flow.

    Args:
        transformer: predicts ``noise - image`` at ``(1 - t) * image + t * noise``; its
            ``num_embeds_ada_norm`` is the number of classes, one more embedding is "no class".
        scheduler: any flow-matching scheduler with ``set_timesteps(sigmas=...)``.
        classes: names of the classes, numbers if None.
    """

    transformer: DiTTransformer2DModel
    scheduler: FlowMatchEulerDiscreteScheduler
    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        classes: Sequence[str] | None = None,
    ):
        super().__init__()
        count = transformer.config.num_embeds_ada_norm
        names = list(classes) if classes is not None else [str(i) for i in range(count)]
        if len(names) != count:
            raise ValueError(f"classes must hold {count} names, got {len(names)}")
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(classes=names)
        self.processor = VaeImageProcessor(vae_scale_factor=1)
        self._guides = False

    @classmethod
    def bundled(cls, folder: str | Path = ASSETS, dtype: torch.dtype = torch.float32) -> Any:
        """The model that this package carries, or one saved by its training script.

        Raises:
            FileNotFoundError: the folder holds no such model.
        """
        folder = Path(folder)
        names = folder / "classes.json"
        if not names.is_file() or not (folder / "transformer" / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} must hold transformer/, scheduler/ and classes.json: "
                "this installation lacks the bundled model"
            )
        # FP16 on disk only: CPUs compute half types slowly, and the exact run should be exact.
        transformer = DiTTransformer2DModel.from_pretrained(
            folder / "transformer", **dtype_argument(dtype)
        )
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        return cls(transformer.eval(), scheduler, json.loads(names.read_text(encoding="utf-8")))

    @property
    def guidance_chunks(self) -> tuple[str, ...]:
        """The branches of guidance in the order of their parts of a batch, of the present call."""
        return ("cond", "uncond") if self._guides else ()

    @property
    def classes(self) -> list[str]:
        """Names that ``class_labels`` may hold."""
        return list(self.config.classes)

    def class_index(self, label: int | str) -> int:
        """Index of a class given by name or index.

        Raises:
            ValueError: no such class.
        """
        names = self.config.classes
        if isinstance(label, str) and label in names:
            return names.index(label)
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
            return label
        known = ", ".join(names)
        raise ValueError(
            f"a class label must be one of {known}, or 0 .. {len(names) - 1}, got {label!r}"
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str,
        num_inference_steps: int = 20,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one picture per label.

        Args:
            class_labels: names or indices.
            num_inference_steps: Euler steps.
            guidance_scale: of classifier-free guidance (2207.12598), both halves in one batch; 1
                is none.
            generator: of the noise, one for all or one per picture.
            seed: instead of a generator: picture i gets the noise of ``seed + i``, whatever else
                is in the batch.
            latents: the noise itself, ``[N, 3, H, W]``.
            output_type: ``"pil"``, ``"np"`` (``[N, H, W, 3]`` in 0 .. 1), ``"pt"`` (``[N, 3, H,
                W]`` in 0 .. 1) or ``"latent"`` (the same in -1 .. 1, not clamped).
            return_dict: False returns a tuple.
            callback_on_step_end: ``callback(pipe, step, timestep, {"latents": latents})`` after
                every step; may return ``{"latents": other}``.

        Raises:
            ValueError: a label, a number of steps or an output type that doesn't exist.
        """
        if isinstance(class_labels, (int, str)):
            class_labels = [class_labels]
        indices = [self.class_index(label) for label in class_labels]
        if not indices:
            raise ValueError("class_labels must name at least one class")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        if output_type not in _OUTPUT_TYPES:
            raise ValueError(
                f"output_type must be one of {', '.join(_OUTPUT_TYPES)}, got {output_type!r}"
            )
        if seed is not None:
            if generator is not None:
                raise ValueError("give a generator or a seed, not both")
            generator = [torch.Generator().manual_seed(seed + i) for i in range(len(indices))]
        device, dtype = self._execution_device, self.transformer.dtype
        if latents is None:
            side = self.transformer.config.sample_size
            shape = (len(indices), self.transformer.config.in_channels, side, side)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        else:
            latents = latents.to(device, dtype)
        labels = torch.tensor(indices, device=device)
        self._guides = guidance_scale != 1
        if self._guides:
            nothing = torch.full_like(labels, self.transformer.config.num_embeds_ada_norm)
            labels = torch.cat([labels, nothing])
        # Equal steps from pure noise to the picture.  The scheduler's own choice ends at 1 / 1000,
        # which wastes the last step.
        sigmas = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        with self.progress_bar(total=num_inference_steps) as bar:
            for step, timestep in enumerate(self.scheduler.timesteps):
                velocity = self._velocity(latents, timestep, labels, guidance_scale)
                latents = self.scheduler.step(velocity, timestep, latents).prev_sample
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, step, timestep, {"latents": latents})
                    latents = (changed or {}).get("latents", latents)
                bar.update()
        images: Any = latents
        if output_type != "latent":
            images = self.processor.postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _velocity(
        self, latents: Tensor, timestep: Tensor, labels: Tensor, guidance_scale: float
    ) -> Tensor:
        """The guided prediction, ``[N, 3, H, W]``; ``labels`` hold N or 2 N classes."""
        copies = len(labels) // len(latents)
        times = timestep.to(latents.dtype).expand(len(labels))
        found = self.transformer(
            torch.cat([latents] * copies), timestep=times, class_labels=labels
        ).sample
        if copies == 1:
            return found
        with_class, without = found.chunk(2)
        return without + guidance_scale * (with_class - without)
