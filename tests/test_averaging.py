"""Averages of scores over the refreshes of a mask."""

import copy
import random

import pytest
import torch
from scored import data_of, gradients, network, samples, train
from torch import nn

import gradmask
from gradmask import SCORES, FisherMask
from gradmask.averaging import RunningAverage
from gradmask.errors import DataError, OptionError, StateError

MEASURED = [name for name, score in SCORES.items() if score.reads_data]


def test_the_order_of_a_file_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    names = [f"p{i}" for i in range(40)]
    parameters = {n: nn.Parameter(torch.zeros(7, dtype=torch.float64)) for n in names}
    first, second = (
        {n: torch.rand(7, generator=generator, dtype=torch.float64) ** 9 for n in names}
        for _ in range(2)
    )
    average, _ = RunningAverage(0.5).add({"square": first}, ())
    state = average.state_dict()
    _, expected = average.add({"square": second}, ())
    for order in range(20):
        keys = random.Random(order).sample(list(state["sums"]), len(names))
        other = RunningAverage(0.5)
        other.load_state_dict(state | {"sums": {k: state["sums"][k] for k in keys}}, parameters)
        _, found = other.add({"square": second}, ())
        assert all(torch.equal(found["square"][n], v) for n, v in expected["square"].items())


def test_average_is_exponential_and_corrected():
    model, beta = network(), 0.6
    mask = FisherMask(model, keep=0.2, score="fisher", average=beta, max_samples=None)
    seen = []
    for seed in range(4):
        train(model, mask)
        mask.refresh(samples(seed))
        found = {k: (g**2).mean(0) for k, g in gradients(model, samples(seed)).items()}
        size = torch.cat([f.flatten() for f in found.values()]).mean()
        seen.append({k: f / size for k, f in found.items()})
    weights = [(1 - beta) * beta ** (3 - t) / (1 - beta**4) for t in range(4)]
    expected = {k: sum(w * s[k] for w, s in zip(weights, seen, strict=True)) for k in seen[0]}
    masks = gradmask.make_masks(expected, 0.2)
    assert all(torch.equal(mask.masks[k], m) for k, m in masks.items())


def test_a_refresh_that_fails_leaves_the_average():
    model = network()
    mask = FisherMask(model, keep=0.2, average=0.5)
    mask.refresh(samples(1))
    before = copy.deepcopy(mask.state_dict())
    with torch.no_grad():
        model[3].bias.fill_(torch.nan)
    with pytest.raises(DataError):
        mask.refresh(samples(1))
    after = mask.state_dict()["averaged"]
    assert after["refreshes"] == before["averaged"]["refreshes"]
    assert set(after["refreshes"]["square"].values()) == {1}
    assert all(torch.equal(after["sums"][k], v) for k, v in before["averaged"]["sums"].items())


def test_a_parameter_thawed_later_is_averaged_from_then_on():
    model, beta = network(), 0.8
    mask = FisherMask(model, keep=0.3, average=beta, max_samples=None)
    first = {k: (g**2).mean(0) for k, g in gradients(model, samples(1)).items()}
    model[3].requires_grad_(False)
    mask.refresh(samples(1))
    model[3].requires_grad_(True)
    mask.refresh(samples(2))
    now = {k: (g**2).mean(0) for k, g in gradients(model, samples(2)).items()}
    common = [k for k in now if not k.startswith("3.")]
    size = [torch.cat([f[k].flatten() for k in common]).mean() for f in (first, now)]
    weight = (1 - beta) / (1 - beta**2)
    expected = {
        k: weight * f + (1 - weight) * first[k] * size[1] / size[0] if k in common else f
        for k, f in now.items()
    }
    masks = gradmask.make_masks(expected, 0.3)
    assert all(torch.equal(mask.masks[k], m) for k, m in masks.items())


@pytest.mark.parametrize("shape", [(2, 5), (1, 5), (5,)])
def test_what_has_another_shape_now_is_averaged_anew(shape):
    groups = ()
    average, _ = RunningAverage(0.5).add({"square": {"a": torch.ones(3, 5)}}, groups)
    measured = {"square": {"a": torch.rand(shape)}}
    after, found = average.add(measured, groups)
    assert torch.equal(found["square"]["a"], measured["square"]["a"])
    assert after.refreshes == {"square": {"a": 1}}


@pytest.mark.parametrize("sizes", [(1e-45, 1e-40, 1e-38), (1e-42, 1.0), (1.0, 1e-42), (0.0, 1.0)])
def test_averages_of_tiny_squares_are_finite(sizes):
    average = RunningAverage(0.5)
    for size in sizes:
        square = torch.tensor([0.0, 1.0, 3.0]) * size
        average, found = average.add({"square": {"a": square}, "mean": {"a": square.sqrt()}}, ())
        assert all(t["a"].isfinite().all() for t in found.values())
    assert found["square"]["a"].argmax() == 2


@pytest.mark.parametrize("count", [0, -1, 1.5, None])
def test_an_average_of_impossible_numbers_is_refused(count):
    mask = FisherMask(network(), keep=0.2, average=0.5)
    mask.refresh(samples(1))
    state = mask.state_dict()
    state["averaged"]["refreshes"]["square"]["0.weight"] = count
    with pytest.raises(StateError, match="damaged"):
        FisherMask(network(), keep=0.2, average=0.5).load_state_dict(state)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_an_average_of_impossible_squares_is_refused(value):
    mask = FisherMask(network(), keep=0.2, average=0.5)
    mask.refresh(samples(1))
    state = copy.deepcopy(mask.state_dict())
    state["averaged"]["sums"]["square/0.weight"][0] = value
    with pytest.raises(StateError, match="damaged"):
        FisherMask(network(), keep=0.2, average=0.5).load_state_dict(state)


def test_average_of_one_refresh_is_that_refresh():
    for name in MEASURED:
        loader, options = data_of(name)
        plain, averaged = (FisherMask(network(), 0.3, score=name, average=a) for a in (None, 0.9))
        for mask in (plain, averaged):
            mask.refresh(loader, **options)
        assert all(torch.equal(plain.masks[k], m) for k, m in averaged.masks.items()), name


@pytest.mark.parametrize("beta", [1.0, -0.1, "much", float("nan")])
def test_average_out_of_range(beta):
    with pytest.raises(OptionError, match="average"):
        FisherMask(network(), average=beta)
    with pytest.raises(OptionError, match="average"):
        RunningAverage(beta)
