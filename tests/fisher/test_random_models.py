"""No wrong number in random networks on random and degenerate data."""

import collections

import pytest
import torch
from cases import oracle, randomise
from random_models import PARTS, data, network

from gradmask import fisher_diagonal

NETWORKS = 300
GROUP = 25


def check(seed):
    """Compare one network with single-sample autograd."""
    torch.manual_seed(seed)
    model, names = network(seed)
    randomise(model)
    batches, kind = data(seed)
    if not any(p.requires_grad for p in model.parameters()):
        return
    found, expected = fisher_diagonal(model, batches), oracle(model, batches)
    largest = max(e.max().item() for e in expected.values())
    for name, e in expected.items():
        error, scale = (found[name] - e).abs().max().item(), e.abs().max().item()
        where = f"seed {seed}, {kind}, {names}, {name}: {error:.1e} of {scale:.1e}"
        assert error <= 1e-8 * scale + 1e-25 * largest, where


@pytest.mark.parametrize("start", range(0, NETWORKS, GROUP))
def test_random_networks(start):
    for seed in range(start, start + GROUP):
        check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(NETWORKS, 6000, 500))
def test_many_random_networks(start):
    for seed in range(start, start + 500):
        check(seed)


@pytest.mark.parametrize("name", PARTS)
def test_each_part_keeps_samples_apart(name):
    """What the networks are made of is independent over samples, or the test is of no use."""
    part = randomise(PARTS[name]()).eval()
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    together, alone = part(x), torch.cat([part(x[n : n + 1]) for n in range(5)])
    assert torch.allclose(together, alone, rtol=1e-12, atol=1e-12)


def test_every_way_is_taken(ways):
    counts = collections.Counter()
    for seed in range(20):
        check(seed)
        counts.update(ways.values())
        ways.clear()
    assert set(counts) == {
        "rule", "matmul", "elementwise", "lookup", "derived", "module", "sample",
    }  # fmt: skip
