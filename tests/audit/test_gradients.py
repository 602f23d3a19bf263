"""Gradient scores against one backward pass a sample."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import gradmask
from gradmask.audit import gradient_scores
from gradmask.errors import DataError, OptionError


def test_scores_are_those_of_single_backward_passes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(), nn.Linear(5, 3)).double()
    x, y = torch.randn(11, 4).double(), torch.tensor([0, 2, 2, 0, 2, 0, 2, 0, 0, 2, 1])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    probe = torch.randn(6, 4).double()
    found = gradient_scores(
        model, TensorDataset(x, y), y, batch_size=3, probe=probe, step=0.1,
        which=("gradient_norm", "self_influence", "gradient_agreement", "influence"),
    )  # fmt: skip
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    rows = []
    for i in range(len(y)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())]))
    g = torch.stack(rows)
    assert torch.allclose(found["gradient_norm"], g.norm(dim=1))
    assert torch.allclose(found["self_influence"], 0.5 * 0.1**2 * g.norm(dim=1) ** 4)
    for i in range(len(y)):
        others = g[(y == y[i]) & (torch.arange(len(y)) != i)]
        expected = F.cosine_similarity(g[i], others.mean(0), dim=0) if len(others) else 0.0
        assert float(found["gradient_agreement"][i]) == pytest.approx(float(expected), abs=1e-9)
    expected = gradmask.influence(model, (x, y), probe, step=0.1, fisher="exact")
    # Sampled directions: unbiased, so of the same order.
    assert 0.1 < float(found["influence"].sum() / expected.sum()) < 10


def test_what_cannot_be_scored_is_refused_by_name():
    data = TensorDataset(torch.randn(4, 2), torch.zeros(4).long())
    model = nn.Linear(2, 2)
    with pytest.raises(OptionError, match="gradient_norm"):
        gradient_scores(model, data, torch.zeros(4).long(), which=["norm"])
    with pytest.raises(OptionError, match="probe"):
        gradient_scores(model, data, torch.zeros(4).long(), which=["influence"])
    with pytest.raises(DataError, match="one for each"):
        gradient_scores(model, data, torch.zeros(3).long())
