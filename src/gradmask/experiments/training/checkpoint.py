"""A run's state on disk, from which it goes on bit for bit as if nothing had interrupted it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradmask.errors import GradmaskWarning, StateError
from gradmask.experiments.config import EXTENDABLE, NOT_RESULTS, Comparison, to_plain
from gradmask.experiments.data.images import ImageData
from gradmask.experiments.files import atomic_file, read_tensors
from gradmask.experiments.training.weights import check_shapes

VERSION = 1
NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def describe_run(config: Comparison, data: ImageData, arm: str, seed: int) -> dict[str, Any]:
    """What a run's numbers depend on, by which the checkpoint of another run is refused.

    Args:
        config: Options of the arm.
        data: Images of the run.
        arm: The arm.
        seed: The seed.

    Returns:
        Plain values by name.
    """
    options = to_plain(config).items()
    return {
        "arm": arm,
        "seed": seed,
        "images": list(data.train_images.shape),
        **{name: v for name, v in options if name not in (*EXTENDABLE, *NOT_RESULTS)},
    }


def has_checkpoint(directory: Path) -> bool:
    """Whether the folder of a run holds a checkpoint."""
    return any((directory / name).exists() for name in (NEWEST, PREVIOUS))


def save_checkpoint(directory: Path, run: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all, and keep the one before it.

    Args:
        directory: The run's folder.
        run: What `describe_run` returned.
        state: Tensors and plain values, with the network's under `model`.
    """
    with atomic_file(directory / NEWEST, previous=directory / PREVIOUS) as file:
        torch.save({"version": VERSION, "run": run, **state}, file)


def load_checkpoint(
    directory: Path, run: dict[str, Any], model: nn.Module
) -> dict[str, Any] | None:
    """Read the newest checkpoint of a run that is not damaged.

    Args:
        directory: The run's folder.
        run: What `describe_run` returned.
        model: The run's network, which is not changed.

    Returns:
        The state that was saved, or None if there is none.

    Raises:
        StateError: If all checkpoints are damaged, or the newest sound one is of another version,
            run or network. No file is changed then.
    """
    damaged: Path | None = None
    for path in (directory / NEWEST, directory / PREVIOUS):
        if not path.exists():  # as the newest, if its process was killed between two renames
            continue
        try:
            state = read_tensors(path)
        except StateError:
            damaged = damaged or path
            continue
        _check(path, state, run, model)
        if damaged:
            warnings.warn(
                f"{damaged} is damaged: going on from the checkpoint before it.",
                GradmaskWarning,
                stacklevel=3,
            )
            os.replace(path, damaged)  # or the next checkpoint would keep the damaged one
        return dict(state)
    if damaged:
        raise StateError(f"{damaged} is damaged, and no other is sound: {_mend(directory)}")
    return None


def remove_checkpoints(directory: Path) -> None:
    """Remove the checkpoints of a run whose results are kept, or that is of no use any more."""
    for name in (PREVIOUS, NEWEST):
        (directory / name).unlink(missing_ok=True)


def _check(path: Path, state: Any, run: dict[str, Any], model: nn.Module) -> None:
    mend = _mend(path.parent)
    version = state.get("version") if isinstance(state, dict) else None
    if version != VERSION:
        raise StateError(
            f"{path} is of version {version}; this gradmask reads version {VERSION}: {mend}"
        )
    for name, expected in run.items():
        found = state["run"].get(name)
        if found != expected:
            raise StateError(
                f"{path} is of another run, with {name}={found!r}, not {expected!r}: {mend}"
            )
    check_shapes(path, state["model"], model, mend)


def _mend(directory: Path) -> str:
    return f"delete the folder {directory} to train this run anew, or choose another --output."
