"""`gradmask bench step` and `gradmask bench threshold`: what the mask itself costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch.optim import SGD, AdamW, Optimizer

from gradmask import FisherMask, global_threshold
from gradmask.benchmarks.memory import peak_of
from gradmask.benchmarks.timing import interleave, ratio
from gradmask.benchmarks.workloads import make
from gradmask.seeding import seeded_generator

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p, **way: SGD(p, 1e-6, momentum=0.9, weight_decay=5e-4, **way),
    "AdamW": lambda p, **way: AdamW(p, 1e-6, **way),
}


def bench_step(
    name: str,
    *,
    batch_size: int | None = None,
    rounds: int = 7,
    device: str = "cpu",
    shape: Sequence[int] | None = None,
) -> Table:
    """Time the steps of SGD (momentum, weight decay) and AdamW with and without a mask.

    Args:
        name: A workload (see `gradmask.benchmarks.workloads.find_workload`).
        batch_size: Samples in the batch of the training step (default: the workload's own).
        rounds: Times everything is timed.
        device: Device to measure on.
        shape: Shape of one sample (default: the workload's own).

    Returns:
        Table: milliseconds of the unmasked step (median), the masked step as a multiple of it
        (median of the rounds' ratios) in both scopes, the time that the mask adds as a share of
        forward, backward and step, and the masked and clipped step (`clip_grad_norm_` of the
        mask) as a multiple of one that PyTorch clips.
    """
    model, inputs, targets = make(name, batch_size, device, shape)
    parameters = list(model.parameters())

    def backward() -> None:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()

    backward()
    count = sum(p.numel() for p in parameters)
    table = Table(title=f"{name}, {count / 1e6:.1f} M parameters, {device}, keep 0.25")
    titles = "optimizer", "step, ms", "masked ÷ not", "update ÷ not", "of a training step"
    for title in (*titles, "clipped: masked ÷ not"):
        table.add_column(title, justify="left" if title == "optimizer" else "right")
    for title, build in OPTIMIZERS.items():
        for way in ("for-loop", "foreach", "fused"):
            options = {"foreach": way == "foreach", "fused": way == "fused"}
            tasks: dict[str, Callable[[], Any]] = {}
            for scope in ("none", "gradient", "update"):
                optimizer = build(parameters, **options)
                backward()
                optimizer.step()  # as in the first epoch, without a mask: no state is zero
                if scope != "none":
                    mask = FisherMask(model, 0.25, scope=scope)
                    mask.update(_information(model))
                    mask.attach(optimizer)
                tasks[scope] = optimizer.step
                if scope != "update":
                    clip = (
                        mask.clip_grad_norm_
                        if scope == "gradient"
                        else partial(torch.nn.utils.clip_grad_norm_, parameters)
                    )
                    tasks[f"clipped, {scope}"] = partial(_clipped, clip, optimizer.step)
            seconds = interleave(tasks | {"backward": backward}, rounds, device)
            plain = median(seconds["none"])
            added = (ratio(seconds, "gradient", "none") - 1) * plain
            share = added / (plain + median(seconds["backward"]))
            table.add_row(
                f"{title}, {way}",
                f"{1e3 * plain:.2f}",
                f"{ratio(seconds, 'gradient', 'none'):.2f}",
                f"{ratio(seconds, 'update', 'none'):.2f}",
                f"{100 * share:.1f} %",
                f"{ratio(seconds, 'clipped, gradient', 'clipped, none'):.2f}",
            )
    return table


def _clipped(clip: Callable[[float], Any], step: Callable[[], Any]) -> None:
    clip(1.0)
    step()


def _information(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random values in place of a Fisher diagonal: kept entries lie anywhere, the worst case."""
    generator = seeded_generator("step")
    return {
        name: torch.rand(p.shape, generator=generator).to(p.device)
        for name, p in model.named_parameters()
    }


def bench_threshold(
    *, entries: int = 10**8, tensors: int = 60, rounds: int = 7, device: str = "cpu"
) -> Table:
    """Time the exact global threshold against one reading of the entries.

    Args:
        entries: Entries in all, float32.
        tensors: Tensors they are in.
        rounds: Times everything is timed.
        device: Where they are.

    Returns:
        Table: milliseconds (median), multiples of a sum (median of the rounds' ratios), memory
        used on top as a share of the entries', and whether the threshold is that of sorting.
    """
    generator = seeded_generator("threshold")
    fisher = {
        str(i): torch.rand(entries // tensors, generator=generator).mul_(30).sub_(25).exp_()
        for i in range(tensors)
    }
    fisher = {name: t.to(device) for name, t in fisher.items()}
    tasks: dict[str, Callable[[], Any]] = {
        "one reading (sum)": lambda: [t.sum() for t in fisher.values()],
        "threshold, keep 0.25": lambda: global_threshold(fisher, 0.25),
    }
    seconds = interleave(tasks, rounds, device)
    size = 4 * entries
    extra = peak_of(tasks["threshold, keep 0.25"], device) * 2**20 / size
    found = global_threshold(fisher, 0.25)
    joined = torch.cat([t.reshape(-1).cpu() for t in fisher.values()])
    exact = joined.sort(descending=True).values[-(-len(joined) // 4) - 1]
    table = Table(title=f"{entries:,} float32 entries in {tensors} tensors, {device}")
    for title in ("", "ms", "÷ sum", "extra memory", "as sorted"):
        table.add_column(title, justify="left" if not title else "right")
    for task in tasks:
        multiple = ratio(seconds, task, "one reading (sum)")
        own = "threshold" in task
        table.add_row(
            task,
            f"{1e3 * median(seconds[task]):.1f}",
            f"{multiple:.2f}",
            f"{100 * extra:.2f} %" if own else "",
            ("yes" if torch.equal(found, exact) else "NO") if own else "",
        )
    return table
