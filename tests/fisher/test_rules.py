"""Each layer rule against the oracle; no parameter may go to the slow fallback."""

import pytest
import torch
from cases import (
    assert_close,
    batches,
    floats,
    oracle,
    randomise,
    readout,
    stack,
    to_dtype,
    tokens,
)
from torch import nn

from gradmask import fisher_diagonal
from gradmask.fisher import linear, rules

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def frozen(layer, *names):
    for name in names:
        getattr(layer, name).requires_grad_(False)
    return layer


# id, layers, inputs for n samples
LAYERS = [
    ("mlp", lambda: [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)], floats(5)),
    ("linear-no-bias", lambda: [nn.Linear(5, 7, bias=False)], floats(5)),
    ("linear-tokens", lambda: [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)], floats(6, 5)),
    ("linear-deep-sequence", lambda: [nn.Linear(5, 3)], floats(2, 3, 2, 5)),
    ("linear-weight-frozen", lambda: [frozen(nn.Linear(5, 3), "weight")], floats(6, 5)),
    ("linear-bias-frozen", lambda: [frozen(nn.Linear(5, 3), "bias")], floats(6, 5)),
    ("relu-in-place", lambda: [nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 4)], floats(5)),
    (
        "relu-in-place-tokens",
        lambda: [nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 4)],
        floats(3, 5),
    ),
    (
        "dropout",
        lambda: [nn.Linear(5, 7), nn.Dropout(0.5, inplace=True), nn.Linear(7, 4)],
        floats(5),
    ),
    ("conv1d", lambda: [nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.Conv1d(3, 2, 2)], floats(2, 9)),
    ("conv2d", lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 2, 2)], floats(2, 6, 5)),
    ("conv3d", lambda: [nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1)], floats(2, 3, 4, 3)),
    ("conv2d-no-bias", lambda: [nn.Conv2d(2, 3, (3, 2), bias=False)], floats(2, 5, 4)),
    ("conv2d-weight-frozen", lambda: [frozen(nn.Conv2d(2, 3, 3), "weight")], floats(2, 5, 5)),
    ("conv2d-dilated", lambda: [nn.Conv2d(2, 3, 3, padding=2, dilation=2)], floats(2, 5, 6)),
    ("conv2d-left-over", lambda: [nn.Conv2d(2, 3, 2, stride=3)], floats(2, 7, 7)),
    ("conv2d-grouped", lambda: [nn.Conv2d(4, 6, 3, groups=2, padding=1)], floats(4, 4, 5)),
    ("conv2d-depthwise", lambda: [nn.Conv2d(4, 8, 3, groups=4)], floats(4, 5, 4)),
    ("conv2d-valid", lambda: [nn.Conv2d(2, 3, 3, padding="valid")], floats(2, 5, 5)),
    (
        "conv2d-same",
        lambda: [nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2))],
        floats(2, 5, 6),
    ),
    ("conv1d-same", lambda: [nn.Conv1d(2, 3, 4, padding="same")], floats(2, 7)),
    (
        "conv2d-reflect",
        lambda: [nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect")],
        floats(2, 5, 5),
    ),
    (
        "conv1d-circular-same",
        lambda: [nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular")],
        floats(2, 6),
    ),
    (
        "conv3d-replicate",
        lambda: [nn.Conv3d(2, 2, 3, padding=1, padding_mode="replicate")],
        floats(2, 3, 3, 3),
    ),
    (
        "transpose1d",
        lambda: [nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1)],
        floats(2, 4),
    ),
    (
        "transpose2d",
        lambda: [nn.ConvTranspose2d(4, 6, 3, 2, (1, 0), (1, 0), groups=2)],
        floats(4, 3, 4),
    ),
    (
        "transpose2d-dilated",
        lambda: [nn.ConvTranspose2d(2, 3, 2, dilation=2, bias=False)],
        floats(2, 3, 3),
    ),
    (
        "transpose3d",
        lambda: [nn.ConvTranspose3d(2, 3, 2, stride=2, output_padding=(1, 0, 1))],
        floats(2, 2, 3, 2),
    ),
    ("batchnorm1d", lambda: [nn.Linear(4, 5), nn.BatchNorm1d(5)], floats(4)),
    ("batchnorm1d-sequence", lambda: [nn.BatchNorm1d(3)], floats(3, 6)),
    (
        "batchnorm2d",
        lambda: [nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(True)],
        floats(2, 5, 4),
    ),
    (
        "batchnorm2d-plain",
        lambda: [nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3, affine=False)],
        floats(2, 4, 4),
    ),
    ("batchnorm3d", lambda: [nn.BatchNorm3d(2), nn.Conv3d(2, 2, 2)], floats(2, 3, 3, 3)),
    ("batchnorm-eps", lambda: [nn.BatchNorm2d(3, eps=0.5, momentum=None)], floats(3, 3, 3)),
    ("syncbatchnorm", lambda: [nn.SyncBatchNorm(3)], floats(3, 3, 3)),
    ("groupnorm", lambda: [nn.Conv2d(2, 6, 2, bias=False), nn.GroupNorm(3, 6)], floats(2, 4, 4)),
    ("groupnorm-features", lambda: [nn.GroupNorm(2, 6)], floats(6)),
    ("groupnorm-bias-frozen", lambda: [frozen(nn.GroupNorm(2, 4), "bias")], floats(4, 5)),
    ("instancenorm1d", lambda: [nn.InstanceNorm1d(3, affine=True)], floats(3, 6)),
    (
        "instancenorm2d",
        lambda: [nn.Conv2d(2, 3, 2, bias=False), nn.InstanceNorm2d(3)],
        floats(2, 5, 5),
    ),
    (
        "instancenorm2d-tracked",
        lambda: [nn.InstanceNorm2d(3, affine=True, track_running_stats=True)],
        floats(3, 4, 4),
    ),
    ("instancenorm3d", lambda: [nn.InstanceNorm3d(2, affine=True)], floats(2, 3, 3, 3)),
    ("layernorm", lambda: [nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)], floats(4)),
    ("layernorm-tokens", lambda: [nn.LayerNorm(4, eps=0.3)], floats(2, 3, 4)),
    ("layernorm-shape", lambda: [nn.LayerNorm((3, 4))], floats(2, 3, 4)),
    ("layernorm-no-bias", lambda: [nn.LayerNorm((3, 4), bias=False)], floats(3, 4)),
    ("rmsnorm", lambda: [nn.RMSNorm(5), nn.Linear(5, 3)], floats(3, 5)),
    ("rmsnorm-shape", lambda: [nn.RMSNorm((3, 4), eps=0.1)], floats(2, 3, 4)),
    ("embedding", lambda: [nn.Embedding(6, 3), nn.Linear(3, 4)], tokens(9)),
    ("embedding-one-token", lambda: [nn.Embedding(6, 3)], tokens()),
    ("embedding-positions", lambda: [nn.Embedding(6, 3)], tokens(2, 5)),
    ("embedding-padding", lambda: [nn.Embedding(6, 3, padding_idx=-4)], tokens(9)),
    ("embedding-sparse", lambda: [nn.Embedding(6, 3, sparse=True)], tokens(9)),
]
EACH_LAYER = pytest.mark.parametrize(
    ("layers", "inputs"), [case[1:] for case in LAYERS], ids=[case[0] for case in LAYERS]
)


