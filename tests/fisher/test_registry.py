"""Which rule applies to which layer, and rules of the user."""

import pytest
import torch
from cases import assert_close, batches, floats, oracle, randomise, stack, tokens
from torch import nn

from gradmask import fisher_diagonal, register_rule
from gradmask.errors import ModelError
from gradmask.fisher import rules


class Scale(nn.Module):
    """Scale of each channel and an offset of a whole sample's shape."""

    def __init__(self, *shape):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(shape[0]))
        self.offset = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return x * self.scale[:, None] + self.offset


def scale_rule(module, x, g):
    return {"scale": (g * x).sum(2), "offset": g}


def scale_squares(module, x, g, totals):
    for name, gradient in scale_rule(module, x, g).items():
        totals[name] += gradient.square().sum(0)


@pytest.mark.parametrize("add_squares", [None, scale_squares])
@pytest.mark.parametrize("calls", [1, 2])
def test_registered_rule(add_squares, calls, own_rules, fallen):
    decorate = register_rule(Scale, add_squares=add_squares, parameters=("scale", "offset"))
    assert decorate(scale_rule) is scale_rule
    model = stack(nn.Conv1d(3, 2, 1), *[Scale(2, 4)] * calls, nn.Tanh(), nn.Conv1d(2, 2, 2))
    data = batches(floats(3, 4))
    randomise(model)
    assert_close(fisher_diagonal(model, data), oracle(model, data))
    assert not fallen


def test_rule_that_is_wrong_about_shapes_is_named(own_rules):
    register_rule(Scale, parameters=("scale", "offset"))(
        lambda module, x, g: {"scale": (g * x).sum(1), "offset": g}
    )
    model = randomise(stack(Scale(2, 4)))
    with pytest.raises(ModelError, match=r"layers\.0\.scale.*\(4,\).*\(2,\)"):
        fisher_diagonal(model, batches(floats(2, 4)))


@pytest.mark.cpu
def test_rule_gets_no_more_samples_than_fit(own_rules, monkeypatch):
    sizes = []

    def counting(module, x, g):
        sizes.append(len(x))
        return scale_rule(module, x, g)

    register_rule(Scale, parameters=("scale", "offset"))(counting)
    monkeypatch.setattr(rules, "CHUNK_ELEMENTS", 25)  # 10 parameters
    fisher_diagonal(randomise(stack(Scale(2, 4))), batches(floats(2, 4), (5,)), verify=False)
    assert sizes == [2, 2, 1]


def test_rule_covers_some_parameters_only(own_rules, ways):
    register_rule(Scale, parameters=("scale",))(lambda m, x, g: {"scale": (g * x).sum(2)})
    model, data = randomise(stack(Scale(2, 4))), batches(floats(2, 4))
    assert_close(fisher_diagonal(model, data), oracle(model, data))
    assert ways["layers.0.offset"] == "elementwise"


def test_custom_layer_without_a_rule(ways):
    model, data = randomise(stack(nn.Conv1d(3, 2, 1), Scale(2, 4))), batches(floats(3, 4))
    assert_close(fisher_diagonal(model, data), oracle(model, data))
    assert (ways["layers.1.scale"], ways["layers.1.offset"]) == ("elementwise", "elementwise")


class Same(nn.Linear):
    """A subclass that computes what its base class does."""


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


class Standardised(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2), keepdim=True), bias)


@pytest.mark.parametrize(
    ("layer", "ruled"),
    [(Same(3, 4), True), (Doubled(3, 4), False), (Standardised(2, 4, 3), False)],
)
def test_subclass_inherits_the_rule_unless_it_computes_otherwise(layer, ruled, ways):
    model, data = randomise(stack(layer)), batches(floats(2, 3))
    assert_close(fisher_diagonal(model, data), oracle(model, data))
    assert (ways["layers.0.weight"] == "rule") == ruled


def test_forward_replaced_on_the_instance(ways):
    layer = nn.Linear(3, 4)
    layer.forward = lambda x: nn.Linear.forward(layer, x.cos())
    model, data = randomise(stack(layer)), batches(floats(3))
    assert_close(fisher_diagonal(model, data), oracle(model, data))
    assert set(ways.values()) == {"matmul", "elementwise"}


@pytest.mark.parametrize(
    "layer", [nn.Embedding(6, 3, max_norm=1.0), nn.Embedding(6, 3, scale_grad_by_freq=True)]
)
def test_embedding_with_special_gradients_falls_back(layer, fallen):
    model, data = randomise(stack(layer)), batches(tokens(9))
    assert_close(fisher_diagonal(model, data), oracle(model, data))
    assert fallen
