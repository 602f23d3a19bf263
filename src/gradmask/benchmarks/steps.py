"""Training steps, with and without collecting the Fisher diagonal."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from gradmask import FisherMask
from gradmask.benchmarks.peers import Task


def training_step(model: nn.Module, inputs: Tensor, targets: Tensor) -> Task:
    """Forward, backward and a step of AdamW, in train mode."""
    optimizer = AdamW(model.parameters(), 1e-6)

    def task() -> dict[str, Tensor]:
        model.train()
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        return {}

    return task


def collecting_step(model: nn.Module, inputs: Tensor, targets: Tensor, every: int = 1) -> Task:
    """The same; one of `every` with the squares of its per-sample gradients."""
    step, mask = training_step(model, inputs, targets), FisherMask(model)

    def task() -> dict[str, Tensor]:
        with mask.collect(every=every):
            return step()

    return task


def repeated(step: Task, count: int) -> Callable[[], list[dict[str, Tensor]]]:
    """So many steps one after the other."""
    return lambda: [step() for _ in range(count)]


STEPS = {"training step": training_step, "collecting step": collecting_step}
