"""Mean gradients of the pass that squares them."""

import pytest
import torch
from cases import CLASSES, assert_close, batches, call, cross_entropy, floats, oracle, randomise
from random_models import data, network
from torch import nn

from gradmask import fisher_diagonal
from gradmask.errors import ModelError
from gradmask.fisher import gradient_moments


def mean_gradient(model, data):
    """Plain autograd, one sample after the other."""
    model.eval()
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    names, parameters = zip(*trainable, strict=True)
    sums, count = {n: torch.zeros_like(p) for n, p in zip(names, parameters, strict=True)}, 0
    for inputs, targets in data:
        for i in range(len(targets)):
            loss = cross_entropy(call(model, inputs[i : i + 1]), targets[i : i + 1])
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            for name, g in zip(names, found, strict=True):
                sums[name] += 0 if g is None else g
            count += 1
    return {name: total / count for name, total in sums.items()}


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(80, CLASSES),
    )


class Tied(nn.Module):
    """A weight that two layers and the loss's path share."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.last(self.first(self.first(x).tanh())) * self.first.weight[:1, :CLASSES]


class Bare(nn.Module):
    """Parameters that no layer owns."""

    def __init__(self):
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.ones(6)), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.last(torch.sin(x * self.scale))


@pytest.mark.parametrize("verify", ["spread", "all", False])
@pytest.mark.parametrize(
    ("build", "shape"), [(convolutional, (3, 4, 4)), (Tied, (6,)), (Bare, (6,))]
)
def test_mean_and_square_of_single_samples(build, shape, verify):
    model = randomise(build())
    data = batches(floats(*shape))
    found = gradient_moments(model, data, verify=verify)
    assert_close(found.mean, mean_gradient(model, data))
    assert_close(found.square, oracle(model, data))
    plain = fisher_diagonal(model, data, verify=verify)
    assert all(torch.equal(found.square[name], value) for name, value in plain.items())


@pytest.mark.parametrize("seed", range(12))
def test_random_models(seed):
    model, samples = network(seed)[0], data(seed)[0]
    model = randomise(model)
    found = gradient_moments(model, samples)
    assert_close(found.square, fisher_diagonal(model, samples))
    assert_close(found.mean, mean_gradient(model, samples))


def test_one_sample_a_batch_and_parts_of_the_data():
    model, data = randomise(convolutional()), batches(floats(3, 4, 4), sizes=(1,) * 5)
    assert_close(gradient_moments(model, data).mean, mean_gradient(model, data))
    half = gradient_moments(model, data, max_samples=2, seed=1)
    assert not torch.equal(half.mean["4.weight"], gradient_moments(model, data).mean["4.weight"])


def test_hooks_and_gradients_of_training_stay_out_of_it():
    model, data = randomise(Bare()), batches(floats(6))
    expected = mean_gradient(model, data)
    seen = []
    model.last.weight.register_hook(lambda g: seen.append(g) or 2 * g)
    model.last.weight.grad = torch.ones_like(model.last.weight)
    assert_close(gradient_moments(model, data).mean, expected)
    assert not seen
    assert torch.equal(model.last.weight.grad, torch.ones_like(model.last.weight))


def test_half_precision_is_added_up_in_single():
    model = nn.Linear(6, CLASSES).bfloat16()
    found = gradient_moments(model, [(torch.randn(4, 6).bfloat16(), torch.zeros(4).long())])
    assert {t.dtype for part in found for t in part.values()} == {torch.float32}


def test_batch_statistics_are_refused_as_ever():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False))
    with pytest.raises(ModelError):
        gradient_moments(model, [(torch.rand(4, 6), torch.zeros(4).long())])