@EACH_LAYER
def test_rule_equals_oracle(layers, inputs, fallen):
    model, data = randomise(stack(*layers())), batches(inputs)
    found = fisher_diagonal(model, data)
    assert all(f.dtype == torch.float64 for f in found.values())
    expected = oracle(model, data)
    assert all(e.count_nonzero() for e in expected.values()), "a test of zeros"
    assert_close(found, expected)
    assert not fallen


@EACH_LAYER
def test_float32(layers, inputs):
    model, data = randomise(stack(*layers())).float(), to_dtype(batches(inputs), torch.float32)
    found = fisher_diagonal(model, data)
    assert all(f.dtype == torch.float32 for f in found.values())
    assert_close(found, oracle(model.double(), to_dtype(data, torch.float64)), 1e-5)


@EACH_LAYER
def test_bfloat16_gives_float32_results(layers, inputs):
    model = randomise(stack(*layers())).bfloat16()
    data = to_dtype(batches(inputs), torch.bfloat16)
    found = fisher_diagonal(model, data)
    assert all(f.dtype == torch.float32 for f in found.values())
    assert_close(found, fisher_diagonal(model.float(), to_dtype(data, torch.float32)), 0.1)


@EACH_LAYER
def test_layers_called_twice(layers, inputs, fallen):
    """A sample's gradients of both calls add up before the square."""
    model, data = randomise(stack(*layers())), batches(inputs)
    other = lambda x: x.flip(1) if x.is_floating_point() else (x + 1) % 6  # noqa: E731
    model.function = lambda m, x: readout(m.layers(x)) - readout(m.layers(other(x))).roll(1, 1)
    assert_close(fisher_diagonal(model, data), oracle(model, data))
    assert not fallen


