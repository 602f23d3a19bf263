"""`gradmask bench refresh`: how many samples a mask needs, and what they cost.

A network is trained; after some of its epochs the Fisher diagonal is measured on growing random
parts of the training images, and the masks it gives are compared with the mask of all of them; so
are the mask of what training's own backward passes collected in that epoch, without BatchNorm, and
those of averages over the ends of all epochs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradmask import FisherMask, fisher_diagonal, make_masks
from gradmask.averaging import RunningAverage
from gradmask.errors import OptionError
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.batches import Batches
from gradmask.recipes.data.images import load_images
from gradmask.recipes.plots import STYLE, to_svg
from gradmask.recipes.training.components import resolve_device
from gradmask.recipes.training.run import Row, train_run
from gradmask.seeding import seeded_generator
from gradmask.study.environment import environment
from gradmask.study.files import remove_temporaries, write_atomically, write_json
from gradmask.study.folder import has_checkpoint, mark_folder, open_folder, run_directory
from gradmask.study.options import to_plain
from gradmask.study.spec import Spec

SIZES = (250, 500, 1000, 2000, 4000, 8000, 16000)
KEEPS = (0.25, 0.5, 0.75)
ONLINE: dict[str, dict[str, Any]] = {  # what is collected in training
    "1 of 10 batches": {"every": 10},
    "1 of 3 batches": {"every": 3},
    "every batch": {},
    "every batch, β = 0.9": {"average": 0.9},
    "every batch, β = 0.98": {"average": 0.98},
}

SHARES = (0.01, 0.02, 0.05)  # of the images, measured at the end of each epoch and averaged
BETAS = (0.0, 0.3, 0.5, 0.7, 0.9)
_FEWEST = 100


def bench_refresh(
    config: Comparison, *, at: Sequence[int] | None = None, draws: int = 3
) -> dict[str, Any]:
    """Train one network and measure the overlap of masks from parts of the data with that of all.

    Args:
        config: Options of the training run; its first seed is taken, and no mask.
        at: Epochs after which to measure (default: after a third of them, and the last).
        draws: Random orders of the images; every part is the beginning of one.

    Returns:
        Contents of `refresh.json`, which is written to the output folder with a figure.

    Raises:
        OptionError: If the folder holds runs of `gradmask run`, or other files.
        Diverged: If training diverges.
    """
    epochs = sorted(set(at or (max(1, config.epochs // 3), config.epochs)))
    device, seed = resolve_device(config.device), config.seeds[0]
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    results: dict[str, Any] = {
        "config": to_plain(config),
        "environment": environment(device.type),
        "measurements": [],
    }
    console = Console()
    online, averaged = _Online(), _Averaged()

    def observe(row: Row, model: nn.Module, images: Batches) -> None:
        console.print(
            f"epoch {row['epoch']}: test accuracy {100 * row['test_accuracy']:.1f} %, "
            f"{row['seconds']:.0f} s",
            highlight=False,
        )
        collected = online.diagonals(model) | averaged.diagonals(model, images, row["epoch"])
        if row["epoch"] in epochs:
            curves = [overlap_curve(model, images, draw) for draw in range(draws)]
            results["measurements"].append(
                {
                    "after_epoch": row["epoch"],
                    "epoch_seconds": row["seconds"],
                    "test_accuracy": row["test_accuracy"],
                    "draws": curves,
                }
            )
            if collected:
                full = make_all(fisher_diagonal(model, images))
                masks = {name: make_all(fisher) for name, fisher in collected.items()}
                results["measurements"][-1]["others"] = {
                    name: {str(keep): overlap(found[keep], full[keep]) for keep in KEEPS}
                    for name, found in masks.items()
                }
            write_json(config.output / "refresh.json", results)
            write_atomically(config.output / "refresh.svg", overlap_figure(results))
            console.print(overlap_table(results["measurements"][-1]))

    config = replace(config, seeds=(seed,), arms=("none",))
    with ExitStack() as stack:
        _, held = open_folder(config, stack)
        directory = run_directory(config.output, Spec("none", seed))
        if held["runs"] or has_checkpoint(directory):  # its weights and logs would be lost
            raise OptionError(
                f"{config.output} holds runs of `gradmask run`: choose another --output."
            )
        data = load_images(config, seed)
        mark_folder(config.output)
        remove_temporaries(config.output)
        # Every epoch is to be observed, so the run does not go on from a checkpoint.
        train_run(config, data, "none", seed, directory, observe=observe, checkpoints=False)
    return results


class _Online:
    """What training itself tells of the Fisher diagonal, from the second epoch on."""

    def __init__(self) -> None:
        self._collectors: dict[str, Any] = {}

    def diagonals(self, model: nn.Module) -> dict[str, dict[str, Tensor]]:
        """What the epoch collected; nothing in the first, or where BatchNorm mixes the samples."""
        if any(isinstance(module, _BatchNorm) for module in model.modules()):
            return {}
        if not self._collectors:
            for name, options in ONLINE.items():
                self._collectors[name] = FisherMask(model).collect(**options)
                self._collectors[name].start()
            return {}
        # Of a short epoch perhaps no batch was due.
        collected = {name: c for name, c in self._collectors.items() if not c.empty}
        found = {f"online: {name}": one.diagonal() for name, one in collected.items()}
        for name, collector in self._collectors.items():
            if "average" not in ONLINE[name]:
                collector.clear()
        return found


class _Averaged:
    """Averages over the ends of epochs, of the diagonals of small random parts of the images."""

    def __init__(self) -> None:
        pairs = [(share, beta) for share in SHARES for beta in BETAS]
        self._averages = {pair: RunningAverage(pair[1]) for pair in pairs}

    def diagonals(self, model: nn.Module, images: Batches, epoch: int) -> dict[str, Any]:
        """The averages up to this epoch."""
        total, found = len(images.labels), {}
        for share in SHARES:
            generator = seeded_generator(epoch, "averaged", str(share))
            chosen = torch.randperm(total, generator=generator)[
                : max(_FEWEST, round(share * total))
            ]
            chosen = chosen.to(images.labels.device)
            part = replace(images, images=images.images[chosen], labels=images.labels[chosen])
            measured = {"square": fisher_diagonal(model, part)}
            for beta in BETAS:
                average, values = self._averages[share, beta].add(measured, ())
                self._averages[share, beta] = average
                found[f"{share:.0%} each epoch, β = {beta}"] = dict(values["square"])
        return found


def make_all(fisher: dict[str, Tensor]) -> dict[float, dict[str, Tensor]]:
    """The masks of every share kept."""
    return {keep: make_masks(fisher, keep) for keep in KEEPS}


def overlap_curve(model: nn.Module, images: Batches, draw: int) -> list[dict[str, Any]]:
    """Overlap of masks from the first images of a random order with the mask from all of them.

    Args:
        model: The network.
        images: The training images.
        draw: Seed of the order.

    Returns:
        For every size: `samples`, `seconds` of the pass, and `overlap`, intersection over union
        of the kept entries, by share kept.
    """
    total = len(images.labels)
    order = torch.randperm(total, generator=seeded_generator(draw, "overlap"))
    order = order.to(images.labels.device)
    sizes = [*(size for size in SIZES if size < total), total]
    sums: dict[str, Tensor] = {}
    seconds, start = 0.0, 0
    masks = []
    for size in sizes:
        chosen = order[start:size]
        part = replace(images, images=images.images[chosen], labels=images.labels[chosen])
        began = time.perf_counter()
        fisher = fisher_diagonal(model, part)
        seconds += time.perf_counter() - began
        for name, diagonal in fisher.items():
            sums[name] = sums.get(name, 0) + diagonal * len(chosen)
        masks.append((size, seconds, make_all(sums)))
        start = size
    full = masks[-1][2]
    return [
        {
            "samples": size,
            "seconds": seconds,
            "overlap": {str(keep): overlap(found[keep], full[keep]) for keep in KEEPS},
        }
        for size, seconds, found in masks
    ]


def overlap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Intersection over union of the entries that two masks keep."""
    both = sum(int((a[name] & b[name]).sum()) for name in a)
    either = sum(int((a[name] | b[name]).sum()) for name in a)
    return both / either


