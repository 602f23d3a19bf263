"""Squares out of training's own backward passes, of many kinds of models and losses."""

import random

import pytest
import torch
import torch.nn.functional as F
from cases import Net, assert_close, batches, floats, randomise, readout, stack, tokens
from collecting_models import (
    collected,
    gradients,
    image,
    language_model,
    mean,
    text,
    vector,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradmask import FisherMask, fisher_diagonal
from gradmask.errors import ModelError


@pytest.fixture(autouse=True)
def _repeatable(repeatable):
    """In all tests here."""


class LayerNorm2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        x = F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias)
        return x.movedim(-1, 1)


def convnext():
    def block(m, x):
        return x + m.gamma * m.rest(m.norm(x))

    channels = 6
    rest = (nn.Conv2d(channels, 8, 1), nn.GELU(), nn.Conv2d(8, channels, 1))
    gamma = nn.Parameter(torch.full((channels, 1, 1), 0.5))
    parts = {"norm": LayerNorm2d(channels), "rest": nn.Sequential(*rest), "gamma": gamma}
    return stack(nn.Conv2d(2, channels, 2, 2), Net(block, **parts), nn.AdaptiveAvgPool2d(1))


def conv_net():
    layers = (nn.Conv2d(2, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.ReLU(inplace=True))
    return stack(
        *layers, nn.Conv2d(4, 4, 2, groups=2, bias=False), nn.InstanceNorm2d(4, affine=True)
    )


def frozen_batch_norm():
    model = stack(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2))
    model.layers[1].eval()
    return model


def attention():
    def forward(m, x):
        h = x + m.attention(x, x, x, need_weights=False)[0]
        return readout(m.head(m.norm(h)))

    parts = {"attention": nn.MultiheadAttention(6, 2, batch_first=True), "norm": nn.LayerNorm(6)}
    return Net(forward, head=nn.Linear(6, 5), **parts)


def encoder(**options):
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True, **options)
    return stack(nn.Embedding(6, 6), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def tied_layers():
    model = stack(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3))
    model.layers[2].weight = model.layers[0].weight
    return model


def twice():
    return Net(lambda m, x: readout(m.fc(F.relu(m.fc(x)))), fc=nn.Linear(5, 5))


def bare():
    def forward(m, x):
        h = (x @ m.matrix + m.shift) * m.scale
        return readout(torch.cat([m.token.expand(len(x), -1), h.tanh()], 1))

    shapes = {"matrix": (5, 4), "shift": (4,), "scale": (1,), "token": (1, 3)}
    return Net(forward, **{name: nn.Parameter(torch.ones(s)) for name, s in shapes.items()})


def partly_frozen():
    model = stack(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model.layers[2].requires_grad_(False)
    model.layers[4].bias.requires_grad_(False)
    return model


def unused():
    model = stack(nn.Linear(5, 4), nn.Tanh())
    model.aside = nn.Linear(2, 2)
    return model


def checkpointed(inner, whole):
    """Activations are worked out again in the backward pass, of a part or all."""

    def forward(m, x):
        if whole:
            return checkpoint(m.inner, x, use_reentrant=False)
        return readout(checkpoint(m.inner.layers, x, use_reentrant=False))

    return Net(forward, inner=inner)


MODELS = {
    "mlp": (lambda: stack(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), vector),
    "convolutions": (conv_net, image),
    "convnext": (convnext, image),
    "frozen BatchNorm": (frozen_batch_norm, image),
    "attention": (attention, floats(7, 6)),
    "encoder": (encoder, text),
    "encoder, norm first": (lambda: encoder(norm_first=True, activation="gelu"), text),
    "tied layers": (tied_layers, vector),
    "a layer twice": (twice, vector),
    "bare parameters": (bare, vector),
    "partly frozen": (partly_frozen, vector),
    "unused": (unused, vector),
    "recurrent": (
        lambda: Net(lambda m, x: readout(m.rnn(x)[0]), rnn=nn.LSTM(6, 4, batch_first=True)),
        floats(7, 6),
    ),
    "weight norm": (lambda: stack(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))), vector),
    "checkpointed block": (lambda: checkpointed(convnext(), False), image),
    "checkpointed attention": (lambda: checkpointed(attention(), True), floats(7, 6)),
    "checkpointed encoder": (lambda: checkpointed(encoder(), True), text),
    "checkpointed parameters": (lambda: checkpointed(bare(), True), vector),
    "checkpointed model": (lambda: checkpointed(conv_net(), True), image),
    "checkpointed twice": (lambda: checkpointed(twice(), True), vector),
}


