"""`gradmask bench layers`: every method for a convolution's squares, and the one that is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gradmask.benchmarks.timing import interleave
from gradmask.benchmarks.workloads import make
from gradmask.fisher.convolution import METHODS, fastest_method, weight_gradient
from gradmask.kernels import can_add_squared_products


def bench_layers(
    name: str,
    *,
    batch_size: int | None = None,
    rounds: int = 7,
    device: str = "cpu",
    shape: Sequence[int] | None = None,
) -> Table:
    """Time the methods for each shape of convolution in a network, at the sizes it has there.

    Args:
        name: A workload (see `gradmask.benchmarks.workloads.find_workload`).
        batch_size: Samples in a batch (default: the workload's own).
        rounds: Times everything is timed.
        device: Device to measure on.
        shape: Shape of one sample (default: the workload's own).

    Returns:
        Table: milliseconds (median) of the ordinary weight gradient of the whole batch and of each
        method for the squares of the per-sample ones; * marks the one that is chosen.
    """
    model, inputs, _ = make(name, batch_size, device, shape)
    table = Table(title=f"{name}, batch {len(inputs)}, {device}, ms, * chosen")
    for title in (
        "layer",
        "input",
        "weight gradient",
        *(method.__name__.removeprefix("add_") for method in METHODS),
    ):
        table.add_column(title, justify="left" if title in ("layer", "input") else "right")
    for layer, x in _shapes(model, inputs):
        g = torch.randn_like(layer(x))
        total = torch.zeros(layer.weight.shape, device=x.device)
        tasks: dict[str, Callable[[], Any]] = {
            method.__name__: partial(method, layer, x, g, total)
            for method in METHODS
            if _works(method, layer, x, total)
        }
        tasks["plain"] = partial(_weight_gradient, layer, x, g)
        with torch.no_grad():
            seconds = interleave(tasks, rounds, device)
        chosen = fastest_method(layer, x, g, total).__name__
        cells = []
        for method in ("plain", *(method.__name__ for method in METHODS)):
            text = f"{1e3 * median(seconds[method]):.2f}" if method in seconds else ""
            cells.append(f"{text} *" if method == chosen else text)
        groups = f", {layer.groups} groups" if layer.groups > 1 else ""
        kernel = "x".join(map(str, layer.kernel_size))
        sizes = f"{layer.in_channels} to {layer.out_channels}, {kernel}{groups}"
        table.add_row(sizes, "x".join(map(str, x.shape[2:])), *cells)
    return table


def _works(method: Any, layer: _ConvNd, x: Tensor, total: Tensor) -> bool:
    if method.__name__ == "add_by_products":
        return can_add_squared_products(total, x)
    return method.__name__ != "add_by_unfolding" or isinstance(layer, nn.Conv2d)


def _weight_gradient(layer: _ConvNd, x: Tensor, g: Tensor) -> Tensor:
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return g  # padded outside of the operation: not compared
    return weight_gradient(layer, x, g)


def _shapes(model: nn.Module, inputs: Tensor) -> list[tuple[_ConvNd, Tensor]]:
    """The first convolution of each shape, with its input in a forward pass."""
    found: dict[Any, tuple[_ConvNd, Tensor]] = {}

    def note(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, _ConvNd)
        key = (layer.weight.shape, layer.stride, layer.dilation, layer.groups, args[0].shape)
        found.setdefault(key, (layer, args[0].detach().clone()))

    handles = [
        module.register_forward_hook(note)
        for module in model.modules()
        if isinstance(module, _ConvNd)
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return list(found.values())
