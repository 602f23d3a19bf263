"""A default device of the user's, which nothing of ours may follow: `meta` shows what would."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradmask import FisherMask, InfluenceMonitor, fisher_diagonal, influence


@pytest.fixture
def elsewhere():
    """Everything made without a device is on `meta`, where it has no numbers."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    return nn.Sequential(*layers).double()


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * 4, 2, 6, 6, generator=generator, dtype=torch.float64, device="cpu")
    y = torch.randint(3, (count * 4,), generator=generator, device="cpu")
    return list(zip(x.split(4), y.split(4), strict=True))


def measured():
    with torch.device("cpu"):
        model, data = network(), batches()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = [fisher_diagonal(model, data, kind=kind) for kind in ("empirical", "sampled", "exact")]
    mask = FisherMask(model, keep=0.3, scope="update", max_samples=6).attach(optimizer)
    mask.refresh(data)
    with mask.collect():
        F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    mask.clip_grad_norm_(0.1)
    optimizer.step()
    mask.refresh()
    values = influence(model, data[0], data[1][0])
    monitor = InfluenceMonitor(model, data, every=1, sources=4, probe=4)
    return found, mask.masks, values, vars(monitor).keys(), dict(model.named_parameters())


def test_everything_is_as_without_it(elsewhere):
    found = measured()
    torch.set_default_device(None)
    expected = measured()
    torch.testing.assert_close(found[:3], expected[:3], rtol=0, atol=0)
    torch.testing.assert_close(found[4], expected[4], rtol=0, atol=0)
