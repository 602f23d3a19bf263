"""What measuring influence leaves as it was, and what it refuses."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, Net
from influence_cases import (
    WAYS,
    mlp,
)
from states import Failure, build, state
from torch import nn

from gradmask import influence
from gradmask.errors import DataError, ModelError, OptionError
from gradmask.influence import forms, steps

pytestmark = pytest.mark.usefixtures("repeatable")


def small_data(options):
    inputs, targets = torch.randn(3, 2, 4).double(), torch.tensor([0, 1, 3])
    probe, labels = torch.randn(2, 2, 4).double(), torch.tensor([2, 1])
    return (inputs, targets), (probe, labels) if options.get("fisher") == "empirical" else probe


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("batched", [False, True])
def test_nothing_changes(options, batched, monkeypatch):
    monkeypatch.setattr(steps, "ONE_BY_ONE", () if batched else ("cpu",))
    torch.backends.mha.set_fastpath_enabled(True)
    model, data = build(), small_data(options)
    before = state(model)
    influence(model, *data, **options)
    assert state(model) == before
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("at", range(0, 14, 2))
def test_nothing_changes_after_a_failure(options, at):
    """The model fails in its k-th forward pass: in probing, in gradients, in steps."""
    model, data, calls = build(), small_data(options), itertools.count()
    forward = model.function

    def failing(m, x):
        h = forward(m, x)
        if next(calls) == at:
            raise Failure
        return h

    model.function = failing
    before = state(model)
    try:
        influence(model, *data, **options)
    except Failure:
        assert next(calls) > at
    else:
        assert next(calls) <= at  # it was over before
    assert state(model) == before


X, Y = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (((X, Y), X), {"method": "quadratc"}, OptionError, "Did you mean 'quadratic'"),
        (((X, Y), X), {"fisher": "sample"}, OptionError, "Did you mean 'sampled'"),
        (((X, Y), (X, Y)), {}, DataError, "2 parts of the probe .* fisher='empirical'"),
        (((X, Y), X), {"loss": "bernouli"}, OptionError, "Did you mean 'bernoulli'"),
        (((X, Y), X), {"step": 0.0}, OptionError, "step=0.0"),
        (((X, Y), X), {"step": math.nan}, OptionError, "step=nan"),
        (((X, Y), X), {"memory": 0}, OptionError, "memory=0"),
        (((X, Y), X), {"method": "diagonal", "pairwise": True}, OptionError, "pairwise=False"),
        (((X, Y), X), {"method": "kl", "fisher": "sampled"}, OptionError, "no Fisher information"),
        (((X, Y), X), {"loss": F.cross_entropy}, OptionError, "callable loss"),
        (((X, Y), X), {"loss": F.cross_entropy, "method": "kl"}, OptionError, "callable loss"),
        (((X[:0], Y[:0]), X), {}, DataError, "sources set has no samples"),
        (((X, Y), X[:0]), {}, DataError, "probe set has no samples"),
        (((X, Y), (X[:0], Y[:0])), {"fisher": "empirical"}, DataError, "probe set has no samples"),
        ((X, X), {}, DataError, r"expected one pair \(inputs, targets\)"),
        (((X, Y), X), {"fisher": "empirical"}, DataError, r"expected one pair \(inputs, targets\)"),
        (((X, Y[:3]), X), {}, DataError, "same number of samples"),
        (((X, Y + 1), X), {}, DataError, "expected 0 to 3"),
        (((X, Y), (X, Y - 1)), {"fisher": "empirical"}, DataError, "expected 0 to 3"),
        (((X, Y[:, None]), X), {}, DataError, "do not fit"),
        (((X, 2 * torch.ones(4, 4)), X), {"loss": "bernoulli"}, DataError, "expects 0 to 1"),
        (((X, Y), X), {"loss": "bernoulli"}, DataError, "logits of the targets' shape"),
        (((X / 0, Y), X), {}, DataError, "loss of a batch is nan"),
        (((X, Y), X / 0), {}, DataError, "probe samples contain NaN"),
        (((X, Y), X / 0), {"method": "kl"}, DataError, "probe samples contain NaN"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        influence(mlp(), *arguments, **options)


def test_error_of_outputs_that_are_no_logits():
    for outputs in (lambda x: (x, x), lambda x: x[:, 0], lambda x: {"scores": x}):
        model = Net(lambda m, x, outputs=outputs: outputs(m.net(x)), net=mlp())
        with pytest.raises(DataError, match="logits"):
            influence(model, (X, Y), X)


def test_error_without_parameters():
    with pytest.raises(ModelError, match="no trainable parameters"):
        influence(mlp().requires_grad_(False), (X, Y), X)


def test_errors_come_before_long_work(monkeypatch):
    """A bad last sample is told before any gradient is formed."""
    monkeypatch.setattr(steps, "captured", None)
    monkeypatch.setattr(forms, "captured", None)
    bad = X.clone()
    bad[-1] = math.nan
    labels = Y.clone()
    labels[-1] = CLASSES
    for method in ("kl", "quadratic"):
        for sources, probe in (((bad, Y), X), ((X, labels), X), ((X, Y), bad)):
            with pytest.raises(DataError):
                influence(mlp(), sources, probe, method=method, memory=1)


def test_batch_statistics_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ModelError, match="batch statistics"):
        influence(model, (X, Y), X)
