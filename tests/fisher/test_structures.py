"""Models whose layers are shared, bypassed, hidden or not in the order of the samples."""

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CLASSES,
    Net,
    assert_close,
    batches,
    floats,
    oracle,
    randomise,
    readout,
    stack,
    tokens,
)
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from gradmask import fisher_diagonal
from gradmask.errors import ModelError


def tied_modules():
    model = Net(
        lambda m, x: readout(m.decoder(m.fc(m.embedding(x)).tanh())),
        embedding=nn.Embedding(6, 3),
        fc=nn.Linear(3, 3),
        decoder=nn.Linear(3, 6),
    )
    model.decoder.weight = model.embedding.weight
    return model


def tied_function():
    return Net(
        lambda m, x: readout(F.linear(m.fc(m.embedding(x)).tanh(), m.embedding.weight)),
        embedding=nn.Embedding(6, 3),
        fc=nn.Linear(3, 3),
    )


def tied_function_below():
    """The functional use is under the captured one: all paths go through the layer."""
    return Net(
        lambda m, x: readout(m.decoder(m.fc(F.embedding(x, m.decoder.weight)).tanh())),
        fc=nn.Linear(3, 3),
        decoder=nn.Linear(3, 6),
    )


def own_weight_in_own_input():
    return Net(lambda m, x: readout(m.fc(x @ m.fc.weight)), fc=nn.Linear(3, 3))


def weight_decay_in_forward():
    return Net(lambda m, x: readout(m.fc(x)) * m.fc.weight.square().sum(), fc=nn.Linear(3, 3))


def batch_norm_between_calls():
    return Net(
        lambda m, x: readout(m.norm(m.conv(m.norm(m.conv(x)).relu()))),
        conv=nn.Conv1d(2, 2, 3, padding=1),
        norm=nn.BatchNorm1d(2),
    )


def frozen_half():
    model = stack(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model.layers[0].requires_grad_(False)
    model.layers[2].bias.requires_grad_(False)
    model.layers[4].weight.requires_grad_(False)
    return model


def transposed():
    """The inner layers see the positions in dimension 0, as with batch_first=False."""

    def forward(m, x):
        h = m.second(m.first(x.transpose(0, 1)).relu())
        return readout(h.transpose(0, 1))

    return Net(forward, first=nn.Linear(3, 5), second=nn.Linear(5, 2))


def centred():
    """A plain sum of the outputs is zero whatever the layer does."""

    def forward(m, x):
        outputs = m.model(x)
        return outputs - outputs.mean(1, keepdim=True)

    return Net(forward, model=transposed())


def one_position(which):
    """Dimension 0 holds positions, and one of them alone reaches the output."""
    return Net(lambda m, x: readout(m.fc(x.transpose(0, 1))[which]), fc=nn.Linear(3, 5))


def position_embedding():
    return Net(
        lambda m, x: readout(m.word(x) + m.position(torch.arange(x.shape[1]))),
        word=nn.Embedding(6, 3),
        position=nn.Embedding(4, 3),
    )


def class_token():
    def forward(m, x):
        h = torch.cat([m.token.expand(len(x), 1, 3), m.fc(x)], 1) * m.scale
        return readout(m.attention(h, h, h, need_weights=False)[0][:, 0])

    return Net(
        forward,
        token=nn.Parameter(torch.randn(1, 1, 3)),
        scale=nn.Parameter(torch.randn(())),
        fc=nn.Linear(3, 3),
        attention=nn.MultiheadAttention(3, 1, batch_first=True),
    )


def mixture():
    """Each sample goes to one of two experts."""

    def forward(m, x):
        return readout(torch.where(x[:, :1] > 0, m.left(x), m.right(x)))

    return Net(forward, left=nn.Linear(3, 2), right=nn.Linear(3, 2))


def recurrent(layer):
    return Net(lambda m, x: readout(m.rnn(m.fc(x))[0]), fc=nn.Linear(3, 3), rnn=layer)


def transformer(**options):
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, **options)
    return stack(nn.Linear(3, 4), layer)


