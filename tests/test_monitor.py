"""The monitor in a training loop: what it measures, when, and that it changes nothing."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradmask import InfluenceMonitor, influence
from gradmask.errors import DataError, ModelError, OptionError, StateError

pytestmark = pytest.mark.usefixtures("repeatable")

SIZES = {"sources": 5, "probe": 7}


@pytest.fixture
def model():
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


@pytest.fixture
def data():
    # The first column numbers the samples.
    inputs = torch.randn(40, 4, dtype=torch.float64)
    inputs[:, 0] = torch.arange(40)
    return inputs, torch.randint(3, (40,))


def parts(monitor):
    return monitor._sources, monitor._probe


@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
def test_a_record_is_the_influence_of_the_sources_on_the_probe(model, data, fisher):
    methods = ("quadratic", "diagonal", "kl")
    monitor = InfluenceMonitor(model, data, methods=methods, fisher=fisher, step=0.1, **SIZES)
    record = monitor.measure()
    sources, (inputs, targets) = parts(monitor)
    for method in methods:
        kind = "exact" if method == "kl" else fisher
        probe = (inputs, targets) if kind == "empirical" else inputs
        values = influence(model, sources, probe, step=0.1, method=method, fisher=kind).numpy()
        assert values.shape == (5,)
        assert record[f"influence/{method}/mean"] == pytest.approx(values.mean(), rel=1e-12)
        for q in (5, 25, 50, 75, 95):
            expected = np.percentile(values, q)
            assert record[f"influence/{method}/q{q:02}"] == pytest.approx(expected, rel=1e-12)
    squares = [
        torch.autograd.grad(
            F.cross_entropy(model.eval()(x[None]), y[None]), list(model.parameters())
        )
        for x, y in zip(*sources, strict=True)
    ]
    half = [0.5 * 0.1**2 * sum(g.square().sum().item() for g in found) for found in squares]
    assert record["influence/squared_norm/mean"] == pytest.approx(np.mean(half), rel=1e-12)
    assert len(record) == 2 + 4 * 6


def numbers(samples):
    return samples[0][:, 0].long().tolist()


def test_sources_and_probe_are_a_seeded_part_without_a_common_sample(model, data):
    loader = DataLoader(TensorDataset(*data), batch_size=9, shuffle=True)
    chosen = []
    for seed in (0, 0, 1):
        sources, probe = parts(InfluenceMonitor(model, loader, seed=seed, **SIZES))
        found = numbers(sources) + numbers(probe)
        assert len(set(found)) == 12
        for inputs, targets in (sources, probe):
            rows = inputs[:, 0].long()
            assert torch.equal(inputs, data[0][rows])
            assert torch.equal(targets, data[1][rows])
        chosen.append(found)
    assert chosen[0] == chosen[1] != chosen[2]
    assert sorted(chosen[0][:5]) != sorted(chosen[0])[:5]  # not the first ones of an order


def train(model, data, monitor=None):
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for batch in range(6):
        rows = slice(5 * batch, 5 * batch + 5)
        loss = F.cross_entropy(model(data[0][rows]), data[1][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if monitor is not None:
            monitor.step()


def test_training_is_the_same_with_a_monitor(model, data):
    other = copy.deepcopy(model)
    monitor = InfluenceMonitor(model, data, every=2, methods=("quadratic", "kl"), **SIZES)
    train(model, data, monitor)
    train(other, data)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert model.training
    assert [record["step"] for record in monitor.history] == [2, 4, 6]
    means = [record["influence/quadratic/mean"] for record in monitor.history]
    assert len(set(means)) == 3


class Board:
    def __init__(self):
        self.logged = []

    def add_scalar(self, tag, scalar_value, global_step):
        self.logged.append((tag, scalar_value, global_step))


def test_a_writer_gets_every_number(model, data):
    board = Board()
    monitor = InfluenceMonitor(model, data, every=3, writer=board, **SIZES)
    assert monitor.step() is None
    assert monitor.step() is None
    record = monitor.step()
    assert {tag: value for tag, value, _ in board.logged} == {
        name: value for name, value in record.items() if name.startswith("influence/")
    }
    assert {step for *_, step in board.logged} == {3}


def test_a_monitor_goes_on_where_another_was(model, data):
    ours = InfluenceMonitor(model, data, every=2, **SIZES)
    for _ in range(3):
        ours.step()
    theirs = InfluenceMonitor(model, data, every=2, **SIZES)
    theirs.load_state_dict(ours.state_dict())
    ours.step()
    theirs.step()
    skip = "seconds"
    for a, b in zip(ours.history, theirs.history, strict=True):
        assert {k: v for k, v in a.items() if k != skip} == {
            k: v for k, v in b.items() if k != skip
        }
    with pytest.raises(StateError, match="no state of an InfluenceMonitor: it is \\['mask'\\]"):
        ours.load_state_dict({"mask": 1})


def test_one_batch_of_tensors_and_many_are_the_same_data(model, data):
    whole = InfluenceMonitor(model, data, **SIZES)
    batches = list(zip(data[0].split(8), data[1].split(8), strict=True))
    split = InfluenceMonitor(model, batches, **SIZES)
    for one in (whole, split):
        sources, probe = parts(one)
        assert len(set(numbers(sources) + numbers(probe))) == 12
    assert len(whole.measure()) == len(split.measure())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, OptionError, "every=0 must be a whole number, at least 1"),
        ({"every": "epoch"}, OptionError, "every='epoch' must be a whole number"),
        ({"probe": 0}, OptionError, "probe=0 must be a whole number, at least 1"),
        ({"method": "kl"}, OptionError, "Unknown monitor option 'method'"),
        ({"pairwise": True}, OptionError, "Unknown monitor option 'pairwise'"),
        ({"writer": print}, OptionError, "has no method add_scalar"),
        ({"methods": ()}, OptionError, "methods=\\(\\) must be a tuple"),
        ({"methods": "kl"}, OptionError, "methods='kl' must be a tuple"),
        ({"methods": ("kl", "gram")}, OptionError, "Unknown method 'gram'"),
        ({"fisher": "true"}, OptionError, "Unknown fisher 'true'"),
        ({"step": -1.0}, OptionError, "step=-1.0 must be positive"),
        ({"sources": 30}, DataError, "sources=30 and probe=20 need 50 samples.*have 40"),
    ],
)
def test_what_cannot_work_is_told_before_training(model, data, options, error, message):
    with pytest.raises(error, match=message):
        InfluenceMonitor(model, data, **({"sources": 5, "probe": 20} | options))


def test_a_model_or_data_that_cannot_be_measured(data):
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    mixing = nn.Sequential(norm, nn.Linear(4, 3)).double()
    with pytest.raises(ModelError, match="batch statistics"):
        InfluenceMonitor(mixing, data, **SIZES)
    ragged = [(torch.randn(9, 4), data[1][:9]), (torch.randn(9, 5), data[1][:9])]
    with pytest.raises(DataError, match="different shapes from batch to batch"):
        InfluenceMonitor(nn.Linear(4, 3), ragged, **SIZES)


@pytest.mark.parametrize("own", [False, True])
def test_making_a_monitor_leaves_the_random_state(model, data, own):
    loader = DataLoader(TensorDataset(*data), batch_size=9, shuffle=True)
    batches = loader if own else list(loader)
    before = torch.get_rng_state()
    InfluenceMonitor(model, batches, **SIZES).measure()
    assert torch.equal(torch.get_rng_state(), before)


def test_every_label_is_checked_before_training(model, data):
    inputs, targets = data
    wrong = torch.where(targets > 1, 7, targets)
    for seed in range(4):
        with pytest.raises(DataError, match=r"Labels range from .* 3 classes"):
            InfluenceMonitor(model, (inputs, wrong), seed=seed, **SIZES)
    coin = nn.Linear(4, 1).double()
    with pytest.raises(DataError, match=r"one output.*bernoulli"):
        InfluenceMonitor(coin, (inputs, torch.zeros(40, dtype=torch.long)), **SIZES)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, y: TensorDataset(x, y), "a dataset goes into"),
        (lambda x, y: [{"inputs": x, "answers": y}], "The loader gave a dict"),
        (lambda x, y: DataLoader(x, batch_size=8), "The loader gave a Tensor"),
    ],
)
def test_data_of_a_wrong_form(model, data, wrong, message):
    with pytest.raises(DataError, match=message):
        InfluenceMonitor(model, wrong(*data), **SIZES)
