"""Peak memory of one task, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gradmask.benchmarks import forms, peers, steps
from gradmask.benchmarks.workloads import make

TASKS = {
    "plain forward + backward": peers.plain,
    "gradmask": peers.gradmask_diagonal,
    **peers.PEERS,
    **forms.MEMORY,
    **steps.STEPS,
}


def peak_megabytes(
    workload: str,
    task: str,
    batch_size: int,
    device: str,
    shape: Sequence[int] | None = None,
    precision: str = "float32",
) -> float:
    """Peak memory of a task above what the model, the batch and the libraries take.

    Args:
        workload: Name of the workload.
        task: `gradmask`, `plain forward + backward`, a peer, or one of `forms.MEMORY`.
        batch_size: Samples in the batch.
        device: Device to measure on.
        shape: Shape of one sample (default: the workload's own).
        precision: `float32`, or autocast to `bf16` or `fp16`.

    Returns:
        Megabytes: resident memory of the process on a CPU, allocated memory on CUDA; NaN if the
        task failed.
    """
    words = [sys.executable, "-m", __spec__.name, workload, task]
    words += map(str, (batch_size, device, precision, *(shape or ())))
    # Freed memory goes back to the system, so that what is resident is what is used.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    found = subprocess.run(words, capture_output=True, text=True, env=environment)
    try:
        return float(found.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return float("nan")


def _main(
    workload: str, task: str, batch_size: str, device: str, precision: str, *shape: str
) -> None:
    small = TASKS[task](*make("mlp", 2, device))
    peers.in_precision(small, device, precision)()  # loads what is loaded at first use
    model, inputs, targets = make(workload, int(batch_size), device, [int(size) for size in shape])
    run = TASKS[task](model, inputs, targets)
    print(peak_of(peers.in_precision(run, device, precision), device))


def peak_of(run: Callable[[], object], device: str) -> float:
    """Peak memory while a function runs, above what is in use before.

    Args:
        run: The function.
        device: Device it runs on.

    Returns:
        Megabytes: resident memory of the process on a CPU, allocated memory on CUDA.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _reset_peak()
    run()
    return (_peak() - before) / 2**20


def _reset_peak() -> int:
    """Forget the highest memory so far where the system can (Linux); return what is in use."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """Highest resident memory of this process, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    _main(*sys.argv[1:])