def overlap_table(measurement: dict[str, Any]) -> Table:
    """Table of one measurement: mean over the draws (standard deviation in brackets)."""
    epoch = measurement["after_epoch"]
    table = Table(title=f"After epoch {epoch}: overlap with the mask from all images")
    table.add_column("samples", justify="right")
    table.add_column("÷ epoch's time", justify="right")
    for keep in KEEPS:
        table.add_column(f"keep {keep}", justify="right")
    for points in zip(*measurement["draws"], strict=True):
        share = mean(p["seconds"] for p in points) / measurement["epoch_seconds"]
        cells = []
        for keep in KEEPS:
            found = [p["overlap"][str(keep)] for p in points]
            spread = f" ({stdev(found):.4f})" if len(found) > 1 else ""
            cells.append(f"{mean(found):.4f}{spread}")
        table.add_row(f"{points[0]['samples']:,}", f"{share:.3f}", *cells)
    for name, found in measurement.get("others", {}).items():
        table.add_row(name, "", *(f"{found[str(keep)]:.4f}" for keep in KEEPS))
    return table


def overlap_figure(results: dict[str, Any]) -> str:
    """Overlap against samples for each share kept, one panel for each measurement, as SVG."""
    with mpl.rc_context(STYLE):
        measurements = results["measurements"]
        figure = Figure(figsize=(5 * len(measurements), 3.6), layout="constrained")
        panels = figure.subplots(1, len(measurements), sharey=True, squeeze=False)[0]
        for axes, measurement in zip(panels, measurements, strict=True):
            samples = [point["samples"] for point in measurement["draws"][0]]
            for keep in KEEPS:
                overlaps = [
                    mean(point["overlap"][str(keep)] for point in points)
                    for points in zip(*measurement["draws"], strict=True)
                ]
                axes.plot(samples, overlaps, marker="o", markersize=3, label=f"keep {keep}")
            axes.axhline(0.95, color="#888888", linewidth=0.8, linestyle="--")
            axes.set_xscale("log")
            axes.set_xticks(samples, [f"{n:,}" for n in samples], rotation=45)
            axes.minorticks_off()
            axes.set_xlabel("training images in the Fisher pass")
            axes.set_title(f"After epoch {measurement['after_epoch']}")
        panels[0].set_ylabel("overlap with the mask from all images")
        panels[-1].legend(loc="lower right")
        return to_svg("refresh", figure)
