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


def packed(m, x):
    """As many rows as there are valid positions: by chance as many as samples."""
    valid = x[..., 0] > 0
    h = torch.zeros_like(x)
    h[valid] = m.expert(x[valid])
    return readout(h.sum(1))


def routed(m, x):
    """Positions go to one of two experts."""
    rows, first = x.flatten(0, 1), x.flatten(0, 1)[:, 0] > 0
    h = torch.zeros_like(rows)
    h = h.index_put((first,), m.expert(rows[first])).index_put((~first,), m.other(rows[~first]))
    return readout(h.view_as(x))


def gathered(m, x):
    places = (x[..., 0] > 0).flatten().nonzero().squeeze(1)
    h = m.expert(x.flatten(0, 1).index_select(0, places))
    return readout(torch.zeros_like(x.flatten(0, 1)).index_add(0, places, h).view_as(x))


@pytest.mark.parametrize("function", [packed, routed, gathered])
@pytest.mark.parametrize(
    "counts", [(1, 1, 2, 0), (1, 2, 0, 1), (1, 1, 3, 1, 0, 0), (2, 0, 1, 1), (1, 1, 1, 1)]
)
def test_rows_that_are_samples_by_chance_only(function, counts):
    model = randomise(Net(function, expert=nn.Linear(3, 3), other=nn.Linear(3, 3)))
    x = torch.randn(len(counts), 3, 3, dtype=torch.float64)
    for sample, count in zip(x, counts, strict=True):
        sample[:, 0] = torch.where(torch.arange(3) < count, 1, -1) * sample[:, 0].abs()
    data = [(x, torch.arange(len(counts)) % CLASSES)]
    assert_close(fisher_diagonal(model, data), oracle(model, data))


@pytest.mark.parametrize("kernels", [True, False])
def test_channels_last(kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(
            "gradmask.fisher.convolution.can_add_squared_products", lambda *_: False
        )
    model = stack(nn.Conv2d(3, 200, 3), nn.Tanh(), nn.Conv2d(200, 180, 3), nn.BatchNorm2d(180))
    model = randomise(model).to(memory_format=torch.channels_last)
    data = [
        (x.to(memory_format=torch.channels_last), y) for x, y in batches(floats(3, 6, 6), (2, 1))
    ]
    assert_close(fisher_diagonal(model, data), oracle(model, data))


def distances(m, x):
    """Tables looked up once for the batch, and weights worked out from others."""
    steps = x.shape[1]
    places = torch.arange(steps)
    h = m.token(x) + m.place(places)[None]
    far = (places[:, None] - places).clamp(-2, 2) + 2
    scores = torch.einsum("ntd,nsd->nts", h, h)[:, None] + m.distance(far).permute(2, 0, 1)[None]
    h = torch.einsum("nkts,nsd->ntd", scores.softmax(-1), m.value(h))
    h = h + torch.tanh(m.table)[places % 3] * m.table[places % 3]
    weight = m.length * m.direction / m.direction.norm(dim=1, keepdim=True)
    return readout(torch.tanh(h @ weight.T).mean(1))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6])
def test_what_is_worked_out_once_for_the_batch(steps, ways):
    model = randomise(
        Net(
            distances,
            token=nn.Embedding(11, CLASSES),
            place=nn.Embedding(7, CLASSES),
            distance=nn.Embedding(5, 3),
            value=nn.Linear(CLASSES, CLASSES),
            table=nn.Parameter(torch.randn(3, CLASSES)),
            direction=nn.Parameter(torch.randn(CLASSES, CLASSES)),
            length=nn.Parameter(torch.randn(CLASSES, 1)),
        )
    )
    sizes = (4, 1, 2, 3)
    data = [(torch.randint(11, (n, steps)), torch.arange(n) % CLASSES) for n in sizes]
    assert_close(fisher_diagonal(model, data), oracle(model, data))
    found = {ways[n] for n in ("distance.weight", "table", "length")}
    assert found == {"derived"} or steps == 1  # which looks like one sample
    assert ways["place.weight"] == "lookup"


