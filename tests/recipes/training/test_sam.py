import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradmask.recipes.config import Comparison
from gradmask.recipes.data.images import load_images
from gradmask.recipes.training.run import train_run
from gradmask.recipes.training.sam import sam_backward


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)).double()


@pytest.fixture
def loss():
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(4, (6,))
    return lambda net: F.cross_entropy(net(x), y)


def test_gradients_at_the_worst_point_nearby(model, loss):
    """Written out with one flat vector, and the statistics of a single plain pass."""
    plain = copy.deepcopy(model)
    value = loss(plain)
    value.backward()
    flat = nn.utils.parameters_to_vector(plain.parameters())
    g = torch.cat([p.grad.flatten() for p in plain.parameters()])
    there = copy.deepcopy(model)
    nn.utils.vector_to_parameters(flat + 0.3 * g / g.norm(), there.parameters())
    expected = torch.autograd.grad(loss(there), list(there.parameters()))

    found = sam_backward(model, lambda: loss(model), lambda v: 8 * v, 0.3)
    assert found == value.detach()
    assert not found.requires_grad
    for p, e in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, 8 * e, rtol=1e-12, atol=1e-14)
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_frozen_parameters_and_a_gradient_of_zero(model, loss):
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    value = sam_backward(model, lambda: 0 * loss(model), lambda v: v, 0.05)
    assert value == 0
    assert model[0].weight.grad is None
    for p in model.parameters():
        assert p.grad is None or not p.grad.any()
    assert torch.equal(model[3].weight, before["3.weight"])


def test_an_arm_of_a_comparison(options, tmp_path):
    config = Comparison(**options, arms=("none", "sam"))
    data = load_images(config, 0)
    plain, ours, wider = (
        train_run(config, data, arm, 0, tmp_path / arm.replace(":", "-"))["epochs"]
        for arm in ("none", "sam", "sam:rho=0.5")
    )
    # The first loss is measured before the first step; the gradients differ from there on.
    assert len({rows[-1]["train_loss"] for rows in (plain, ours, wider)}) == 3
    assert ours[0]["kept"] == 1.0
    tiny = train_run(config, data, "sam:rho=1e-12", 0, tmp_path / "tiny")["epochs"]
    assert tiny[-1]["train_loss"] == pytest.approx(plain[-1]["train_loss"], rel=1e-4)
