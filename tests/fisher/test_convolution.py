"""The ways to a convolution's squares, against each other and against autograd."""

import pytest
import torch
from torch import nn

from gradmask.fisher import convolution, rules
from gradmask.fisher.convolution import (
    add_by_groups,
    add_by_products,
    add_by_samples,
    add_by_unfolding,
    by_groups,
    fastest_method,
)
from gradmask.kernels import can_add_squared_products

LAYERS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2)),
    "dilated": lambda: nn.Conv2d(4, 6, (3, 2), dilation=(2, 1), padding=1),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2, bias=False),
    "same": lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=2),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"),
    "pointwise": lambda: nn.Conv2d(4, 6, 1),
    "1d": lambda: nn.Conv1d(4, 6, 3, stride=2, groups=2, padding=1),
    "3d": lambda: nn.Conv3d(4, 6, (1, 2, 3), padding=1),
    "transposed": lambda: nn.ConvTranspose2d(
        4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2
    ),
}


@pytest.mark.parametrize("elements", [1, 500, 1 << 20])
@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("case", LAYERS)
def test_all_ways_agree_with_autograd(case, samples, elements, monkeypatch):
    monkeypatch.setattr(rules, "CHUNK_ELEMENTS", elements)
    layer = LAYERS[case]().double()
    size = {"1d": (9,), "3d": (4, 5, 6)}.get(case, (8, 7))
    x = torch.randn(samples, 4, *size, dtype=torch.float64)
    g = torch.randn_like(layer(x))
    single = [
        torch.autograd.grad(layer(x[n : n + 1]), layer.weight, g[n : n + 1])[0]
        for n in range(samples)
    ]
    expected = torch.stack(single)
    layer.requires_grad_(False)
    torch.testing.assert_close(by_groups(layer, x, g), expected, rtol=1e-10, atol=1e-12)
    methods = [add_by_groups, add_by_samples]
    if can_add_squared_products(x, g):
        methods.append(add_by_products)
    if isinstance(layer, nn.Conv2d):
        methods.append(add_by_unfolding)
    for method in methods:
        found = torch.ones(layer.weight.shape, dtype=torch.float64)
        method(layer, x, g, found)
        torch.testing.assert_close(found, 1 + expected.square().sum(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("case", LAYERS)
def test_moments_agree_with_autograd(case, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(convolution, "can_add_squared_products", lambda *_: False)
    layer = LAYERS[case]().double()
    size = {"1d": (9,), "3d": (4, 5, 6)}.get(case, (8, 7))
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    g = torch.randn_like(layer(x))
    own = dict(layer.named_parameters())
    single = [
        torch.autograd.grad(layer(x[n : n + 1]), list(own.values()), g[n : n + 1]) for n in range(3)
    ]
    expected = {
        name: torch.stack(e) for name, e in zip(own, zip(*single, strict=True), strict=True)
    }
    totals, sums = ({n: torch.ones_like(p.detach()) for n, p in own.items()} for _ in range(2))
    with torch.no_grad():
        rules.find_rule(layer).add_moments(layer, x, g, totals, sums)
    for name, gradients in expected.items():
        torch.testing.assert_close(sums[name], 1 + gradients.sum(0), rtol=1e-10, atol=1e-10)
        squares = 1 + gradients.square().sum(0)
        torch.testing.assert_close(totals[name], squares, rtol=1e-10, atol=1e-12)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("layer", "kernels", "method"),
    [
        (nn.Conv2d(2, 3, 3), True, "add_by_products"),
        (nn.Conv2d(2, 3, 1), True, "add_by_groups"),  # few outputs, and no neighbours
        (nn.Conv2d(2, 8, 3), True, "add_by_products"),
        (nn.Conv2d(16, 16, 3, groups=16), True, "add_by_products"),
        (nn.Conv2d(2, 8, 3), False, "add_by_groups"),
        (nn.Conv2d(200, 200, 3), False, "add_by_unfolding"),
        (nn.Conv1d(300, 300, 3), False, "add_by_samples"),
        (nn.ConvTranspose2d(200, 200, 3), False, "add_by_samples"),
    ],
)
def test_way_depends_on_the_shape(layer, kernels, method, monkeypatch):
    monkeypatch.setattr(convolution, "can_add_squared_products", lambda *_: kernels)
    total = torch.zeros(layer.weight.shape)
    x = torch.randn(2, layer.in_channels, *[4] * (layer.weight.dim() - 2))
    assert fastest_method(layer, x, layer(x), total).__name__ == method


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(1, 2), groups=2),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular", groups=4),
    ],
    ids=str,
)
def test_per_sample_gradients_by_unfolding(layer):
    layer, x = layer.double(), torch.randn(3, 4, 6, 7, dtype=torch.float64)
    g = torch.randn_like(layer(x))
    expected = convolution.by_groups(layer, x, g)
    assert torch.allclose(convolution.by_unfolding(layer, x, g), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("outputs", "size", "unfolded"), [(6, 4, False), (600, 4, True), (600, 32, False)]
)
def test_large_weights_with_few_positions_are_unfolded(outputs, size, unfolded, monkeypatch):
    calls, unfolding = [], convolution.by_unfolding
    monkeypatch.setattr(convolution, "by_unfolding", lambda *a: calls.append(1) or unfolding(*a))
    layer, x = nn.Conv2d(60, outputs, 3), torch.randn(1, 60, size, size)
    convolution.convolution(layer, x, torch.randn_like(layer(x)))
    assert len(calls) == unfolded


@pytest.mark.parametrize("kernel", [(1, 1), (3, 2), (2, 5)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
def test_a_view_of_patches_is_what_pytorch_copies(kernel, dilation, stride):
    x = torch.randn(3, 2, 11, 9)[:, :, 1:, :-1]
    found = convolution.patches_of(x, kernel, dilation, stride).flatten(4).flatten(1, 3)
    assert torch.equal(found, nn.functional.unfold(x, kernel, dilation, 0, stride))
