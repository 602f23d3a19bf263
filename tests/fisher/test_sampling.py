"""A seeded random part of the data, from any loader."""

import pytest
import torch
from cases import assert_close, floats, oracle, randomise
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from gradmask import fisher_diagonal
from gradmask.fisher.sampling import random_samples

TOTAL = 20
DATA = TensorDataset(torch.arange(TOTAL), torch.arange(TOTAL) % 3)


class Stream(IterableDataset):
    def __iter__(self):
        yield from (DATA[i] for i in range(TOTAL))


def plain():
    return [(DATA.tensors[0][i : i + 6], DATA.tensors[1][i : i + 6]) for i in range(0, TOTAL, 6)]


LOADERS = {
    "sequential": lambda: DataLoader(DATA, batch_size=6),
    "shuffled": lambda: DataLoader(DATA, batch_size=6, shuffle=True),
    "drop-last": lambda: DataLoader(DATA, batch_size=6, drop_last=True),
    "batch-sampler": lambda: DataLoader(DATA, batch_sampler=[range(12), range(12, 20)]),
    "stream": lambda: DataLoader(Stream(), batch_size=6),
    "list": plain,
    "generator": lambda: iter(plain()),
    "uneven": lambda: [tuple(t[a:b] for t in DATA.tensors) for a, b in [(0, 0), (0, 1), (1, 20)]],
}
EACH_LOADER = pytest.mark.parametrize("loader", LOADERS.values(), ids=list(LOADERS))


def drawn(loader, count, seed=0):
    pairs = [
        (i.item(), y.item())
        for x, t in random_samples(loader, count, seed)
        for i, y in zip(x, t, strict=True)
    ]
    assert all(y == i % 3 for i, y in pairs), "inputs and targets came apart"
    return [i for i, _ in pairs]


@EACH_LOADER
@pytest.mark.parametrize("count", [1, 5, 6, 19, 20, 50])
def test_exact_count_without_replacement(loader, count):
    found = drawn(loader(), count)
    assert len(found) == len(set(found)) == min(count, TOTAL)


@EACH_LOADER
def test_seed_decides(loader):
    torch.manual_seed(1)
    first = drawn(loader(), 8, seed=3)
    torch.manual_seed(2)
    assert drawn(loader(), 8, seed=3) == first
    assert drawn(loader(), 8, seed=4) != first


@EACH_LOADER
def test_uniform(loader):
    """Each sample is drawn in 30 % of the seeds, wherever it lies: within 5 standard deviations."""
    repeats, count = 400, 6
    counts = torch.zeros(TOTAL)
    for seed in range(repeats):
        counts[drawn(loader(), count, seed)] += 1
    share = count / TOTAL
    deviation = (share * (1 - share) / repeats) ** 0.5
    assert (counts / repeats - share).abs().max() < 5 * deviation


def test_only_drawn_samples_are_read():
    class Counted(Dataset):
        read = 0

        def __len__(self):
            return 1000

        def __getitem__(self, index):
            self.read += 1
            return torch.tensor(index), index % 3

    dataset = Counted()
    assert len(drawn(DataLoader(dataset, batch_size=4, shuffle=True), 10)) == 10
    assert dataset.read == 10


def test_batch_size_stays():
    sizes = [len(x) for x, _ in random_samples(LOADERS["shuffled"](), 14, 0)]
    assert sizes == [6, 6, 2]


def test_sampler_of_a_part_stays_in_that_part():
    loader = DataLoader(DATA, batch_size=4, sampler=SubsetRandomSampler([3, 5, 7, 11, 13]))
    assert set(drawn(loader, 50)) == {3, 5, 7, 11, 13}
    assert set(drawn(loader, 2)) < {3, 5, 7, 11, 13}
    assert drawn(loader, 2) == drawn(loader, 2)


@pytest.mark.parametrize(
    "sampler",
    [
        WeightedRandomSampler([1.0] * 3 + [0.0] * (TOTAL - 3), 9),
        RandomSampler(range(3), replacement=True, num_samples=9),
    ],
)
def test_sampler_that_repeats_samples(sampler):
    found = drawn(DataLoader(DATA, batch_size=4, sampler=sampler), 50)
    assert len(found) == 9
    assert set(found) <= {0, 1, 2}


def test_nested_batches_and_loose_values():
    batch = (
        {"x": torch.arange(5), "y": torch.arange(5) * 2, "scale": torch.tensor(3.0), "n": "a"},
    )
    ((inputs, targets),) = random_samples([(*batch, torch.arange(5))], 2, 0)
    assert len(targets) == 2
    assert torch.equal(inputs["x"], targets)
    assert torch.equal(inputs["y"], 2 * targets)
    assert inputs["scale"] == 3
    assert inputs["n"] == "a"


@pytest.mark.parametrize("form", ["loader", "list"])
def test_fisher_of_a_part(form):
    model = randomise(nn.Linear(3, 4))
    x, y = floats(3)(TOTAL), torch.randint(4, (TOTAL,))
    loader = DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True)
    loader = loader if form == "loader" else [(x[:9], y[:9]), (x[9:], y[9:])]
    found = fisher_diagonal(model, loader, max_samples=7, seed=2)
    part = list(random_samples(loader, 7, 2))
    assert_close(found, oracle(model, part))
    assert_close(fisher_diagonal(model, loader, max_samples=7, seed=2), found, 0)
    assert_close(fisher_diagonal(model, loader, max_samples=100), oracle(model, [(x, y)]))
