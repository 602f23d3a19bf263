"""Interleaved timing: every task once a round, so that a noisy machine is noisy for all."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch


def interleave(
    tasks: dict[str, Callable[[], object]],
    rounds: int = 7,
    device: str = "cpu",
    warm: bool = True,
) -> dict[str, list[float]]:
    """Time every task once in each round, in an order that turns by one from round to round.

    Args:
        tasks: What to time, by name.
        rounds: Times each task is timed.
        device: Device to wait for.
        warm: Run each task once before, untimed.

    Returns:
        Seconds of every round, by name.
    """
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    for task in tasks.values() if warm else ():
        task()
    names = list(tasks)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            wait()
            started = time.perf_counter()
            tasks[name]()
            wait()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of one task's time divided by another's in the same round.

    Args:
        seconds: What `interleave` returned.
        name: The task in the numerator.
        base: The task in the denominator.

    Returns:
        The ratio.
    """
    pairs = zip(seconds[name], seconds[base], strict=True)
    return median(first / second for first, second in pairs)