def changed_gradients():
    """Hooks in the forward pass change the gradients of activations."""

    def scaled(h):
        h.register_hook(lambda g: g * 3)
        return h

    return Net(
        lambda m, x: readout(scaled(m.second(scaled(m.first(x)).tanh()))),
        first=nn.Linear(3, 4),
        second=nn.Linear(4, 4),
    )


def checkpointed():
    def forward(m, x):
        return readout(checkpoint(m.block, m.first(x), use_reentrant=False))

    block = nn.Sequential(nn.Linear(4, 5), nn.ReLU(True), nn.BatchNorm1d(5), nn.Linear(5, 2))
    return Net(forward, first=nn.Linear(3, 4), block=block)


def normed(wrap):
    return stack(wrap(nn.Conv1d(2, 3, 2)), nn.Tanh(), nn.Conv1d(3, 2, 2))


def dead():
    model = stack(nn.Linear(3, 4))
    model.unused, model.alone = nn.Linear(2, 2), nn.Parameter(torch.randn(3))
    return model


# id, model, inputs for n samples, sizes of the batches, prefixes of what runs one sample at a time
MODELS = [
    ("tied-modules", tied_modules, tokens(5), (3, 2), ()),
    ("tied-function", tied_function, tokens(5), (3, 2), ()),
    ("tied-function-below", tied_function_below, tokens(5), (3, 2), ("decoder.weight",)),
    ("own-weight-in-input", own_weight_in_own_input, floats(3), (3, 2), ()),
    ("weight-in-output", weight_decay_in_forward, floats(3), (3, 2), ()),
    ("batchnorm-twice", batch_norm_between_calls, floats(2, 4), (3, 2), ()),
    ("frozen", frozen_half, floats(3), (3, 2), ()),
    ("transposed", transposed, floats(4, 3), (3, 2), ()),
    ("transposed-square", transposed, floats(3, 3), (3, 2), ()),
    ("transposed-square-centred", centred, floats(3, 3), (3, 2), ()),
    ("transposed-square-later", transposed, floats(2, 3), (3, 2), ()),
    ("transposed-after-one", transposed, floats(2, 3), (1, 2, 3), ()),
    ("first-position", lambda: one_position(0), floats(3, 3), (3, 2), ()),
    ("last-position", lambda: one_position(-1), floats(3, 3), (3, 2), ()),
    ("position-embedding", position_embedding, tokens(4), (3, 2), ()),
    ("position-embedding-square", position_embedding, tokens(2), (3, 2), ()),
    ("class-token", class_token, floats(4, 3), (3, 2), ()),
    ("experts", mixture, floats(3), (3, 1, 4), ()),
    ("lstm", lambda: recurrent(nn.LSTM(3, 2, batch_first=True)), floats(4, 3), (3, 2), ()),
    ("gru", lambda: recurrent(nn.GRU(3, 2, 2, batch_first=True)), floats(4, 3), (3, 2), ()),
    ("transformer", transformer, floats(5, 3), (3, 2), ()),
    (
        "transformer-norm-first",
        lambda: transformer(norm_first=True, activation="gelu"),
        floats(5, 3),
        (3, 2),
        (),
    ),
    ("changed-gradients", changed_gradients, floats(3), (3, 2), ()),
    ("checkpointed", checkpointed, floats(3), (3, 2), ()),
    ("weight-norm", lambda: normed(weight_norm), floats(2, 5), (3, 2), ("layers.0.param",)),
    (
        "pruned",
        lambda: normed(lambda c: prune.random_unstructured(c, "weight", 0.5)),
        floats(2, 5),
        (3, 2),
        ("layers.0.weight_orig",),
    ),
    ("dead", dead, floats(3), (3, 2), ()),
    (
        "constant",
        lambda: Net(
            lambda m, x: m.bias.expand(len(x), -1), bias=nn.Parameter(torch.randn(CLASSES))
        ),
        floats(3),
        (3, 2),
        (),
    ),
    ("one-by-one", lambda: stack(nn.Linear(3, 4)), floats(3), (1, 1, 1), ()),
    ("empty-batch", lambda: stack(nn.Linear(3, 4)), floats(3), (3, 0, 2), ()),
    (
        "windows",
        lambda: Net(
            lambda m, x: readout(m.fc(x.flatten(0, 1)).reshape(len(x), -1)), fc=nn.Linear(3, 2)
        ),
        floats(4, 3),
        (3, 2),
        (),
    ),
    (
        "keyword-call",
        lambda: Net(lambda m, x: readout(m.fc(input=x)), fc=nn.Linear(3, 2)),
        floats(3),
        (3, 2),
        (),
    ),
    (
        "output-size",
        lambda: Net(
            lambda m, x: readout(m.up(x, output_size=(8,))),
            up=nn.ConvTranspose1d(2, 3, 3, stride=2),
        ),
        floats(2, 3),
        (3, 2),
        ("up",),
    ),
    (
        "in-place-sum",
        lambda: Net(lambda m, x: readout(m.fc(x).add_(x)), fc=nn.Linear(3, 3)),
        floats(3),
        (3, 2),
        (),
    ),
    (
        "in-place-slice",
        lambda: Net(lambda m, x: readout(m.fc(x)[:, 1:].mul_(x[:, 1:])), fc=nn.Linear(3, 3)),
        floats(4, 3),
        (3, 2),
        (),
    ),
]


