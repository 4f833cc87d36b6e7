"""What backward passes in ComfyUI need of a model, without ComfyUI."""

import pytest
import torch
from torch import nn

from sage_diffusion.integrations.comfy.gradients import differentiable, kept_bytes


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
