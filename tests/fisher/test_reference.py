"""The package's own slow reference against the oracle."""

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CLASSES,
    Net,
    all_bits,
    all_labels,
    assert_close,
    batches,
    bernoulli,
    cross_entropy,
    floats,
    oracle,
    randomise,
    readout,
    stack,
    to_dtype,
    tokens,
)
from torch import nn

from gradmask.fisher.reference import add_per_sample_squares, call, zero_squares
from gradmask.parameters import trainable_parameters


def reference(model, data, **options):
    """Mean over the samples, from one batch."""
    ((inputs, targets),) = data
    model.eval()
    parameters = trainable_parameters(model)
    totals = {name: zero_squares(p) for name, p in parameters.items()}
    add_per_sample_squares(model, inputs, targets, parameters, totals, **options)
    return {name: total / len(targets) for name, total in totals.items()}


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (lambda: stack(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)), floats(6, 5)),
        (lambda: stack(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU()), floats(2, 4, 4)),
        (lambda: stack(nn.Embedding(6, 3, sparse=True), nn.Linear(3, 4)), tokens(9)),
        (lambda: Net(lambda m, x: readout(m.rnn(x)[0]), rnn=nn.LSTM(3, 2)), floats(4, 3)),
        (lambda: Net(lambda m, x: readout(m.fc(m.fc(x))), fc=nn.Linear(3, 3)), floats(3)),
    ],
    ids=["tokens", "conv", "sparse", "lstm", "twice"],
)
def test_empirical(model, inputs):
    model, data = randomise(model()), batches(inputs, (4,))
    assert_close(reference(model, data), oracle(model, data))


def test_exact_cross_entropy():
    model = randomise(Net(lambda m, x: m.fc(x).transpose(1, 2), fc=nn.Linear(3, CLASSES)))
    data = batches(floats(2, 3), (3,), positions=(2,))
    assert_close(reference(model, data, exact=True), oracle(model, data, labels=all_labels))


def test_exact_bernoulli():
    model = randomise(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)))
    data = [(floats(3)(4), torch.ones(4, 3))]
    found = reference(model, data, exact=True, loss="bernoulli")
    assert_close(found, oracle(model, data, bernoulli, all_bits))


def test_callable_and_unused_parameters():
    model = randomise(stack(nn.Linear(3, 4)))
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    data = batches(floats(3), (4,))
    found = reference(model, data, loss=F.cross_entropy)
    assert_close(found, oracle(model, data, cross_entropy))
    assert found["unused"].count_nonzero() == 0


def test_half_precision_is_squared_in_float32():
    model, data = randomise(stack(nn.Linear(3, 4)), torch.float16), batches(floats(3), (4,))
    data = to_dtype([(1e-3 * x, y) for x, y in data], torch.float16)  # squares of about 1e-8
    found = reference(model, data)
    assert {f.dtype for f in found.values()} == {torch.float32}
    assert all(f.count_nonzero() == f.numel() for f in found.values())
    expected = oracle(model.float(), to_dtype(data, torch.float32))
    assert_close(found, expected, 0.01)


def test_call_takes_a_tensor_positions_or_keywords():
    model = Net(lambda m, a, b=1: a - b)
    assert [call(model, x) for x in (3, (3, 2), [3, 2], {"b": 1, "a": 5})] == [2, 1, 1, 4]