@pytest.mark.parametrize("chunk", [1, 40, 100])
def test_chunks_of_samples(chunk, monkeypatch):
    """However many samples' gradients are formed at a time."""
    monkeypatch.setattr(rules, "CHUNK_ELEMENTS", chunk)
    layers = [nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.GroupNorm(2, 6)]
    model, data = randomise(stack(*layers)), batches(floats(4), sizes=(5, 3))
    once = fisher_diagonal(model, data)
    assert_close(once, oracle(model, data))
    model.function = lambda m, x: readout(m.layers(m.layers(x)[:, :4]))
    assert_close(fisher_diagonal(model, data), oracle(model, data))


def test_wide_linear_with_long_sequences():
    model, data = randomise(stack(nn.Linear(40, 30))), batches(floats(50, 40), sizes=(4,))
    assert_close(fisher_diagonal(model, data), oracle(model, data))


@pytest.mark.parametrize("way", ["kernel", "loop", "neither"])
@pytest.mark.parametrize("shape", [(3, 5), (70, 9), (1, 4)])
def test_ways_to_the_squares_of_a_linear_layer(way, shape, monkeypatch):
    if way == "loop":
        monkeypatch.setattr(linear, "LOOP_POSITIONS", 1)
        monkeypatch.setattr(linear, "LOOP_ELEMENTS", 1)
    elif way == "neither":
        monkeypatch.setattr(linear, "can_add_squared_products", lambda *_: False)
    positions, inputs = shape
    x = torch.randn(4, positions, inputs, dtype=torch.float64)
    g = torch.randn(6, positions, 4, dtype=torch.float64).permute(2, 1, 0)
    total, sums = torch.rand(2, 6, inputs, dtype=torch.float64)
    gradients = torch.einsum("npk,npd->nkd", g, x)
    expected, plain = total + gradients.square().sum(0), sums + gradients.sum(0)
    both = total.clone()
    linear.add_linear_squares(total, x, g)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    linear.add_linear_squares(both, x, g, sums)
    assert torch.equal(both, total)
    torch.testing.assert_close(sums, plain, rtol=1e-10, atol=1e-11)


@pytest.mark.cpu
def test_large_products_go_one_after_the_other(monkeypatch):
    calls = []
    monkeypatch.setattr(linear, "can_add_squared_products", lambda *_: True)
    monkeypatch.setattr(linear, "add_squared_products", lambda *_: calls.append(1))
    for positions, size, kernel in ((64, 256, False), (63, 256, True), (64, 255, True)):
        calls.clear()
        x = torch.randn(2, positions, 256)
        linear.add_linear_squares(torch.zeros(size, 256), x, torch.randn(2, positions, size))
        assert bool(calls) == kernel
