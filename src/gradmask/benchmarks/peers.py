"""Other ways to the empirical Fisher diagonal of one batch, each as its documentation shows it.

A peer takes `(model, inputs, targets)` and returns the function to be timed, which returns
`{parameter name: tensor}`. What can be prepared once is prepared before. A peer whose library is
missing raises ImportError; one that refuses the model raises what its library raises.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from statistics import median
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmask import fisher_diagonal
from gradmask.benchmarks.timing import interleave
from gradmask.recipes.training.components import autocast

Diagonal = dict[str, Tensor]
Task = Callable[[], Diagonal]
Result = TypeVar("Result")


def in_precision(task: Callable[[], Result], device: str, precision: str) -> Callable[[], Result]:
    """A task in float32 without TF32, which PyTorch allows in convolutions, or under autocast.

    Args:
        task: The task.
        device: Device it runs on.
        precision: `float32`, `bf16` or `fp16`.

    Returns:
        The task to run.
    """

    def run() -> Result:
        with (
            autocast(precision, torch.device(device)),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            return task()

    return run


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over samples, and the tokens of a sample."""
    return F.cross_entropy(logits, targets, reduction="sum")


def plain(model: nn.Module, inputs: Tensor, targets: Tensor) -> Task:
    """No Fisher information: one forward and backward with the ordinary gradients, in eval mode."""

    def task() -> Diagonal:
        model.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        return {}

    return task


def gradmask_diagonal(model: nn.Module, inputs: Tensor, targets: Tensor) -> Task:
    """`gradmask.fisher_diagonal`."""
    return lambda: fisher_diagonal(model, [(inputs, targets)])


def loop(model: nn.Module, inputs: Tensor, targets: Tensor) -> Task:
    """One sample at a time."""
    parameters = dict(model.named_parameters())

    def task() -> Diagonal:
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for x, y in zip(inputs.split(1), targets.split(1), strict=True):
            gradients = torch.autograd.grad(_nll(model(x), y), list(parameters.values()))
            for accumulated, gradient in zip(total.values(), gradients, strict=True):
                accumulated.addcmul_(gradient, gradient, value=1 / len(inputs))
        return {name: t.detach() for name, t in total.items()}

    return task


def _squares(model: nn.Module) -> tuple[Callable[..., Diagonal], Diagonal]:
    """Sum over samples of squared gradients by `torch.func.vmap(grad)`, and the parameters."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: Diagonal, x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (parameters, buffers), (x[None],))
        return _nll(logits, y[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def squares(parameters: Diagonal, x: Tensor, y: Tensor) -> Diagonal:
        return {name: g.square().sum(0) for name, g in per_sample(parameters, x, y).items()}

    return squares, parameters


def vmap(model: nn.Module, inputs: Tensor, targets: Tensor) -> Task:
    """`torch.func.vmap(grad)`, with the chunk size that is fastest here."""
    squares, parameters = _squares(model)

    def with_chunk(size: int) -> Task:
        def task() -> Diagonal:
            total = {name: torch.zeros_like(p) for name, p in parameters.items()}
            for x, y in zip(inputs.split(size), targets.split(size), strict=True):
                for name, value in squares(parameters, x, y).items():
                    total[name] += value / len(inputs)
            return total

        return task

    sizes = [size for size in (1, 4, 16, 64) if size <= len(inputs)]
    seconds = interleave({str(size): with_chunk(size) for size in sizes}, 1, inputs.device.type)
    return with_chunk(int(min(seconds, key=lambda size: median(seconds[size]))))


def compiled(model: nn.Module, inputs: Tensor, targets: Tensor) -> Task:
    """The same for the whole batch at once, by `torch.compile`."""
    squares, parameters = _squares(model)
    fast = torch.compile(squares)

    def task() -> Diagonal:
        found = fast(parameters, inputs, targets)
        return {name: value / len(inputs) for name, value in found.items()}

    return task


def backpack(model: nn.Module, inputs: Tensor, targets: Tensor) -> Task:
    """BackPACK's `SumGradSquared`."""
    from backpack import backpack as context
    from backpack import extend
    from backpack.extensions import SumGradSquared

    residual = any("Block" in type(m).__name__ for m in model.modules())
    extended = extend(copy.deepcopy(model).eval(), use_converter=residual)
    extended.eval()
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))

    def task() -> Diagonal:
        extended.zero_grad()
        with context(SumGradSquared()):
            loss(extended(inputs), targets).backward()
        names = [name for name, _ in model.named_parameters()]
        found = [p.sum_grad_squared / len(inputs) for p in extended.parameters()]
        return dict(zip(names, found, strict=True))

    return task


def opacus(model: nn.Module, inputs: Tensor, targets: Tensor) -> Task:
    """Opacus' `GradSampleModule`."""
    from opacus import GradSampleModule

    # It captures in training mode only; it refuses the layers that this would change.
    wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum").train()
    names = [name for name, _ in model.named_parameters()]

    def task() -> Diagonal:
        wrapped.zero_grad()
        _nll(wrapped(inputs), targets).backward()
        squares = [p.grad_sample.square().mean(0) for p in wrapped.parameters()]
        return dict(zip(names, squares, strict=True))

    return task


def nngeometry(model: nn.Module, inputs: Tensor, targets: Tensor) -> Task:
    """Library nngeometry: `PMatDiag` of the labels' log-likelihood."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader, TensorDataset

    layers = LayerCollection.from_model(model)
    modules, _ = layers.get_layerid_module_maps(model)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=len(inputs))

    def log_likelihood(x: Tensor, y: Tensor) -> Tensor:
        log_p: Tensor = model(x).log_softmax(1)
        return log_p.gather(1, y[:, None]).flatten(1).sum(1, keepdim=True)

    def task() -> Diagonal:
        backend = TorchHooksJacobianBackend(model=model, function=log_likelihood)
        flat = PMatDiag(generator=backend, examples=loader).get_diag()
        shapes = {name: p.shape for name, p in layers.named_parameters(modules)}
        parts = flat.split([shape.numel() for shape in shapes.values()])
        return {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}

    return task


def laplace(model: nn.Module, inputs: Tensor, targets: Tensor) -> Task:
    """The empirical Fisher diagonal of laplace-torch, by its default for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from laplace.curvature import CurvlinopsEF

    backend = CurvlinopsEF(model, "classification")

    def task() -> Diagonal:
        flat = backend.diag(inputs, targets)[1] / len(inputs)
        parts = flat.split([p.numel() for p in model.parameters()])
        return {
            n: part.view_as(p) for (n, p), part in zip(model.named_parameters(), parts, strict=True)
        }

    return task


PEERS = {
    "loop of single samples": loop,
    "torch.func.vmap": vmap,
    "torch.compile of vmap": compiled,
    "BackPACK": backpack,
    "opacus": opacus,
    "nngeometry": nngeometry,
    "laplace-torch": laplace,
}

logging.getLogger("torch.fx").setLevel(logging.ERROR)
