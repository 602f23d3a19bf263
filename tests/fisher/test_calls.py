"""Ways to call a model: many inputs and outputs, autocast, compiled, in-place operations."""

import pytest
import torch
from cases import (
    CLASSES,
    Net,
    assert_close,
    batches,
    cross_entropy,
    floats,
    oracle,
    randomise,
    readout,
    stack,
)
from torch import nn

from gradmask import fisher_diagonal
from gradmask.errors import ModelError


def test_key_padding_mask():
    """Inputs of several types; samples of different lengths."""

    def forward(m, x, mask):
        h = m.fc(x)
        return readout(
            m.attention(h, h, h, key_padding_mask=mask)[0].masked_fill(mask[..., None], 0)
        )

    model = Net(
        forward, fc=nn.Linear(3, 4), attention=nn.MultiheadAttention(4, 2, batch_first=True)
    )
    randomise(model)
    lengths = torch.tensor([1, 4, 2])
    mask = torch.arange(4) >= lengths[:, None]
    data = [((floats(4, 3)(3), mask), torch.tensor([0, 1, 2]))]
    assert_close(fisher_diagonal(model, data), oracle(model, data))


def test_autocast_gives_float32_results():
    model = randomise(stack(nn.Conv1d(2, 6, 3), nn.GroupNorm(2, 6), nn.Linear(4, 5)), torch.float32)
    data = [(torch.randn(4, 2, 6), torch.randint(CLASSES, (4,)))]
    expected = fisher_diagonal(model, data)
    with torch.autocast("cpu", torch.bfloat16):
        found = fisher_diagonal(model, data)
    assert {f.dtype for f in found.values()} == {torch.float32}
    assert_close(found, expected, 0.1)


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_inputs_and_outputs_of_many_parts(form, fallen):
    """A siamese model: one encoder for both inputs, its outputs in a container."""

    def forward(m, a, b):
        outputs = m.encoder(a).tanh(), m.head(m.encoder(b))
        return outputs if form == "tuple" else dict(zip("ab", outputs, strict=True))

    def loss(outputs, target):
        a, b = outputs if form == "tuple" else outputs.values()
        return cross_entropy(a + b, target)

    model = randomise(Net(forward, encoder=nn.Linear(3, CLASSES), head=nn.Linear(4, CLASSES)))
    data = [
        ((a, b) if form == "tuple" else {"b": b, "a": a}, targets)
        for (a, targets), (b, _) in zip(batches(floats(3)), batches(floats(3)), strict=True)
    ]
    assert_close(fisher_diagonal(model, data, loss=loss), oracle(model, data, loss))
    assert not fallen


def test_compiled_model_runs_eagerly():
    def refuse(graph, inputs):
        raise AssertionError("compiled with our hooks in it")

    model, data = randomise(stack(nn.Linear(3, 4), nn.Linear(4, 2))), batches(floats(3))
    expected = oracle(model, data)
    found = fisher_diagonal(torch.compile(model, backend=refuse), data)
    assert_close({name.removeprefix("_orig_mod."): f for name, f in found.items()}, expected)


def test_overwritten_input_names_the_layer():
    model = randomise(Net(lambda m, x: readout(m.head(x)) + x.mul_(2)[:, :1], head=nn.Linear(3, 3)))
    with pytest.raises(ModelError, match=r"Linear.*head\.weight.*in place"):
        fisher_diagonal(model, batches(floats(3)))


def test_output_without_parameters():
    model = randomise(Net(lambda m, x: readout(x), fc=nn.Linear(3, 3)))
    with pytest.raises(ModelError, match="do not depend"):
        fisher_diagonal(model, batches(floats(3)))
