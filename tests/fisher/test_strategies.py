"""Bare parameters in elementwise operations; modules without a rule, run by themselves."""

import pytest
import torch
from cases import Net, all_labels, assert_close, batches, floats, oracle, randomise, readout
from torch import nn

from gradmask import fisher_diagonal


def bare(function, *shape, **parts):
    return Net(lambda m, x: readout(function(m.p, x)), p=nn.Parameter(torch.randn(shape)), **parts)


def product(x, weight):
    """x @ sinh(weight), by operations that are not read off the graph."""
    return (x.unsqueeze(-2) / (1 / weight.mT.sinh())).sum(-1)


class Affine(nn.Module):
    """Functions of bare parameters, which no single operation explains."""

    def __init__(self, size=3, split=False):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(size, size)), nn.Parameter(torch.randn(size))
        self.inner = nn.Linear(size, size)
        self.split = split

    def forward(self, x, y=None, mask=None):
        h = x if y is None else x * y.cos()
        if mask is not None:
            h = mask @ h
        h = product(h, self.a) + self.b.sinh()
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
        return product(x, self.a).chunk(2, -1)


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
            h = product(product(x, self.scale), self.child.weight.mT)
            return h + self.child.bias.sinh()

    return Net(lambda m, x: readout(m.parent(x)), parent=Parent())


def nested():
    return Net(
        lambda m, x: readout(m.outer(x)),
        outer=Net(
            lambda m, x: product(m.block(x), m.p),
            block=Affine(),
            p=nn.Parameter(torch.randn(3, 3)),
        ),
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
    "samples-second": bare(lambda p, x: (x.transpose(0, 1) * p).transpose(0, 1), 3),
    "samples-second-wide": bare(
        lambda p, x: (x.transpose(0, 1) + p).sin().transpose(0, 1), 4, 1, 3
    ),
    "folded": bare(lambda p, x: (x.flatten(0, 1) * p).unflatten(0, (-1, 4)), 3),
    "other-without-samples": bare(lambda p, x: x + (p * torch.arange(3.0)).expand_as(x), 1, 1, 3),
}
# A position embedding times a constant has no samples where it is multiplied.
DERIVED = {
    "other-without-samples": ELEMENTWISE.pop("other-without-samples"),
    "sliced": bare(lambda p, x: x + p[:3], 5),
    "function": bare(lambda p, x: x @ (p.sinh() * p), 3, 2),
    "samples-second": bare(lambda p, x: (x.transpose(0, 1) @ p.sinh()).transpose(0, 1), 3, 2),
    "used-twice": bare(lambda p, x: (x @ p.cumsum(0)).tanh() @ p.cos().t(), 3, 2),
    "split": bare(lambda p, x: (lambda a, b: (x * a).tanh() + b)(*p.sin().chunk(2)), 6),
}
BY_SAMPLE = {
    "also-elsewhere": bare(lambda p, x: (x * p) @ p, 3),
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
}
# Something besides the samples goes in or comes out.
NOT_BY_MODULE = {
    "one-output-made-from-another": Net(
        lambda m, x: readout(sum(m.block(x))),
        block=Net(
            lambda m, x: (lambda h: (h, h.tanh()))(product(x, m.p)),
            p=nn.Parameter(torch.randn(3, 3)),
        ),
    ),
    "mask-of-positions": called(
        lambda block, x: block(x, mask=torch.eye(4, dtype=x.dtype).flip(0))
    ),
}


def attention(**options):
    """Self-attention with padding, cross-attention to fewer positions."""

    def forward(m, x):
        h = x if options.get("batch_first") else x.transpose(0, 1)
        padded = x[..., 0] > 5.0
        h = m.own(h, h, h, key_padding_mask=padded, need_weights=False)[0]
        return readout(h if options.get("batch_first") else h.transpose(0, 1))

    return Net(forward, own=nn.MultiheadAttention(3, 1, **options))


