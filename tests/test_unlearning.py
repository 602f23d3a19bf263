"""Dampening against single backward passes, in float64."""

import pytest
import torch
import torch.nn.functional as F
from processes import run_processes
from torch import nn
from torch.distributed.fsdp import fully_shard

import gradmask
from gradmask.errors import DataError, OptionError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Linear(3, 3)).double()


def data(seed, n=8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (n,), generator=generator)
    return [(x[: n // 2], y[: n // 2]), (x[n // 2 :], y[n // 2 :])]


def squares(model, batches):
    """Mean of the squared gradients of single samples."""
    samples = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(y))]
    totals = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in samples:
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        for total, g in zip(totals, grads, strict=True):
            total += g**2 / len(samples)
    return totals


def expected(threshold, strength):
    model = network()
    ours, theirs = squares(model, data(1)), squares(model, data(2))
    weights, shares = [], []
    for p, f, r in zip(model.parameters(), ours, theirs, strict=True):
        weight = p.detach().clone()
        smaller = 0
        for j in range(weight.numel()):
            if f.view(-1)[j] > threshold * r.view(-1)[j]:
                factor = min(strength * float(r.view(-1)[j] / f.view(-1)[j]), 1.0)
                weight.view(-1)[j] *= factor
                smaller += factor < 1
        weights.append(weight)
        shares.append(smaller / weight.numel())
    return weights, shares


@pytest.mark.parametrize(("threshold", "strength"), [(1.0, 1.0), (2.0, 0.3), (0.5, 3.0), (1e6, 1)])
def test_weights_are_those_of_the_formula(threshold, strength):
    model = network()
    found = gradmask.dampen(model, data(1), data(2), threshold=threshold, strength=strength)
    weights, shares = expected(threshold, strength)
    for p, weight in zip(model.parameters(), weights, strict=True):
        assert torch.allclose(p, weight, rtol=1e-9, atol=0)
    assert list(found.values()) == pytest.approx(shares)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert all(p.grad is None for p in model.parameters())


def test_weights_without_information_stay():
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-1e3)  # dead: no gradient reaches the first layer
    before = [p.detach().clone() for p in model.parameters()]
    gradmask.dampen(model, data(1), data(2), threshold=1.0)
    for p, b in list(zip(model.parameters(), before, strict=True))[:3]:
        assert torch.equal(p, b)


def test_what_cannot_work_is_refused_and_nothing_is_changed():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    for options in ({"threshold": 0}, {"strength": -1.0}, {"threshold": float("nan")}):
        with pytest.raises(OptionError, match="positive"):
            gradmask.dampen(model, data(1), data(2), **options)
    with pytest.raises(DataError):
        gradmask.dampen(model, data(1), [])
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def check_shards(rank, world):
    whole, sharded = network(), network()
    for child in sharded:
        if isinstance(child, nn.Linear):
            fully_shard(child)
    fully_shard(sharded)
    options = {"threshold": 1.0, "strength": 0.5}
    found = gradmask.dampen(sharded, data(1)[rank::world], data(2)[rank::world], **options)
    alone = [torch.distributed.new_group([r]) for r in range(world)][rank]
    truth = gradmask.dampen(whole, data(1), data(2), group=alone, **options)
    assert found == pytest.approx(truth)
    for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(p.full_tensor(), q)


@pytest.mark.slow
def test_shards_are_dampened_as_the_whole(tmp_path):
    run_processes(check_shards, 2, tmp_path)


def test_information_that_is_not_finite_changes_nothing():
    model = nn.Linear(4, 3)
    before = [p.detach().clone() for p in model.parameters()]
    huge = [(1e25 * x.float(), y) for x, y in data(1)]
    with pytest.raises(DataError, match=r"'weight' on the data to forget.*No weight was changed"):
        gradmask.dampen(model, huge, [(x.float(), y) for x, y in data(2)])
    assert all(map(torch.equal, before, model.parameters()))
