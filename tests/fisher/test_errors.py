"""Each error says what is wrong, where, and what was expected."""

import re

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, Net, batches, floats, randomise, stack
from torch import nn
from torch.utils.data import TensorDataset

from gradmask import fisher_diagonal
from gradmask.errors import DataError, ModelError, OptionError


def classifier():
    return randomise(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, CLASSES)))


@pytest.mark.parametrize("kind", ["empirical", "sampled", "exact"])
@pytest.mark.parametrize("loss", ["cross_entropy", "bernoulli"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_loss_that_is_not_finite(kind, loss, value):
    model = randomise(nn.Linear(3, 3))
    targets = torch.zeros(2, 3) if loss == "bernoulli" else torch.zeros(2, dtype=torch.long)
    with pytest.raises(DataError, match="nan"):
        fisher_diagonal(model, [(floats(3)(2) * value, targets)], kind=kind, loss=loss)


@pytest.mark.parametrize(
    ("targets", "loss", "message"),
    [
        (torch.tensor([0, 4]), "cross_entropy", "from 0 to 4.* 4 classes: expected 0 to 3"),
        (torch.tensor([-1, 2]), "cross_entropy", "from -1 to 2"),
        (torch.tensor([0.0, 1.0]), "cross_entropy", r"shape \(2,\) and type torch.float32"),
        (torch.zeros(2, 4, dtype=torch.long), "cross_entropy", r"\(2, 4\).* do not fit"),
        (torch.zeros(2, 3), "bernoulli", r"\(2, 4\) and \(2, 3\)"),
        (torch.full((2, 4), 2.0), "bernoulli", "from 2 to 2.* expects 0 to 1"),
        (torch.zeros(2, 4) - 0.5, "bernoulli", "from -0.5 to -0.5"),
        (torch.zeros(3, dtype=torch.long), "cross_entropy", r"same number.*\[2, 3\]"),
        (torch.tensor(0), "cross_entropy", "expected a tensor of shape"),
        ([0, 1], "cross_entropy", "targets of a batch are a list"),
    ],
)
def test_targets_that_do_not_fit(targets, loss, message):
    with pytest.raises(DataError, match=message):
        fisher_diagonal(classifier(), [(floats(3)(2), targets)], loss=loss)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no samples"),
        (None, "not a NoneType"),
        (TensorDataset(torch.zeros(2, 3)), "not a TensorDataset: .*DataLoader first"),
        (iter([]), "no samples"),
        ([(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))], "no samples"),
        ([torch.zeros(2, 3)], r"gave a Tensor .*: expected \(inputs, targets\)"),
        ([{"x": torch.zeros(2, 3)}], "gave a dict"),
        ([(torch.zeros(2, 3),)], "gave a tuple"),
    ],
)
def test_data_of_the_wrong_form(data, message):
    with pytest.raises(DataError, match=message):
        fisher_diagonal(classifier(), data)


@pytest.mark.parametrize("kind", ["empirical", "sampled", "exact"])
@pytest.mark.parametrize(
    ("loss", "output"),
    [
        ("cross_entropy", lambda h: (h, h)),
        ("cross_entropy", lambda h: h[:, 0]),
        ("bernoulli", lambda h: (h, h)),
        ("bernoulli", lambda h: h[:, :2]),
    ],
)
def test_outputs_that_do_not_fit(kind, loss, output):
    model = randomise(Net(lambda m, x: output(m.fc(x)), fc=nn.Linear(3, 4)))
    data = [(floats(3)(2), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(DataError, match=f"loss='{loss}' needs the model's output to be logits"):
        fisher_diagonal(model, data, kind=kind, loss=loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "emprical"}, "Unknown kind 'emprical'. Did you mean 'empirical'"),
        ({"kind": "true"}, "Known: empirical, sampled, exact"),
        ({"loss": "crossentropy"}, "Did you mean 'cross_entropy'"),
        ({"kind": "exact", "loss": F.cross_entropy}, "callable"),
        ({"kind": "sampled", "loss": F.cross_entropy}, "callable"),
        ({"max_samples": 0}, "max_samples=0"),
    ],
)
def test_options_that_do_not_work(options, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        fisher_diagonal(classifier(), batches(floats(3)), **options)


def test_models_that_do_not_work():
    frozen = classifier().requires_grad_(False)
    with pytest.raises(ModelError, match="no trainable parameters"):
        fisher_diagonal(frozen, batches(floats(3)))
    scripted = torch.jit.trace(classifier(), torch.zeros(1, 3, dtype=torch.float64))
    with pytest.raises(ModelError, match="is a ScriptModule"):
        fisher_diagonal(scripted, batches(floats(3)))
    with pytest.raises(ModelError, match=r"'0.weight' has no shape yet"):
        fisher_diagonal(nn.Sequential(nn.LazyLinear(3)), batches(floats(3)))


@pytest.mark.parametrize("how", ["no-statistics", "always-training"])
def test_batch_statistics_name_the_layer(how):
    class AlwaysTraining(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(True)

    norm = (
        AlwaysTraining(4)
        if how == "always-training"
        else nn.BatchNorm1d(4, track_running_stats=False)
    )
    with pytest.raises(ModelError, match=r"'layers\.1' .*batch statistics"):
        fisher_diagonal(randomise(stack(nn.Linear(3, 4), norm)), batches(floats(3)))
