"""A run that measures draws the same data as one that does not."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from gradmask import InfluenceMonitor, fisher_diagonal


class Augmented(Dataset):
    """Samples with noise from everybody's random states."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        noise = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
        return torch.tensor([float(i), *noise]), i % 2


class Noisy(Augmented):
    """Samples with noise from generators of its own."""

    def __init__(self):
        self.drawn = generator()
        self.numpy = np.random.default_rng(1)

    def __getitem__(self, i):
        noise = [float(torch.rand((), generator=self.drawn)), self.numpy.random(), 0.0]
        return torch.tensor([float(i), *noise]), i % 2


class Collate:
    """Batches with noise from a generator of its own, and a count."""

    def __init__(self):
        self.drawn, self.count = generator(), 0

    def __call__(self, samples):
        self.count += 1
        inputs, targets = default_collate(samples)
        return inputs + self.count * torch.rand(inputs.shape, generator=self.drawn), targets


class Counting(Sampler):
    """Shuffles anew each time by what it has counted, and by generators of its own."""

    def __init__(self):
        self.epoch = 0
        self.python, self.numpy = random.Random(0), np.random.default_rng(0)

    def __len__(self):
        return 12

    def __iter__(self):
        self.epoch += 1
        order = [(i + self.epoch) % 12 for i in range(12)]
        self.python.shuffle(order)
        yield from self.numpy.permutation(order).tolist()


def generator():
    return torch.Generator().manual_seed(3)


LOADERS = {
    "shuffled": lambda: DataLoader(Augmented(), 5, shuffle=True, generator=generator()),
    "global": lambda: DataLoader(Augmented(), 5, shuffle=True),
    "batch sampler": lambda: DataLoader(
        Augmented(),
        batch_sampler=BatchSampler(RandomSampler(range(12), generator=generator()), 5, False),
    ),
    "own noise": lambda: DataLoader(Subset(Noisy(), range(12)), 5),
    "collating": lambda: DataLoader(Augmented(), 5, collate_fn=Collate()),
    "counting": lambda: DataLoader(Augmented(), 5, sampler=Counting()),
}


def drawn(loader, measure):
    """Everything that two epochs draw, with passes before, in and between them."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    found = []
    for _ in range(2):
        measure(loader)
        for inputs, targets in loader:
            found.append(torch.cat([inputs, targets[:, None]], 1))
            measure(loader)
    return torch.cat(found)


MEASURES = {
    "all": lambda model, loader: fisher_diagonal(model, loader),
    "some": lambda model, loader: fisher_diagonal(model, loader, max_samples=4),
    "monitor": lambda model, loader: InfluenceMonitor(model, loader, sources=2, probe=3),
}


@pytest.mark.parametrize("measures", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_training_draws_the_same(make, measures):
    model = nn.Linear(4, 2)

    def measure(loader):
        measures(model, loader)

    assert torch.equal(drawn(make(), measure), drawn(make(), lambda loader: None))


@pytest.mark.slow
def test_workers_that_stay():
    data = TensorDataset(torch.randn(12, 4), torch.arange(12) % 2)
    loader = DataLoader(data, 3, num_workers=1, persistent_workers=True)
    model = nn.Linear(4, 2)
    for _ in range(2):
        found = []
        for _, targets in loader:
            found.append(targets)
            fisher_diagonal(model, loader)
        assert torch.equal(torch.cat(found), data.tensors[1])
    assert loader._iterator is not None


def test_a_loader_of_batches_reads_only_what_is_drawn():
    read = []

    class Noting(Augmented):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    batches = BatchSampler(SubsetRandomSampler(range(2, 12)), 5, False)
    fisher_diagonal(nn.Linear(4, 2), DataLoader(Noting(), batch_sampler=batches), max_samples=3)
    assert len(read) == 3
    assert min(read) >= 2
