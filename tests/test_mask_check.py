"""`FisherMask.check`: what would fail at a refresh fails at once, and nothing else happens."""

import logging
import random

import numpy
import pytest
import torch
from processes import run_processes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradmask import FisherMask
from gradmask.errors import DataError, DistributedError, ModelError

pytestmark = pytest.mark.usefixtures("repeatable")


class Counting(TensorDataset):
    """Counts what is read, and draws at random."""

    read = 0

    def __getitem__(self, i):
        self.read += 1
        inputs, label = super().__getitem__(i)
        noise = random.random() + numpy.random.rand() + torch.rand(())  # noqa: NPY002
        return inputs + noise, label


def data(labels=3):
    generator = torch.Generator().manual_seed(0)
    return Counting(torch.randn(40, 6, generator=generator), torch.arange(40) % 3 + labels - 3)


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))


def state_of(net, loader):
    drawn = torch.get_rng_state(), loader.generator.get_state()
    numbers = random.getstate(), str(numpy.random.get_state())  # noqa: NPY002
    weights = [t.clone() for t in net.state_dict().values()]
    return numbers, net.training, [p.grad for p in net.parameters()], (*drawn, *weights)


@pytest.mark.parametrize("strategy", ["fisher", "inverse", "random_matched"])
def test_it_changes_nothing(strategy):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    mask = FisherMask(net, 0.3, strategy=strategy).attach(optimizer)
    loader = DataLoader(data(), 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    before = state_of(net, loader)
    mask.check(loader)
    after = state_of(net, loader)
    assert before[:-1] == after[:-1]
    assert all(torch.equal(a, b) for a, b in zip(before[-1], after[-1], strict=True))
    assert loader.dataset.read == 2
    assert (mask.refreshes, mask.masks) == (0, {})
    mask.refresh(loader)
    masks = mask.masks
    mask.check(loader)
    assert mask.masks is masks
    assert mask.refreshes == 1


def test_misfits():
    with pytest.raises(DataError, match="3 classes"):
        FisherMask(model()).check(DataLoader(data(labels=6), 8))
    with pytest.raises(DataError, match="mse"):
        FisherMask(model(), loss="mse").check(DataLoader(data(), 8))
    net = model()
    net[1].track_running_stats, net[1].running_mean = False, None
    with pytest.raises(ModelError, match="batch statistics"):
        FisherMask(net).check(DataLoader(data(), 8))
    pairs = [{"features": x, "kinds": y} for x, y in DataLoader(data(), 8)]
    with pytest.raises(DataError, match="unpack"):
        FisherMask(model()).check(pairs)
    FisherMask(model(), unpack=lambda b: (b["features"], b["kinds"])).check(pairs)


def test_what_is_not_measured():
    wrong = DataLoader(data(labels=6), 8)
    FisherMask(model(), strategy="random").check(wrong)
    mask = FisherMask(model())
    mask.refresh(DataLoader(data(), 8))
    FisherMask.from_masks(model(), mask.masks).check(wrong)
    assert not wrong.dataset.read
    batches = iter(DataLoader(data(), 8))
    mask.check(batches)
    assert len(list(batches)) == 5


def test_few_samples_are_not_logged(caplog):
    batches = list(DataLoader(data(), 8))
    with caplog.at_level(logging.WARNING):
        FisherMask(model()).check(batches)
        assert not caplog.records
        FisherMask(model(), max_samples=2).refresh(batches)
    assert "max_samples" in caplog.text


def check_on_ranks(rank, world):
    mask = FisherMask(model(), group=torch.distributed.group.WORLD)
    mask.check(DataLoader(data(), 8))
    with pytest.raises(DataError if rank == 0 else DistributedError):
        mask.check(DataLoader(data(labels=3 if rank else 6), 8))


@pytest.mark.slow
def test_all_ranks_check(tmp_path):
    run_processes(check_on_ranks, 2, tmp_path)
