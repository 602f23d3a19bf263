"""`gradmask bench fisher`: the Fisher diagonal against a plain pass and against other libraries."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from statistics import median

import torch
from rich.table import Table

from gradmask import fisher_diagonal, gradient_moments, make_masks
from gradmask.benchmarks.memory import peak_megabytes
from gradmask.benchmarks.peers import PEERS, Diagonal, gradmask_diagonal, in_precision, loop, plain
from gradmask.benchmarks.refresh import overlap
from gradmask.benchmarks.timing import interleave, ratio
from gradmask.benchmarks.workloads import make

TOLERANCE = 1e-5  # some work in float32 whatever they are given; beyond it they are wrong
CHECKED = 4  # samples
UNCHECKED = "gradmask, verify=False"
COMPILED = "torch.compile of vmap"
MOMENTS = "gradmask.gradient_moments"  # the mean gradient beside the squares


def bench_fisher(
    name: str,
    *,
    batch_size: int | None = None,
    batches: int | None = None,
    rounds: int = 7,
    device: str = "cpu",
    shape: Sequence[int] | None = None,
    precision: str = "float32",
    peers: bool = True,
) -> Table:
    """Time `fisher_diagonal` on several batches, and what it is compared with.

    Args:
        name: A workload (see `gradmask.benchmarks.workloads.find_workload`).
        batch_size: Samples in a batch (default: the workload's own).
        batches: Batches in one pass of ours, whose check of single samples is most of its first,
            and of the plain one (default: 256 samples, at least 8 batches); a refresh at the
            default settings has 4,000 samples.
        rounds: Times everything is timed.
        device: Device to measure on.
        shape: Shape of one sample (default: the workload's own).
        precision: What everything is timed in: `float32` (without TF32), or autocast to `bf16`
            or `fp16`. Then the title says how far the mask of a quarter agrees with float32's.
        peers: Compare with other libraries, as far as they are installed.

    Returns:
        Table: milliseconds a batch (median), ratio to a plain forward and backward (median of
        the rounds' ratios), peak memory of the process above its start (CPU) or of the device
        (CUDA), and the largest error in float64 against a loop of single samples, relative to the
        largest entry of each tensor.
    """
    model, inputs, targets = make(name, batch_size, device, shape)
    batches = batches or max(8, 256 // len(inputs))
    data = [(inputs, targets)] * batches
    step = plain(model, inputs, targets)
    pass_of_ours = in_precision(lambda: fisher_diagonal(model, data), device, precision)
    unchecked = in_precision(lambda: fisher_diagonal(model, data, verify=False), device, precision)
    tasks: dict[str, Callable[[], object]] = {
        "plain forward + backward": in_precision(
            lambda: [step() for _ in range(batches)], device, precision
        ),
        "gradmask": pass_of_ours,
        UNCHECKED: unchecked,
        MOMENTS: in_precision(lambda: gradient_moments(model, data), device, precision),
    }
    # Checked in float64: in float32 one activation that rounds to the other side of zero shows.
    few = copy.deepcopy(model).double(), inputs[:CHECKED], targets[:CHECKED]
    if inputs.is_floating_point():
        few = few[0], few[1].double(), few[2]
    expected = loop(*few)()
    notes = {
        "plain forward + backward": "",
        "gradmask": _error(gradmask_diagonal(*few)(), expected),
        MOMENTS: _error(gradient_moments(few[0], [few[1:]]).square, expected),
    }
    for peer, prepare in PEERS.items() if peers else ():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                notes[peer] = _error(prepare(*few)(), expected)
                task = in_precision(prepare(model, inputs, targets), device, precision)
                started = time.perf_counter()
                task()
                if peer == COMPILED:
                    notes[peer] += f", compiled in {time.perf_counter() - started:.0f} s"
                tasks[peer] = task
        except Exception as error:
            notes[peer] = f"not measured: {type(error).__name__}: {str(error).splitlines()[0]}"[:60]
    of_many = ("plain forward + backward", "gradmask", UNCHECKED, MOMENTS)
    counts = dict.fromkeys(of_many, batches)  # others: one batch
    seconds = {
        way: [total / counts.get(way, 1) for total in totals]
        for way, totals in interleave(tasks, rounds, device).items()
    }
    size = f"batch {len(inputs)}, {device}, {torch.get_num_threads()} threads"
    if precision != "float32":
        exact = in_precision(lambda: fisher_diagonal(model, data), device, "float32")
        masks = [make_masks(fisher, 0.25) for fisher in (pass_of_ours(), exact())]
        size += f", {precision}: mask overlap {overlap(*masks):.3f}"
    table = Table(title=f"{name}, {size}, torch {torch.__version__}")
    share = ratio(seconds, "gradmask", UNCHECKED) - 1
    table.caption = f"The check of single samples: {share:+.1%} of a pass of {batches} batches."
    for title in ("", "ms / batch", "÷ plain", "peak MB", "error, or why not"):
        table.add_column(title, justify="left" if title in ("", "error, or why not") else "right")
    for way, note in notes.items():
        if way not in seconds:
            table.add_row(way, "", "", "", note)
            continue
        ms = 1e3 * median(seconds[way])
        times = ratio(seconds, way, "plain forward + backward")
        memory = ""  # of what is compiled, mostly the compiler's
        if way not in (COMPILED, MOMENTS):
            memory = f"{peak_megabytes(name, way, len(inputs), device, shape, precision):.0f}"
        table.add_row(way, f"{ms:.1f}", f"{times:.2f}", memory, note)
    return table


def _error(found: Diagonal, expected: Diagonal) -> str:
    if found.keys() != expected.keys():
        return f"wrong: {len(found.keys() ^ expected.keys())} parameters differ"
    # Where all is rounding (biases in front of a softmax), nothing can be compared.
    floor = 1e-20 * max(float(e.abs().max()) for e in expected.values())
    worst = max(
        float((found[n] - e).abs().max() / e.abs().max().clamp_min(floor))
        for n, e in expected.items()
    )
    return f"{worst:.0e}" if worst <= TOLERANCE else f"wrong: relative error {worst:.0e}"
