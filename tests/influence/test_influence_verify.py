"""Influence and gradient norms check the per-sample gradients they use."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradmask import gradient_norms, influence
from gradmask.errors import ModelError
from gradmask.fisher import linear, rules

METHODS = [
    {},
    {"fisher": "sampled"},
    {"fisher": "empirical"},
    {"method": "kl", "step": 0.3},
    {"method": "diagonal"},
]


@pytest.fixture(autouse=True)
def _repeatable(repeatable):
    """In all tests here."""


@pytest.fixture
def failed(caplog):
    caplog.set_level(logging.WARNING, "gradmask")
    return lambda: [r.getMessage() for r in caplog.records if "check" in r.getMessage()]


class Net(nn.Module):
    """Positions, so that linear layers are products of matrices."""

    def __init__(self, mix=lambda x: x):
        super().__init__()
        self.a, self.b, self.mix = nn.Linear(3, 4), nn.Linear(4, 3), mix

    def forward(self, x):
        h = self.b(self.a(self.mix(x)).tanh())
        return h.mean(1)


def data(n, classes=3):
    return torch.randn(n, 2, 3, dtype=torch.float64), torch.arange(n) % classes


def measured(model, sources, probe, options):
    probe = probe if options.get("fisher") == "empirical" else probe[0]
    return influence(model, sources, probe, **options)


def one_by_one(model, sources, probe, options):
    """Every source and every probe sample in a call of its own."""
    cut = lambda d, n: tuple(t[n : n + 1] for t in d)  # noqa: E731
    n, m = len(sources[1]), len(probe[1])
    rows = [
        [measured(model, cut(sources, i), cut(probe, j), options) for j in range(m)]
        for i in range(n)
    ]
    return torch.tensor([sum(row) / m for row in rows], dtype=torch.float64)


def doubled(module, x, g):
    return {name: 2 * t for name, t in linear.linear(module, x, g).items()}


def wrong_product(module, x, g):
    product = linear._as_linear_product(module, x, g)
    return product._replace(deltas=1.5 * product.deltas)


def wrong_weights(module, x, g, weights):
    found = linear._weigh_linear_squares(module, x, g, weights)
    return None if found is None else 3 * found


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize(
    "change",
    [
        {"per_sample": doubled},
        {"as_product": wrong_product},
        pytest.param({"weigh_squares": wrong_weights}, marks=pytest.mark.cpu),
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_broken_rule_is_caught(change, options, monkeypatch, failed):
    model, sources, probe = Net().double(), data(4), data(3)
    expected = measured(model, sources, probe, options)
    norms = gradient_norms(model, sources)
    assert not failed()
    rule = rules._RULES[nn.Linear]
    monkeypatch.setitem(rules._RULES, nn.Linear, type(rule)(**{**vars(rule), **change}))
    assert torch.allclose(measured(model, sources, probe, options), expected, rtol=1e-9)
    assert torch.allclose(gradient_norms(model, sources), norms, rtol=1e-9)
    assert failed()
    if "weigh_squares" in change:
        assert not torch.allclose(gradient_norms(model, sources, verify=False), norms, rtol=1e-2)


@pytest.mark.parametrize("options", [o for o in METHODS if o.get("fisher") != "sampled"], ids=str)
def test_samples_that_depend_on_their_batch(options):
    """A mean over the batch of the inputs; time in the place of the samples gives the same."""
    model = Net(lambda x: x - 0.5 * x.mean(0)).double()
    with pytest.raises(ModelError, match="depends on the others"):
        measured(model, data(4), data(3), options)
    one, other = data(1), data(1)  # as the message says
    found = measured(model, one, other, options)
    assert torch.allclose(found, one_by_one(model, one, other, options), rtol=1e-8)


def test_a_gaussian(failed):
    """KL of Gaussians of unit variance, by hand; the quadratic form is its leading order."""
    model, step = Net().double(), 1e-3
    (x, _), (z, _) = data(3), data(2)
    targets = torch.randn(3, 3, dtype=torch.float64)
    expected = []
    for i in range(3):
        loss = 0.5 * (model(x[i : i + 1]) - targets[i]).square().sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        moved = Net().double()
        moved.load_state_dict(model.state_dict())
        with torch.no_grad():
            for p, g in zip(moved.parameters(), gradients, strict=True):
                p -= step * g
            expected.append(0.5 * (model(z) - moved(z)).square().sum(1).mean())
    expected = torch.stack(expected)
    options = {"loss": "mse", "step": step}
    exact = influence(model, (x, targets), z, method="kl", **options)
    assert torch.allclose(exact, expected, rtol=1e-9)
    for extra in ({}, {"memory": 1}, {"fisher": "exact"}):
        assert torch.allclose(
            influence(model, (x, targets), z, **options, **extra), exact, rtol=2e-2
        )
    diagonal = influence(model, (x, targets), z, method="diagonal", **options)
    assert (diagonal > 0).all()
    assert not failed()


def test_gradients_scaled_by_frequency_are_refused():
    model = nn.Sequential(
        nn.Embedding(5, 3, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(6, 3)
    )
    tokens = torch.randint(5, (4, 2))
    with pytest.raises(ModelError, match=r"Layer '0' .* scale_grad_by_freq"):
        influence(model, (tokens, torch.arange(4) % 3), tokens)


def test_outputs_of_the_batch():
    """The loss uses a scalar that belongs to no sample."""

    class Both(Net):
        def forward(self, x):
            h = super().forward(x)
            return h, h.square().mean()

    model, (x, y) = Both().double(), data(4)
    loss = lambda o, t: F.cross_entropy(o[0], t) + o[1]  # noqa: E731
    found = gradient_norms(model, (x, y), loss=loss)
    for i in range(4):
        value = loss(model(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(value, list(model.parameters()))
        norm = sum(g.square().sum() for g in gradients).sqrt()
        assert found[i].item() == pytest.approx(norm.item(), rel=1e-10)