@pytest.mark.parametrize(
    ("build", "inputs", "sizes", "expected"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS]
)
def test_structure(build, inputs, sizes, expected, fallen):
    model, data = randomise(build()), batches(inputs, sizes)
    assert_close(fisher_diagonal(model, data), oracle(model, data))
    names = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith(expected)}
    assert fallen == (names if expected else set())


def test_dead_parameters_are_zero_in_full_precision():
    model = randomise(dead(), torch.bfloat16)
    found = fisher_diagonal(model, [(torch.randn(2, 3).bfloat16(), torch.tensor([0, 1]))])
    for name in ("unused.weight", "unused.bias", "alone"):
        assert found[name].count_nonzero() == 0
    assert {f.dtype for f in found.values()} == {torch.float32}


def test_reentrant_checkpointing_is_refused():
    model = checkpointed()
    model.function = lambda m, x: readout(checkpoint(m.block, m.first(x), use_reentrant=True))
    with pytest.raises(ModelError, match="use_reentrant=False"):
        fisher_diagonal(randomise(model), batches(floats(3)))


def hooked(layer, kind, change):
    """A layer with a hook of the user on it."""
    register = {
        "before": lambda: layer.register_forward_pre_hook(lambda m, args: change(args)),
        "after": lambda: layer.register_forward_hook(lambda m, args, out: change(out)),
    }
    register[kind]()
    return layer


def doubled(value):
    return (2 * value[0], *value[1:]) if isinstance(value, tuple) else 2 * value


class Sinh(nn.Linear):
    """No rule fits its function."""

    def forward(self, x):
        return F.linear(x, self.weight.sinh(), self.bias)


HOOKED = {
    "rule": lambda: nn.Linear(3, 3),
    "module": lambda: Sinh(3, 3),
    "weight-norm": lambda: weight_norm(nn.Linear(3, 3)),
    "lstm": lambda: nn.LSTM(3, 3, batch_first=True),
}


@pytest.mark.parametrize("kind", ["before", "after"])
@pytest.mark.parametrize("case", HOOKED)
def test_hooks_of_the_user_count_once(case, kind):
    layer = hooked(HOOKED[case](), kind, doubled)
    first = lambda h: h[0] if isinstance(h, tuple) else h  # noqa: E731
    model = Net(lambda m, x: readout(first(m.block(m.fc(x)))), fc=nn.Linear(3, 3), block=layer)
    randomise(model)
    data = batches(floats(4, 3), (3, 2))
    assert_close(fisher_diagonal(model, data), oracle(model, data))


@pytest.mark.parametrize("block", [nn.Linear(3, 3), Sinh(3, 3)])
def test_hooks_on_parameters_stay_out_of_it(block):
    model = randomise(stack(block))
    data = batches(floats(3))
    expected = oracle(model, data)
    calls = []
    for p in model.parameters():
        p.register_hook(lambda g: calls.append(g))
    assert_close(fisher_diagonal(model, data), expected)
    assert not calls
    model(data[0][0]).sum().backward()
    assert len(calls) == 2