@pytest.mark.parametrize("sizes", [(3, 2), (4,), (1, 3, 1), (7, 5)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models(name, sizes):
    make, inputs = MODELS[name]
    model = randomise(make())
    data = batches(inputs, sizes)
    found = collected(model, data)
    truth = fisher_diagonal(model, data)
    assert any(t.max() > 1e-12 for t in truth.values())
    assert_close(found, truth, 1e-9)


@pytest.mark.parametrize("make", [attention, bare, convnext])
def test_checkpoints_change_no_diagonal(make):
    model = randomise(make())
    inputs = {attention: floats(7, 6), bare: vector, convnext: image}[make]
    data = batches(inputs)
    found = fisher_diagonal(checkpointed(model, True), data)
    truth = {f"inner.{name}": t for name, t in fisher_diagonal(model, data).items()}
    assert_close(found, truth, 1e-9)


@pytest.mark.parametrize("make", [conv_net, twice], ids=["convolutions", "a layer twice"])
def test_checkpoints_around_the_model(make):
    model = randomise(make())
    inputs = image if make is conv_net else vector
    data = batches(inputs, (3, 1, 2))
    with FisherMask(model).collect() as collector:
        for x, y in data:
            mean(checkpoint(model, x, use_reentrant=False), y).backward()
    assert collector.seen == 3
    assert_close(collector.diagonal(), fisher_diagonal(model, data), 1e-9)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("positions", ["table", "parameter"])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_language_models(positions, tied, checkpoints):
    model = randomise(language_model(positions, tied))
    data = batches(text, (3, 2, 1), 6, (7,))
    if checkpoints:
        model = checkpointed(model, True)
        assert fisher_diagonal(model, data)
        if positions == "table":  # autograd gives the operands once
            with pytest.raises(ModelError, match="No rule measures"):
                collected(model, data)
            return
    found = collected(model, data, lambda z, y: F.cross_entropy(z, y, reduction="sum"))
    assert_close(found, fisher_diagonal(model, data), 1e-9)


class Hidden(nn.Module):
    """No rule and no operation that is known: its sine is random where it drops."""

    def __init__(self, share):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 5))
        self.share = share

    def forward(self, x):
        return F.dropout((x.unsqueeze(1) * self.weight.tanh()).sum(2), self.share, self.training)


@pytest.mark.parametrize("sizes", [(4,), (1,), (4, 1)], ids=str)
def test_random_modules_without_a_rule_are_refused(sizes):
    data = batches(vector, sizes)
    model = randomise(stack(Hidden(0.0)))
    assert_close(collected(model, data), fisher_diagonal(model, data), 1e-9)
    model = randomise(stack(Hidden(0.5)))
    if sizes == (1,):
        assert collected(model, data)["layers.0.weight"].max() > 0
        return
    with pytest.raises(ModelError, match="No rule measures"):
        collected(model, data)


def test_modules_that_change_themselves_are_refused():
    model = randomise(stack(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4))))
    with pytest.raises(ModelError, match="No rule measures"):
        collected(model, batches(vector))


def test_layers_may_thaw():
    model, data = randomise(MODELS["mlp"][0]()), batches(vector, (3, 3))
    model.layers[0].requires_grad_(False)
    with FisherMask(model).collect() as collector:
        mean(model(data[0][0]), data[0][1]).backward()
        model.layers[0].requires_grad_(True)
        mean(model(data[1][0]), data[1][1]).backward()
    truth = fisher_diagonal(model, data)
    truth |= {
        n: fisher_diagonal(model, data[1:])[n] / 2 for n in ("layers.0.weight", "layers.0.bias")
    }
    assert_close(collector.diagonal(), truth, 1e-9)


class Chance(nn.Module):
    """Draws with Python's generator, as layer drop does."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 5)

    def forward(self, x):
        return self.fc(x).tanh() if self.training and random.random() < 0.5 else self.fc(x)


def test_python_draws_as_without():
    model, (batch, *_) = randomise(stack(Chance())), batches(vector)
    random.seed(1)
    gradients(model, [batch], mean)
    expected = random.getstate()
    random.seed(1)
    with FisherMask(model).collect():
        gradients(model, [batch], mean)
    assert random.getstate() == expected


def recurrent():
    rnn = nn.LSTM(4, 5, batch_first=True)
    return Net(
        lambda m, x: readout(m.rnn(m.tokens(x))[1][0][0]), tokens=nn.Embedding(6, 4), rnn=rnn
    )


def placed():
    def forward(m, x):
        return readout((m.tokens(x) + m.places(torch.arange(x.shape[1]))).sin().sum(1))

    return Net(forward, tokens=nn.Embedding(6, 4), places=nn.Embedding(9, 4))


@pytest.mark.parametrize("make", [recurrent, placed])
def test_lengths_vary(make):
    model = randomise(make())
    data = [
        batches(tokens(length), (size,))[0] for length, size in ((7, 3), (3, 3), (9, 2), (3, 4))
    ]
    assert_close(collected(model, data), fisher_diagonal(model, data), 1e-9)