MATMUL = {
    "product": bare(lambda p, x: x @ p, 3, 2),
    "square": bare(lambda p, x: x @ p, 3, 3),
    "transposed": bare(lambda p, x: x @ p.t(), 5, 3),
    "transposed-twice": bare(lambda p, x: x @ p.mT.t(), 3, 5),
    "one-position": bare(lambda p, x: x[:, 0] @ p, 3, 5),
    "functional": bare(lambda p, x: nn.functional.linear(x, p, p[:, 0].detach()), 5, 3),
    "scaled": bare(
        lambda p, x: torch.addmm(x[:, 0, :2], x[:, 1], p, alpha=3.0, beta=0.5), 3, 2
    ),
    "folded": bare(lambda p, x: (x.flatten(0, 1) @ p).unflatten(0, (-1, 4)), 3, 2),
    "samples-second": bare(lambda p, x: (x.transpose(0, 1) @ p).transpose(0, 1), 3, 2),
    "samples-second-folded": bare(
        lambda p, x: (x.transpose(0, 1).flatten(0, 1) @ p).unflatten(0, (4, -1)).transpose(0, 1),
        3, 2,
    ),
    "several-uses": bare(lambda p, x: (x @ p).tanh() @ p.t(), 3, 2),
    "with-an-elementwise-use": bare(lambda p, x: (x[:, :3] @ p).tanh() * p, 3, 3),
}  # fmt: skip
BY_OPERATIONS = {
    "lstm": Net(lambda m, x: readout(m.rnn(x)[0]), rnn=nn.LSTM(3, 2, batch_first=True)),
    "lstm-state": Net(recurrent_state, rnn=nn.LSTM(3, 2, 2, batch_first=True)),
    "gru-samples-second": Net(
        lambda m, x: readout(m.rnn(x.transpose(0, 1))[0].transpose(0, 1)), rnn=nn.GRU(3, 2)
    ),
    "attention": attention(batch_first=True),
    "attention-samples-second": attention(),
}


def check(model, sizes=(3, 4, 1, 2)):
    model = randomise(model)
    data = batches(floats(4, 3), sizes)
    assert_close(fisher_diagonal(model, data), oracle(model, data))


@pytest.mark.parametrize("case", ELEMENTWISE)
def test_elementwise(case, ways):
    check(ELEMENTWISE[case])
    assert ways["p"] == "elementwise"


@pytest.mark.parametrize("case", DERIVED)
def test_derived(case, ways):
    check(DERIVED[case], (3, 4, 2))
    assert ways["p"] == "derived"


@pytest.mark.parametrize("case", BY_SAMPLE)
def test_not_elementwise(case, ways):
    check(BY_SAMPLE[case])
    assert ways["p"] == "sample"


def test_the_slow_way_is_warned_of(caplog):
    model = randomise(BY_SAMPLE["quotient"])
    fisher_diagonal(model, batches(floats(4, 3), (1, 3, 3)))
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [line.partition(":")[0] for line in said] == [
        "The whole model runs again for each sample, which is slow, since no rule measures p"
    ]
    assert "register_rule" in said[0]


@pytest.mark.parametrize("case", MATMUL)
def test_matmul(case, ways):
    check(MATMUL[case])
    assert ways["p"] == "matmul" or case == "with-an-elementwise-use"
    assert not {"module", "sample"} & set(ways.values())


@pytest.mark.parametrize("sizes", [(2, 4), (4, 1), (3, 5, 8)])
@pytest.mark.parametrize("case", BY_OPERATIONS)
def test_by_operations(case, sizes, ways):
    check(BY_OPERATIONS[case], sizes)
    assert not {"module", "sample"} & set(ways.values())


def test_addmm_with_a_parameter_as_its_sum(ways):
    model = Net(
        lambda m, x: readout(torch.addmm(m.p, x[:, 0], m.q, alpha=2.0, beta=3.0)),
        p=nn.Parameter(torch.randn(1, 2)),
        q=nn.Parameter(torch.randn(3, 2)),
    )
    check(model)
    assert ways == {"p": "elementwise", "q": "matmul"}


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
    model = randomise(called(lambda block, x: product(block(x), block.inner.weight)))
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
