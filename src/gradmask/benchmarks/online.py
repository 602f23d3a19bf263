"""`gradmask bench online`: training steps that collect the Fisher diagonal, against plain ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from rich.table import Table

from gradmask.benchmarks.memory import peak_megabytes
from gradmask.benchmarks.steps import collecting_step, repeated, training_step
from gradmask.benchmarks.timing import interleave, ratio
from gradmask.benchmarks.workloads import make

EVERY = 10  # the mask's own default


def bench_online(
    name: str,
    *,
    batch_size: int | None = None,
    rounds: int = 7,
    device: str = "cpu",
    shape: Sequence[int] | None = None,
) -> Table:
    """Time training steps with AdamW, in float32, with and without `FisherMask.collect`.

    Args:
        name: A workload (see `gradmask.benchmarks.workloads.find_workload`) that trains without
            BatchNorm.
        batch_size: Samples in the batch (default: the workload's own).
        rounds: Times everything is timed.
        device: Device to measure on.
        shape: Shape of one sample (default: the workload's own).

    Returns:
        Table: milliseconds a step (median), ratio to a plain step (median of the rounds' ratios),
        and peak memory of the process above its start (CPU) or of the device (CUDA).
    """
    model, inputs, targets = make(name, batch_size, device, shape)
    given = model, inputs, targets
    tasks: dict[str, Callable[[], Any]] = {
        "training step": training_step(*given),
        "collecting step": collecting_step(*given),
        f"{EVERY} steps": repeated(training_step(*given), EVERY),
        f"{EVERY} steps, 1 collects": repeated(collecting_step(*given, EVERY), EVERY),
    }
    seconds = interleave(tasks, rounds, device)
    size = f"batch {len(inputs)}, {device}, {torch.get_num_threads()} threads"
    table = Table(title=f"{name}, {size}, torch {torch.__version__}")
    for title in ("", "ms / step", "÷ plain", "peak MB"):
        table.add_column(title, justify="right" if title else "left")
    for way, base, steps in (
        ("training step", "training step", 1),
        ("collecting step", "training step", 1),
        (f"{EVERY} steps, 1 collects", f"{EVERY} steps", EVERY),
    ):
        memory = ""
        if steps == 1:
            memory = f"{peak_megabytes(name, way, len(inputs), device, shape):.0f}"
        ms = 1e3 * median(seconds[way]) / steps
        table.add_row(way, f"{ms:.1f}", f"{ratio(seconds, way, base):.2f}", memory)
    return table
