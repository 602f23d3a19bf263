"""Rows that are samples by chance, and what is the same for all samples."""

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
)
from torch import nn

from gradmask import fisher_diagonal


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
