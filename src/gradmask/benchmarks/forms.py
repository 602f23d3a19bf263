"""What the influence is timed against: the gradients and passes that any way to it needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp

import gradmask
from gradmask.fisher.calls import per_sample_together
from gradmask.fisher.capture import Capture

Task = Callable[[], object]
Gradients = dict[str, Tensor]

PASS = 28  # samples at a time: larger batches of the CIFAR ResNet-18 are slower on a CPU


def plain(model: nn.Module, inputs: Tensor, targets: Tensor) -> Task:
    """Forward and backward with the ordinary gradients of each batch."""

    def task() -> None:
        for x, y in zip(inputs.split(PASS), targets.split(PASS), strict=True):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()

    return task


def per_sample_gradients(model: nn.Module, inputs: Tensor, targets: Tensor) -> Task:
    """Every sample's gradient, formed layer by layer in the cache and thrown away.

    The fastest way to them that we know: `torch.func.vmap(grad)` takes about three times as long
    (`gradmask bench fisher`).
    """
    parameters = dict(model.named_parameters())

    def task() -> None:
        for x, y in zip(inputs.split(PASS), targets.split(PASS), strict=True):
            with Capture(model, parameters, len(x)) as capture:
                outputs = model(x)
                capture.resolve(outputs)
                for calls in capture.gradients(F.cross_entropy(outputs, y, reduction="sum")):
                    with torch.no_grad():
                        for n in range(len(x)):
                            per_sample_together(calls, slice(n, n + 1))

    return task


def gradients_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> list[Gradients]:
    """The gradient of each sample, by autograd."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = []
    for x, y in zip(inputs.split(1), targets.split(1), strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
        found.append(dict(zip(names, gradients, strict=True)))
    return found


def perturbed_passes(
    model: nn.Module, gradients: list[Gradients], probe: Tensor, step: float
) -> Task:
    """Forward passes of the probe samples with the weights after each source's step."""
    here = {name: p.detach() for name, p in model.named_parameters()}

    def task() -> None:
        with torch.no_grad():
            for gradient in gradients:
                moved = {n: torch.sub(here[n], g, alpha=step) for n, g in gradient.items()}
                for x in probe.split(PASS):
                    functional_call(model, moved, (x,))

    return task


def jacobian_products(model: nn.Module, gradients: list[Gradients], probe: Tensor) -> Task:
    """`torch.func.jvp` of the logits along each source's gradient."""
    here = {name: p.detach() for name, p in model.named_parameters()}

    def task() -> None:
        with torch.no_grad():
            for gradient in gradients:
                for x in probe.split(PASS):
                    jvp(lambda p, x=x: functional_call(model, p, (x,)), (here,), (gradient,))

    return task


def _bounded(method: str, fisher: str, mebibytes: int) -> Callable[..., Task]:
    """Influence of half of the samples on the others; of four if each has passes of its own."""

    def prepare(model: nn.Module, inputs: Tensor, targets: Tensor) -> Task:
        half = len(inputs) // 2
        n = half if fisher == "empirical" else min(half, 4)
        probe = (inputs[half:], targets[half:]) if fisher == "empirical" else inputs[half:]
        return lambda: gradmask.influence(
            model,
            (inputs[:n], targets[:n]),
            probe,
            method=method,
            fisher=fisher,
            memory=mebibytes << 20,
        )

    return prepare


FORMS = {
    "Gram matrix": ("quadratic", "empirical"),
    "diagonal": ("diagonal", "empirical"),
    "quadratic": ("quadratic", "exact"),
    "kl": ("kl", "exact"),
}
MEBIBYTES = (256, 1024)
# What is measured in a process of its own, by name.
MEMORY = {f"{form}, {m}": _bounded(*FORMS[form], m) for form in FORMS for m in MEBIBYTES}
