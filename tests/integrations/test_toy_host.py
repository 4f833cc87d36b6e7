"""A new host is its own file, a new node its own and two lines of ``nodes/extension.py``."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sage_diffusion import AttentionSession, PrecisionPlan, Rule
from sage_diffusion.attend.calls import Call

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------------- someone else's library
class Attention(nn.Module):
    """Hands q, k, v as ``[B, L, H, D]`` to whatever function it was given."""

    def __init__(self):
        super().__init__()
        self.to_qkv = nn.Linear(64, 192, bias=False)
        self.attend = torch_attention

    def forward(self, x):
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 2, 32)).unbind(2)
        return x + self.attend(q, k, v).flatten(2)


def torch_attention(q, k, v):
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)


class Model(nn.Sequential):
    """Two blocks, and a sampling loop that calls hooks."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(Attention(), Attention())
        self.on_step = []

    @torch.no_grad()
    def sample(self, steps=4):
        x = torch.randn(1, 70, 64, generator=torch.Generator().manual_seed(1))
        for step in range(steps):
            for hook in self.on_step:
                hook(step, steps)
            x = x - self(x) / 8
        return x


# ---------------------------------------------------------------------- the host
class ToyHost:
    """Quantizes a model's attention until :meth:`remove`."""

    def __init__(self, model, plan):
        self.model, self.session = model, AttentionSession(plan, backend="reference")
        model.on_step.append(self._step)
        self._before = [(module, module.attend) for module in model]
        for name, module in model.named_children():
            module.attend = self._attends(f"blocks.{name}")

    def _attends(self, name):
        layer = self.session.layer(name)

        def attend(q, k, v):
            call = Call(*(x.transpose(1, 2) for x in (q, k, v)))
            return layer.attend(call).transpose(1, 2)

        return attend

    def _step(self, step, steps):
        if step == 0:
            self.session.start(steps)
        self.session.begin_step(step)

    def remove(self):
        self.session.finish()
        self.model.on_step.remove(self._step)
        for module, attend in self._before:
            module.attend = attend


def test_a_host_follows_a_plan_counts_and_undoes_itself():
    model = Model()
    exact = model.sample()
    plan = PrecisionPlan("int8/fp8", [Rule("fp16", layers="blocks.1", start=0.5)])
    host = ToyHost(model, plan)
    first, second = model.sample(), model.sample()
    host.remove()
    assert torch.equal(first, second) and not torch.equal(first, exact)
    torch.testing.assert_close(first, exact, rtol=0.05, atol=0.01)
    ran = {layer.name: layer.ran for layer in host.session.summary().layers}
    quantized, native = ("int8/fp8", "reference"), ("fp16", "native")
    assert ran == {"blocks.0": {quantized: 8}, "blocks.1": {quantized: 4, native: 4}}
    assert torch.equal(model.sample(), exact)
    assert all(module.attend is torch_attention for module in model) and not model.on_step


# ---------------------------------------------------------------------- nodes
def nodes():
    """Node class -> the file that defines it."""
    for path in sorted((ROOT / "nodes").glob("*.py")):
        for found in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(found, ast.ClassDef) and "io.ComfyNode" in map(ast.unparse, found.bases):
                yield pytest.param(found.name, path, id=found.name)


def identifiers(path):
    """Names that a file imports or uses."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name | ast.alias):
            yield getattr(node, "id", None) or node.name


@pytest.mark.parametrize(("name", "home"), list(nodes()))
def test_a_node_is_named_in_two_lines_outside_its_own_file(name, home):
    code = [path for d in ("nodes", "sage_diffusion") for path in (ROOT / d).rglob("*.py")]
    named = [path.name for path in code if path != home for n in identifiers(path) if n == name]
    assert named == ["extension.py"] * 2  # its import and its place in the list


def test_comfyui_is_told_of_a_node_in_the_list(tmp_path):
    code = """
import asyncio, sys
from unittest.mock import MagicMock
comfy = [f"comfy.{name}" for name in ("model_management", "samplers", "utils")]
core = ("comfy_execution", "comfy_execution.utils")
for name in ("comfy", *comfy, *core, "folder_paths", "latent_preview", "server"):
    sys.modules[name] = MagicMock()
api = sys.modules["comfy_api"] = sys.modules["comfy_api.latest"] = MagicMock()
api.ComfyExtension, api.io.ComfyNode = type("ComfyExtension", (), {}), type("ComfyNode", (), {})
class Toy(api.io.ComfyNode): pass
from sage_diffusion.nodes import extension
before = list(extension.NODES)
extension.NODES.append(Toy)
assert asyncio.run(extension.SageExtension().get_node_list()) == [*before, Toy]
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
