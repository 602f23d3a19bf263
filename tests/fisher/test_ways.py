"""Bare parameters in elementwise operations; modules without a rule, run by themselves."""

import pytest
import torch
from cases import Net, all_labels, assert_close, batches, floats, oracle, randomise, readout
from torch import nn

from gradmask import fisher_diagonal


def bare(function, *shape, **parts):
    return Net(lambda m, x: readout(function(m.p, x)), p=nn.Parameter(torch.randn(shape)), **parts)


class Affine(nn.Module):
    """Matrix products of bare parameters, which no elementwise operation explains."""

    def __init__(self, size=3, split=False):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(size, size)), nn.Parameter(torch.randn(size))
        self.inner = nn.Linear(size, size)
        self.split = split

    def forward(self, x, y=None, mask=None):
        h = x if y is None else x * y.cos()
        if mask is not None:
            h = mask @ h
        h = h @ self.a + self.b
        return (self.inner(h), {"tanh": h.tanh()}) if self.split else self.inner(h.tanh())


def called(function, **options):
    return Net(
        lambda m, x: readout(function(m.block, m.fc(x))),
        fc=nn.Linear(3, 3),
        block=Affine(**options),
    )


class Chunks(nn.Module):
    """Two outputs from one node of the graph."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return (x @ self.a).chunk(2, -1)


def recurrent_state(m, x):
    outputs, (h, _) = m.rnn(x)
    return readout(outputs.sum(1) + h[-1])


def functional_child():
    """A child's weight is used by its parent, without a call, as in MultiheadAttention."""

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.child = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 2)

        def forward(self, x):
            return nn.functional.linear(x @ self.scale, self.child.weight, self.child.bias)

    return Net(lambda m, x: readout(m.parent(x)), parent=Parent())


def nested():
    return Net(
        lambda m, x: readout(m.outer(x)),
        outer=Net(lambda m, x: m.block(x) @ m.p, block=Affine(), p=nn.Parameter(torch.randn(3, 3))),
    )


ELEMENTWISE = {
    "sum": bare(lambda p, x: x + p, 3),
    "sum-left": bare(lambda p, x: p + x, 4, 3),
    "sum-scaled": bare(lambda p, x: torch.add(x, p, alpha=2.5), 3),
    "difference": bare(lambda p, x: x - p, 3),
    "difference-left": bare(lambda p, x: p - x, 1, 3),
    "difference-scaled": bare(lambda p, x: torch.sub(x, p, alpha=0.5), 3),
    "product": bare(lambda p, x: x * p, 1, 4, 1),
    "product-left": bare(lambda p, x: p * x, 4, 3),
    "product-of-a-function": bare(lambda p, x: p * (x * p).sin(), 3),
    "scalar": bare(lambda p, x: x * p),
    "expanded": bare(lambda p, x: torch.cat([p.expand(len(x), 2, 3), x], 1), 1, 1, 3),
    "reshaped": bare(lambda p, x: x * p.view(1, 4, 1) + p[:, None].view(4, 1), 4),
    "several-uses": bare(lambda p, x: (x + p).tanh() * p - p, 3),
    "in-place": bare(lambda p, x: x.sin().add_(p).tanh_(), 3),
    "larger-than-the-other": bare(lambda p, x: x.sum(1, keepdim=True) * p, 4, 3),
    "other-without-samples": bare(lambda p, x: x + (p * torch.arange(3.0)).expand_as(x), 1, 1, 3),
}
# A position embedding times a constant has no samples where it is multiplied.
BY_SAMPLE = {
    "other-without-samples": ELEMENTWISE.pop("other-without-samples"),
    "matrix-product": bare(lambda p, x: x @ p, 3, 3),
    "along-the-samples": bare(lambda p, x: x + p[: len(x)], 5, 4, 3),
    "sliced": bare(lambda p, x: x + p[:3], 5),
    "also-elsewhere": bare(lambda p, x: (x * p) @ p, 3),
    "transposed-samples": bare(lambda p, x: (x.transpose(0, 1) * p).transpose(0, 1), 3),
    "quotient": bare(lambda p, x: x / p, 3),
}
BY_MODULE = {
    "plain": called(lambda block, x: block(x)),
    "two-inputs": called(lambda block, x: block(x, x.sin())),
    "keyword": called(lambda block, x: block(x, y=x.sin())),
    "called-twice": called(lambda block, x: block(block(x).tanh())),
    "nested-output": called(lambda block, x: block(x)[1]["tanh"], split=True),
    "both-outputs": called(
        lambda block, x: (lambda a, b: a + b["tanh"].sin())(*block(x)), split=True
    ),
    "one-node-two-outputs": Net(lambda m, x: readout(m.c(x)[0] * m.c(x)[1].cos()), c=Chunks()),
    "functional-child": functional_child(),
    "nested": nested(),
    "lstm": Net(lambda m, x: readout(m.rnn(x)[0]), rnn=nn.LSTM(3, 2, batch_first=True)),
    "attention-with-padding": Net(
        lambda m, x: readout(
            m.att(x, x, x, key_padding_mask=x[..., 0] > 5.0, need_weights=False)[0]
        ),
        att=nn.MultiheadAttention(3, 1, batch_first=True),
    ),
}
# Something besides the samples goes in or comes out.
NOT_BY_MODULE = {
    "one-output-made-from-another": Net(
        lambda m, x: readout(sum(m.block(x))),
        block=Net(
            lambda m, x: (lambda h: (h, h.tanh()))(x @ m.p), p=nn.Parameter(torch.randn(3, 3))
        ),
    ),
    "mask-of-positions": called(
        lambda block, x: block(x, mask=torch.eye(4, dtype=x.dtype).flip(0))
    ),
    "lstm-state": Net(recurrent_state, rnn=nn.LSTM(3, 2, batch_first=True)),
}


def check(model, sizes=(3, 4, 1, 2)):
    model = randomise(model)
    data = batches(floats(4, 3), sizes)
    assert_close(fisher_diagonal(model, data), oracle(model, data))


@pytest.mark.parametrize("case", ELEMENTWISE)
def test_elementwise(case, ways):
    check(ELEMENTWISE[case])
    assert ways["p"] == "elementwise"


@pytest.mark.parametrize("case", BY_SAMPLE)
def test_not_elementwise(case, ways):
    check(BY_SAMPLE[case])
    assert ways["p"] == "sample"


@pytest.mark.parametrize("case", BY_MODULE)
def test_by_module(case, ways):
    check(BY_MODULE[case])
    assert "sample" not in ways.values()
    assert "module" in ways.values()


@pytest.mark.parametrize("case", NOT_BY_MODULE)
def test_not_by_module(case, ways):
    check(NOT_BY_MODULE[case])
    assert "sample" in ways.values()


@pytest.mark.parametrize("sizes", [(2,), (3,), (4,), (4, 1, 5)])
def test_exact(sizes, ways):
    model = randomise(called(lambda block, x: block(x) @ block.inner.weight))
    data = batches(floats(4, 3), sizes)
    assert_close(fisher_diagonal(model, data, kind="exact"), oracle(model, data, labels=all_labels))
    assert {"rule", "module", "sample"} <= set(ways.values())


def test_half_precision():
    model = randomise(called(lambda block, x: block(x) @ block.a))
    data = batches(floats(4, 3))
    exact = fisher_diagonal(model, data)
    half = fisher_diagonal(model.bfloat16(), [(x.bfloat16(), y) for x, y in data])
    for name, value in half.items():
        assert value.dtype == torch.float32
        assert (value - exact[name]).abs().max() < 0.1 * exact[name].abs().max()
