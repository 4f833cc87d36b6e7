"""Tests inside a real ComfyUI: `tests/comfy/run.sh` installs one and calls them with its Python.

Elsewhere this folder is not collected, and the report's header says so.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))

import tiny_models  # noqa: E402

#: family -> (width, tokens, width of the pooled vector, shape of the latent)
SHAPES = {
    "sd3": (4096, 77, 2048, (1, 16, 8, 8)),
    "flux": (4096, 32, 768, (1, 16, 8, 8)),
    "wan": (4096, 32, 0, (1, 16, 3, 8, 8)),
    "hyvid": (4096, 32, 768, (1, 16, 3, 8, 8)),
    "sd15": (768, 77, 0, (1, 4, 8, 8)),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--comfy", type=Path, default=None, help="folder of a ComfyUI")
    parser.addoption("--sampling-runs", type=int, default=60, help="of test_many_runs.py")
    parser.addoption("--models", type=Path, default=ROOT / ".cache" / "comfy-models")


def pytest_configure(config: pytest.Config) -> None:
    comfy = config.getoption("--comfy", default=None)
    if comfy is not None:
        tiny_models.start_comfy(Path(comfy).resolve())
        load_pack()


def pytest_report_header(config: pytest.Config) -> str:
    comfy = config.getoption("--comfy", default=None)
    return f"ComfyUI: {comfy or 'not tested here, see tests/comfy/run.sh'}"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.name.startswith("test_") and config.getoption("--comfy") is None:
        return True
    return None


def load_pack() -> Any:
    """The pack as ComfyUI loads it: its folder's `__init__.py` under a made-up module name."""
    name = str(ROOT).replace(".", "_x_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@dataclass
class Family:
    """A tiny model, and everything that its sampler wants, always the same."""

    name: str
    model: Any
    positive: Any
    negative: Any
    latent: torch.Tensor
    noise: torch.Tensor

    @torch.no_grad()  # ComfyUI runs its nodes without gradients, and not every sampler says so
    def sample(self, model: Any = None, *, steps: int = 3, cfg: float | None = None, **more: Any):
        """The latent after sampling."""
        import comfy.sample

        if cfg is None:
            cfg = 1.0 if self.name == "flux" else 4.0
        return comfy.sample.sample(
            self.model if model is None else model,
            self.noise,
            steps,
            cfg,
            more.pop("sampler", "euler"),
            more.pop("scheduler", "simple"),
            self.positive,
            self.negative,
            self.latent,
            disable_pbar=True,
            seed=1,
            **more,
        )


@pytest.fixture(scope="session")
def families(request: pytest.FixtureRequest) -> Any:
    """Family by name, loaded once through ComfyUI's own loader."""
    import comfy.sd

    loaded: dict[str, Family] = {}

    def get(name: str) -> Family:
        if name not in loaded:
            path = tiny_models.write(request.config.getoption("--models"), name)
            width, tokens, pooled, shape = SHAPES[name]
            generator = torch.Generator().manual_seed(1)

            def conditioning() -> list[Any]:
                more = {}
                if pooled:
                    more["pooled_output"] = torch.randn(1, pooled, generator=generator)
                return [[torch.randn(1, tokens, width, generator=generator), more]]

            loaded[name] = Family(
                name,
                comfy.sd.load_diffusion_model(str(path)),
                conditioning(),
                conditioning(),
                torch.zeros(shape),
                torch.randn(shape, generator=generator),
            )
        return loaded[name]

    return get


@pytest.fixture(params=sorted(SHAPES))
def family(request: pytest.FixtureRequest, families: Any) -> Family:
    """Each family in turn."""
    return families(request.param)
