"""What a model may return, and how it is cut into samples."""

import dataclasses
from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, Net, assert_close, batches, floats, oracle, randomise, readout
from torch import nn

from gradmask import fisher_diagonal
from gradmask.errors import DataError, ModelError


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    balance: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: torch.Tensor


class Ordered(OrderedDict):
    """A dict subclass whose entries are attributes too, as in transformers."""

    @property
    def logits(self):
        return self["logits"]


class Plain:
    def __init__(self, logits):
        self.logits = logits


Named = namedtuple("Named", "logits")

CONTAINERS = {
    "dataclass": Output,
    "frozen": Frozen,
    "named": Named,
    "ordered": lambda logits: Ordered(logits=logits),
    "user-dict": lambda logits: UserDict(logits=logits),
    "dict": lambda logits: {"logits": logits},
    "nested": lambda logits: [{"a": (Output(logits),)}],
}


def logits_of(outputs):
    if isinstance(outputs, list):
        return outputs[0]["a"][0].logits
    return outputs["logits"] if isinstance(outputs, dict | UserDict) else outputs.logits


@pytest.mark.parametrize("case", CONTAINERS)
def test_containers_are_cut(case):
    model = randomise(Net(lambda m, x: CONTAINERS[case](readout(m.fc(x))), fc=nn.Linear(3, 3)))
    loss = lambda o, t: F.cross_entropy(logits_of(o), t)  # noqa: E731
    data = batches(floats(3), (5, 2))
    assert_close(fisher_diagonal(model, data, loss=loss), oracle(model, data, loss))


def test_a_plain_class_is_refused_when_it_is_used():
    model = randomise(Net(lambda m, x: Plain(readout(m.fc(x))), fc=nn.Linear(3, 3)))
    loss = lambda o, t: F.cross_entropy(o.logits, t)  # noqa: E731
    with pytest.raises((DataError, ModelError), match=r"Plain|do not depend"):
        fisher_diagonal(model, batches(floats(3)), loss=loss)
    both = randomise(Net(lambda m, x: (readout(m.fc(x)), Plain(m.fc(x).sum())), fc=nn.Linear(3, 3)))
    data = batches(floats(3))
    found = fisher_diagonal(both, data, loss=lambda o, t: F.cross_entropy(o[0], t))
    assert_close(found, oracle(both, data, lambda o, t: F.cross_entropy(o[0], t)))
    with pytest.raises(DataError, match="A Plain cannot be cut"):
        fisher_diagonal(both, data, loss=lambda o, t: F.cross_entropy(o[0], t) + o[1].logits)


BATCH_OUTPUTS = {
    "sum": lambda h: h.square().sum(),
    "mean": lambda h: h.mean(),
    "one-entry": lambda h: h.mean(0, keepdim=True).sum(1)[:1],
    "as-many-as-samples": lambda h: h.square().mean(0).repeat(2)[:5],
}


@pytest.mark.parametrize("verify", ["spread", "all"])
@pytest.mark.parametrize("case", BATCH_OUTPUTS)
def test_outputs_of_the_batch_are_those_of_each_sample_alone(case, verify):
    def forward(m, x):
        h = m.fc(x)
        return readout(h), BATCH_OUTPUTS[case](h)

    loss = lambda o, t: F.cross_entropy(o[0], t) + o[1].sum()  # noqa: E731
    model, data = randomise(Net(forward, fc=nn.Linear(3, 3))), batches(floats(3), (5, 5))
    if case not in ("sum", "mean"):  # cut in vain: no sum over samples, and told so
        with pytest.raises(DataError, match="neither the sum nor the mean"):
            fisher_diagonal(model, data, loss=loss, verify=verify)
        return
    assert_close(fisher_diagonal(model, data, loss=loss, verify=verify), oracle(model, data, loss))


def test_the_models_own_loss():
    """As transformers' models return it: a mean over the tokens of the batch."""

    def forward(m, x, labels):
        logits = m.fc(x)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}

    model = randomise(Net(forward, fc=nn.Linear(3, CLASSES)))
    data = [((floats(4, 3)(n), torch.randint(CLASSES, (n, 4))), torch.zeros(n)) for n in (5, 2)]
    for (_, labels), _ in data:
        labels[0, 1:] = -100
    loss = lambda o, t: o["loss"]  # noqa: E731
    assert_close(fisher_diagonal(model, data, loss=loss), oracle(model, data, loss))


def test_losses_that_the_model_works_out_for_each_sample():
    def forward(m, x, labels):
        return {"losses": F.cross_entropy(readout(m.fc(x)), labels, reduction="none")}

    model = randomise(Net(forward, fc=nn.Linear(3, 3)))
    data = [((floats(3)(n), torch.randint(CLASSES, (n,))), torch.zeros(n)) for n in (5, 2)]
    loss = lambda o, t: o["losses"]  # noqa: E731
    expected = oracle(model, data, lambda o, t: o["losses"].sum())
    assert_close(fisher_diagonal(model, data, loss=loss), expected)
