"""Checkpoints of a run whose parameters are in shards: every process writes its own.

A checkpoint is a folder: what `torch.distributed.checkpoint` writes, and `run.pt` with everything
that is not in shards and the SHA-256 sum of every other file. The index that
`torch.distributed.checkpoint` writes is pickled, so no file is read by it before all sums agree.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from gradmask.errors import StateError
from gradmask.study.files import read_tensors
from gradmask.study.world import World
from gradmask.tensor_files import atomic_file

RUN_FILE = "run.pt"


def save_shards(
    folder: Path, previous: Path, plain: dict[str, Any], tensors: dict[str, Any], world: World
) -> None:
    """Write a checkpoint whole or not at all, and keep the one before it.

    Args:
        folder: Where to write.
        previous: Where the folder that is there goes.
        plain: Plain values and whole tensors, the same in every process.
        tensors: Nested dicts of DTensors.
        world: This process among all.
    """
    new = folder.with_name(f".{folder.name}.tmp")
    world.from_main(lambda: shutil.rmtree(new, ignore_errors=True), "writing a checkpoint")
    save(tensors, checkpoint_id=new)
    names = sorted(path.name for path in new.iterdir())
    sums = {name: _sum(new / name) for name in names[world.rank :: world.size]}

    def finish(sums: dict[str, str]) -> None:
        with atomic_file(new / RUN_FILE) as file:
            torch.save({**plain, "files": sums}, file)
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.replace(folder, previous)
        os.replace(new, folder)

    together = {name: found for part in world.gather(sums) for name, found in part.items()}
    world.from_main(lambda: finish(together), "writing a checkpoint")


def read_plain(folder: Path, world: World) -> dict[str, Any]:
    """Read what is not in shards, after a check of all files.

    Args:
        folder: A checkpoint.
        world: This process among all.

    Returns:
        What was saved as `plain`.

    Raises:
        StateError: In every process, if a file is damaged or missing.
    """
    damaged = None
    try:
        plain: dict[str, Any] = read_tensors(folder / RUN_FILE)
        sums = plain.pop("files")
        if sums.keys() != {path.name for path in folder.iterdir()} - {RUN_FILE}:
            raise KeyError("files are missing, or others there")
        names = sorted(sums)[world.rank :: world.size]
        damaged = next((n for n in names if _sum(folder / n) != sums[n]), None)
    except (StateError, OSError, KeyError, AttributeError, TypeError):
        damaged = RUN_FILE
    for found in world.gather(damaged):
        if found is not None:
            raise StateError(f"{folder / found} is damaged: delete the run's folder.")
    return plain


def read_shards(folder: Path, tensors: dict[str, Any]) -> None:
    """Read the shards of this process.

    Args:
        folder: A checkpoint.
        tensors: What was saved as `tensors`, of the same names and shapes; filled in place.
    """
    load(tensors, checkpoint_id=folder)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
