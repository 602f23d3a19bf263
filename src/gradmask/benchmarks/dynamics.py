"""`gradmask bench dynamics`: training steps that note what they say of each sample."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from rich.table import Table
from torch import nn

from gradmask.audit import Dynamics
from gradmask.benchmarks.timing import interleave, ratio
from gradmask.recipes.config import Comparison
from gradmask.recipes.training.models import build_model

STEPS, CLASSES, SIZE = 10, 20, 32


def bench_dynamics(
    name: str,
    *,
    width: int | None = None,
    stem_stride: int = 1,
    batch_size: int = 128,
    samples: int = 1_200_000,
    rounds: int = 15,
    device: str = "cpu",
) -> Table:
    """Time training steps on small images with SGD, with and without `Dynamics.update`.

    Args:
        name: A model of `gradmask run`.
        width: Its width.
        stem_stride: Stride of its first convolution.
        batch_size: Images in a batch.
        samples: Training samples that are followed.
        rounds: Times everything is timed.
        device: Device to measure on.

    Returns:
        Table: milliseconds a step (median), ratio to a plain step (median of the rounds' ratios),
        and megabytes of the dynamics.
    """
    config = Comparison(model=name, width=width, stem_stride=stem_stride)
    model = build_model(config, 3, SIZE, CLASSES).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    inputs = torch.randn(batch_size, 3, SIZE, SIZE, device=device)
    targets = torch.randint(CLASSES, (batch_size,), device=device)
    generator = torch.Generator().manual_seed(0)
    dynamics = Dynamics(samples)

    def step(ids: torch.Tensor | None = None) -> None:
        logits = model(inputs)
        if ids is not None:
            dynamics.update(ids, logits, targets)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, targets).backward()
        optimizer.step()

    def plain() -> None:
        for _ in range(STEPS):
            step()

    def followed() -> None:
        for _ in range(STEPS):
            step(torch.randint(samples, (batch_size,), generator=generator))

    def updates() -> None:
        logits = torch.randn(batch_size, CLASSES, device=device)
        for _ in range(STEPS):
            ids = torch.randint(samples, (batch_size,), generator=generator)
            dynamics.update(ids, logits, targets)

    tasks: dict[str, Callable[[], object]] = {
        "training step": plain,
        "with Dynamics": followed,
        "update alone": updates,
    }
    seconds = interleave(tasks, rounds, device)
    state = [value for value in dynamics.state_dict().values() if isinstance(value, torch.Tensor)]
    memory = sum(value.numel() * value.element_size() for value in state) / 1e6
    size = f"batch {batch_size}, {device}, {torch.get_num_threads()} threads"
    table = Table(title=f"{name}, {size}, {samples:,} samples, torch {torch.__version__}")
    for title in ("", "ms / step", "÷ plain", "MB"):
        table.add_column(title, justify="right" if title else "left")
    for task in tasks:
        ms = 1e3 * median(seconds[task]) / STEPS
        kept = "" if task == "training step" else f"{memory:.0f}"
        table.add_row(task, f"{ms:.2f}", f"{ratio(seconds, task, 'training step'):.3f}", kept)
    return table
