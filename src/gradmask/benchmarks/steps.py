"""Training steps, with and without collecting the Fisher diagonal."""

from __future__ import annotations

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


def collecting_step(model: nn.Module, inputs: Tensor, targets: Tensor) -> Task:
    """The same with the squares of its per-sample gradients."""
    return _collecting(model, inputs, targets, every=1)


def _collecting(model: nn.Module, inputs: Tensor, targets: Tensor, every: int) -> Task:
    step, mask = training_step(model, inputs, targets), FisherMask(model)

    def task() -> dict[str, Tensor]:
        with mask.collect(every=every):
            return step()

    return task


def many_steps(
    model: nn.Module, inputs: Tensor, targets: Tensor, count: int, every: int | None = None
) -> Task:
    """So many steps one after the other; one of `every` collects."""
    step = training_step(model, inputs, targets)
    mask = FisherMask(model) if every else None

    def task() -> dict[str, Tensor]:
        for _ in range(count):
            if mask is None:
                step()
            else:
                with mask.collect(every=every or 1):
                    step()
        return {}

    return task


STEPS = {"training step": training_step, "collecting step": collecting_step}