def test_sequences_of_other_lengths_are_measured_in_the_same_way(ways):
    model = randomise(
        Net(
            lambda m, x: readout(
                ((m.token(x) + m.place(torch.arange(x.shape[1]))) * m.table[: x.shape[1]]).mean(1)
            ),
            token=nn.Embedding(11, CLASSES),
            place=nn.Embedding(7, CLASSES),
            table=nn.Parameter(torch.randn(7, CLASSES)),
        )
    )
    data = [(torch.randint(11, (3, steps)), torch.arange(3) % CLASSES) for steps in (5, 4, 7, 6)]
    assert_close(fisher_diagonal(model, data), oracle(model, data))
    assert set(ways.values()) == {"rule", "lookup", "derived"}, ways


LOOKUPS = {
    "places": lambda m, x: m.token(x) + m.table(torch.arange(4)),
    "twice": lambda m, x: m.token(x) + m.table(torch.tensor([2, 0, 2, 1])),
    "one-sample": lambda m, x: m.token(x) * m.table(torch.arange(4)[None]),
    "reshaped": lambda m, x: m.token(x) + m.table(torch.arange(4).reshape(2, 2)).reshape(1, 4, -1),
    "one-place": lambda m, x: m.token(x) + m.table(torch.tensor(1)),
    "samples-second": lambda m, x: (
        m.token(x.T) + m.table(torch.tensor([[3], [0], [0], [1]]))
    ).transpose(0, 1),
    "product": lambda m, x: m.token(x) @ m.table(torch.tensor([1, 0, 1, 2])),
    "several-uses": lambda m, x: m.token(x).tanh() * m.table(torch.arange(4)) + m.table.weight[1],
}


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"padding_idx": -1}, {"freq": True}])
@pytest.mark.parametrize("case", LOOKUPS)
def test_rows_that_are_the_same_for_all_samples(case, options, ways):
    options = dict(options)
    options["scale_grad_by_freq"] = options.pop("freq", False)
    model = randomise(
        Net(
            lambda m, x: readout(torch.tanh(LOOKUPS[case](m, x)).mean(1)),
            token=nn.Embedding(11, CLASSES),
            table=nn.Embedding(6, CLASSES, **options),
        )
    )
    data = [(torch.randint(11, (n, 4)), torch.arange(n) % CLASSES) for n in (4, 1, 2, 3)]
    assert_close(fisher_diagonal(model, data), oracle(model, data))
    if case != "several-uses":
        assert ways["table.weight"] == ("derived" if options["scale_grad_by_freq"] else "lookup")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [None, 0])
def test_a_table_that_is_the_last_layer_too(padding, bias, dtype, ways):
    """Tokens that come twice, in one sample or several, and all others."""
    model = Net(
        lambda m, x: m.last(m.fc(m.table(x)).tanh()).mT,
        table=nn.Embedding(9, 5, padding_idx=padding),
        fc=nn.Linear(5, 5),
        last=nn.Linear(5, 9, bias=bias),
    )
    model.last.weight = model.table.weight
    randomise(model)
    generator = torch.Generator().manual_seed(0)
    draw = lambda n, t: torch.randint(7, (n, t), generator=generator)  # noqa: E731
    data = [(draw(n, t), draw(n, t)) for n, t in ((4, 6), (3, 1), (1, 5), (2, 2))]
    truth = oracle(model, data)
    found = fisher_diagonal(model.to(dtype), data)
    assert_close(found, truth, 1e-12 if dtype == torch.float64 else 1e-5)
    assert ways["table.weight"] == "rule"


class Norm2d(nn.LayerNorm):
    """Over the channels, as ConvNeXt has it."""

    def forward(self, x):
        moved = x.movedim(1, -1)
        moved = F.layer_norm(moved, self.normalized_shape, self.weight, self.bias, self.eps)
        return moved.movedim(-1, 1)


@pytest.mark.parametrize("affine", ["both", "weight", "bias"])
def test_layer_norm_as_an_operation(affine, ways):
    model = randomise(stack(nn.Conv2d(2, 3, 2), Norm2d(3), nn.Conv2d(3, 2, 1), Norm2d(2)))
    for layer in (model.layers[1], model.layers[3]):
        layer.weight.requires_grad_(affine != "bias")
        layer.bias.requires_grad_(affine != "weight")
    data = batches(floats(2, 4, 3))
    assert_close(fisher_diagonal(model, data), oracle(model, data))
    assert set(ways.values()) <= {"rule", "elementwise"}
