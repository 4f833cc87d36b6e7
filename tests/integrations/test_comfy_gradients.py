"""What backward passes in ComfyUI need of a model, without ComfyUI."""

import sys
import types
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sage_diffusion.integrations.comfy.accuracy import KSampling
from sage_diffusion.integrations.comfy.gradients import Replay, differentiable, kept_bytes


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8))


def test_weights_of_inference_mode_take_part_and_come_back():
    with torch.inference_mode():
        model = network()
        model.register_buffer("scale", torch.full((8,), 2.0))
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        (model(x) * model.scale).sum().backward()
    with differentiable(model):
        assert model[0].weight.data_ptr() == before["0.weight"].data_ptr()  # nothing is copied
        assert not model[0].weight.requires_grad and model[0].bias.requires_grad
        (model(x) * model.scale).sum().backward()
        apart = model(torch.ones(2, 8))  # of what no gradient leads to, as a prompt's layers
        assert apart.requires_grad
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)

    ordinary = network()
    wanted = torch.randn(2, 8).copy_(x.detach()).requires_grad_()
    (ordinary(wanted) * 2).sum().backward()
    assert torch.allclose(x.grad, wanted.grad)


def test_a_model_that_moved_meanwhile_is_left_where_it_is():
    with torch.inference_mode():
        model = network()
    with differentiable(model):
        with torch.no_grad():
            model[0].weight.data = model[0].weight.data.clone()
        moved = model[0].weight
    assert model[0].weight is moved
    assert model[3].weight.is_inference()


def test_what_asked_for_a_gradient_before_still_does():
    model = network()
    model[0].bias.requires_grad_(False)
    with differentiable(model):
        assert model[0].bias.requires_grad
    assert not model[0].bias.requires_grad
    assert all(p.requires_grad for name, p in model.named_parameters() if name != "0.bias")


def test_bytes_of_a_graph_are_counted_without_weights_and_without_keeping_it():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).requires_grad_(False)
    x = torch.randn(32, 8)
    assert kept_bytes(model, x, model) == 32 * 16 * 4  # tanh's output; weights are not counted

    def twice(x):
        y = model[0](x)
        y = y.exp()  # kept
        return y.sin() + y.cos()  # the same, kept once

    assert kept_bytes(twice, x, model) == 32 * 16 * 4

    def written(x):
        y = model[0](x).clone()
        z = y.sin()
        y += 1  # what sin() kept is copied before
        return z + y.sin()

    assert kept_bytes(written, x, model) == 2 * 32 * 16 * 4


class Nested:
    """ComfyUI's latent of a video with sound."""

    is_nested = True

    def __init__(self, *tensors):
        self.tensors = tensors

    def __getitem__(self, index):
        return Nested(*(x[index] for x in self.tensors))

    def unbind(self):
        return list(self.tensors)


@pytest.fixture
def comfy(monkeypatch):
    """What a replay takes of ComfyUI, which samples such a latent in one row."""

    def row(latent):
        return torch.cat([x.flatten(1) for x in latent.unbind()], 1)

    def sample_custom(model, noise, cfg, sampler, sigmas, *_, callback, **options):
        def packed(step, total):
            callback(step, noise, noise, total)

        return sampler.sampler_function(model.guided, row(noise), sigmas, callback=packed)

    parts = {
        "sample": {
            "fix_empty_latent_channels": lambda model, latent: latent,
            "prepare_noise": lambda latent, seed, index: latent,
            "sample_custom": sample_custom,
        },
        "samplers": {
            "KSampler": lambda *_: SimpleNamespace(sigmas=torch.tensor([1.0, 0.0])),
            "sampler_object": lambda name: SimpleNamespace(sampler_function=euler),
        },
        "model_management": {"get_free_memory": lambda device: 2**30},
    }
    package = types.ModuleType("comfy")
    monkeypatch.setitem(sys.modules, "comfy", package)
    for name, functions in parts.items():
        module = types.ModuleType(f"comfy.{name}")
        vars(module).update(functions)
        setattr(package, name, module)
        monkeypatch.setitem(sys.modules, f"comfy.{name}", module)


def euler(guided, x, sigmas, extra_args=None, callback=None):
    x = x + guided(x) * float(sigmas[1] - sigmas[0])
    callback(0, 1)
    return x


def test_a_video_with_sound_is_differentiated_and_its_video_shown(comfy):
    net = nn.Linear(20, 20)
    replay, shown, found = Replay(), [], []

    class Executor:
        class_obj = net

        def __call__(self, x):
            return net(x)

    model = SimpleNamespace(model=net, load_device="cpu", model_options={})
    model.guided = lambda x: replay.wrapper(Executor(), x)
    latent = Nested(torch.ones(2, 3, 4), torch.zeros(2, 8))
    sampling = KSampling([], [], {"samples": latent}, 1, 1, 1.0, "euler", "simple")
    sampling.on_step = lambda step, denoised, steps: shown.append((step, denoised.shape, steps))

    def use(final, calls):
        (call,) = calls
        found.extend(torch.autograd.grad(final.sum(), call.output))
        assert torch.equal(call.again(call.input), call.output)

    replay.run(model, sampling, use)
    assert torch.equal(found[0], torch.full((1, 20), -1.0))
    assert shown == [(0, (1, 3, 4), 2), (1, (1, 3, 4), 2)]  # there and back
