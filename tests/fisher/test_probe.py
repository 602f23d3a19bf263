"""What is found out on two samples is remembered, for batches that are alike."""

import pytest
import torch
from cases import CLASSES, Net, assert_close, batches, floats, oracle, randomise, readout
from torch import nn

from gradmask import fisher_diagonal
from gradmask.fisher import batch


@pytest.fixture
def probes(monkeypatch):
    """Number of samples of the batches of which two were asked."""
    found, ask = [], batch.safe_strategies

    def counted(model, inputs, *args, **options):
        found.append(len(inputs))
        return ask(model, inputs, *args, **options)

    monkeypatch.setattr(batch, "safe_strategies", counted)
    return found


def measured(model, sizes, width=4, **options):
    data = batches(floats(width, 3), sizes)
    assert_close(fisher_diagonal(model, data, **options), oracle(model, data))


def network():
    return randomise(
        Net(
            lambda m, x: readout((m.fc(x) * m.scale).tanh() @ m.p),
            fc=nn.Linear(3, 3),
            scale=nn.Parameter(torch.randn(3)),
            p=nn.Parameter(torch.randn(3, 3)),
        )
    )


def test_a_second_pass_asks_no_two_samples(probes):
    model = network()
    for sizes in [(3, 5), (3,), (3, 2, 7)]:
        measured(model, sizes)
    assert probes == [3]
    measured(network(), (3,))  # another model
    assert probes == [3, 3]


@pytest.mark.parametrize(("sizes", "width"), [((5,), 4), ((3,), 3), ((3,), 5)])
def test_batches_of_another_form_ask_again(sizes, width, probes):
    """As many positions as samples, for example."""
    model = network()
    measured(model, (3,))
    measured(model, sizes, width)
    assert probes == [3, sizes[0]]
    measured(model, sizes, width)
    assert len(probes) == 2


def test_other_parameters_ask_again(probes):
    model = network()
    measured(model, (3,))
    model.scale.requires_grad_(False)
    data = batches(floats(4, 3), (3,))
    found = fisher_diagonal(model, data)
    assert_close(found, oracle(model, data))
    model.scale.requires_grad_(True)
    model.fc = randomise(nn.Linear(3, 3))
    measured(model, (3,))
    assert probes == [3, 3, 3]


def test_without_a_check_nothing_is_believed(probes):
    model = network()
    for _ in range(2):
        measured(model, (3,), verify=False)
    assert probes == [3, 3]


def test_what_has_become_wrong_is_caught(probes):
    """The same operations on the same sizes, which now mix the samples' positions."""
    turned = False

    def forward(m, x):
        h = x.transpose(0, 1) if turned else x
        return readout((h @ m.p).transpose(0, 1) if turned else (h @ m.p))

    model = randomise(Net(forward, p=nn.Parameter(torch.randn(3, 3))))
    measured(model, (4,))
    turned = True
    data = batches(floats(4, 3), (4,))
    assert CLASSES == 4
    assert_close(fisher_diagonal(model, data), oracle(model, data))
    turned = False
    measured(model, (4,))
    assert probes[0] == 4


def test_fewer_samples_are_checked_the_second_time(monkeypatch):
    checked, alone = [], batch.sample_gradients

    def counted(*data, rows, **options):
        found = list(alone(*data, rows=rows, **options))
        checked.append(len(found))
        return found

    monkeypatch.setattr(batch, "sample_gradients", counted)
    model = network()
    for _ in range(3):
        measured(model, (5,))
    assert checked == [2, 1, 1]
