"""A run's state on disk, from which it goes on bit for bit as if nothing had interrupted it."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradmask.distributed import all_ranks_raise
from gradmask.errors import GradmaskWarning, StateError
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.images import ImageData
from gradmask.recipes.identity import data_sum, tensors_sum
from gradmask.recipes.training.shards import read_plain, read_shards, save_shards
from gradmask.recipes.training.state import RunState
from gradmask.recipes.training.weights import check_shapes, shapes
from gradmask.study.files import damaged, read_tensors
from gradmask.study.log import Position
from gradmask.study.options import to_plain
from gradmask.tensor_files import atomic_file

VERSION = 3
NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
SHARDS = ("checkpoint.shards", "checkpoint.shards.previous")
READING = "reading a checkpoint"
_PARTS = {"run", "log", "epoch", "rows", "processes"}


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
        "contents": data_sum(data),
        "given_labels": tensors_sum({"labels": data.train_labels}),
        **{name: v for name, v in options if name not in (*config.EXTENDABLE, *config.NOT_RESULTS)},
    }


def save_run(directory: Path, described: dict[str, Any], log: Position, run: RunState) -> None:
    """Write a checkpoint whole or not at all, and keep the one before it.

    Every process must call it; where parameters are in shards each writes its own.

    Args:
        directory: The run's folder.
        described: What `describe_run` returned.
        log: How far `metrics.jsonl` is.
        run: The run.
    """
    state = {"log": list(log), **run.state_dict()}
    if run.in_shards:
        newest, previous = (directory / name for name in SHARDS)
        plain = {"version": VERSION, "run": described, **state}
        plain["shapes"] = shapes(run.model.state_dict())
        save_shards(newest, previous, plain, run.shards(), run.world)
    elif run.world.is_main:
        save_checkpoint(directory, described, state)


def load_run(directory: Path, described: dict[str, Any], run: RunState) -> Position | None:
    """Go on from the newest checkpoint of a run that is not damaged.

    Every process must call it.

    Args:
        directory: The run's folder.
        described: What `describe_run` returned.
        run: The run as it is before the first step.

    Returns:
        How far `metrics.jsonl` was at that time, or None if there is no checkpoint.

    Raises:
        StateError: If all checkpoints are damaged, or the newest sound one is of another version,
            run or network, or of other processes. No file is changed then.
    """
    others = (NEWEST, PREVIOUS) if run.in_shards else SHARDS
    with all_ranks_raise(run.world.groups, READING):
        for name in others:
            if (directory / name).exists():
                engine = "ddp, or by one process" if run.in_shards else "fsdp, by several processes"
                raise StateError(
                    f"{directory / name} was written with engine={engine}: go on in that way, or "
                    + _mend(directory)
                )
    if run.in_shards:
        return _load_shards(directory, described, run)
    found: dict[str, Any] | None = None

    def read() -> bool:
        nonlocal found
        found = load_checkpoint(directory, described, run.model)
        return found is not None

    there = run.world.from_main(read, READING)  # first: it may mend the folder
    with all_ranks_raise(run.world.groups, READING):
        if not run.world.is_main and read() != there:
            raise StateError(f"{directory} is not the same folder on all machines: share it.")
    if found is None:
        return None
    _fill(directory, run, found)
    return _position(found)


def _load_shards(directory: Path, described: dict[str, Any], run: RunState) -> Position | None:
    world = run.world
    path, plain, spoilt = _newest_sound(
        [directory / name for name in SHARDS],
        lambda path: world.from_main(path.exists, READING),
        lambda path: read_plain(path, world),
    )
    if path is None:
        return None
    _check(path, plain, plain.get("shapes", {}), described, run.model)
    tensors = run.empty_shards(plain)
    read_shards(path, tensors)
    _fill(directory, run, plain, tensors)
    if spoilt:
        if world.is_main:
            _warn(spoilt)
        world.from_main(lambda: shutil.rmtree(directory / SHARDS[0]), READING)
    return _position(plain)


def _fill(directory: Path, run: RunState, *state: Any) -> None:
    try:
        run.load_state_dict(*state)
    except Exception as error:  # what it holds is of another kind: the objects raise anything
        raise damaged(directory, f"a checkpoint: {error}", _mend(directory)) from error


def _position(state: dict[str, Any]) -> Position:
    size, found = state["log"]
    return int(size), str(found)


def _newest_sound(
    paths: Sequence[Path], exists: Callable[[Path], bool], read: Callable[[Path], Any]
) -> tuple[Path | None, Any, Path | None]:
    """The first checkpoint that can be read, its contents, and a damaged one before it.

    Without any checkpoint all are None; if all are damaged, a StateError.
    """
    spoilt: Path | None = None
    for path in paths:
        if not exists(path):  # as the newest, if its process was killed between two renames
            continue
        try:
            return path, read(path), spoilt
        except StateError:
            spoilt = spoilt or path
    if spoilt:
        raise StateError(f"{spoilt} is damaged, and no other is sound: {_mend(spoilt.parent)}")
    return None, None, None


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
    paths = [directory / NEWEST, directory / PREVIOUS]
    path, state, spoilt = _newest_sound(paths, Path.exists, read_tensors)
    if path is None:
        return None
    found = state.get("model") if isinstance(state, dict) else None
    _check(path, state, shapes(found if isinstance(found, dict) else {}), run, model)
    if spoilt:
        _warn(spoilt)
        os.replace(path, spoilt)  # or the next checkpoint would keep the damaged one
    return dict(state)


def _warn(spoilt: Path) -> None:
    warnings.warn(
        f"{spoilt} is damaged: going on from the checkpoint before it.",
        GradmaskWarning,
        stacklevel=4,
    )


def _check(
    path: Path,
    state: Any,
    found_shapes: dict[str, list[int]],
    run: dict[str, Any],
    model: nn.Module,
) -> None:
    mend = _mend(path.parent)
    version = state.get("version") if isinstance(state, dict) else None
    if version != VERSION:
        raise StateError(
            f"{path} is of version {version}; this gradmask reads version {VERSION}: {mend}"
        )
    if not isinstance(state.get("run"), dict) or not state.keys() >= _PARTS:
        raise damaged(path, "it holds no run", mend)
    described = to_plain(Comparison()) | state["run"]  # what it lacks is younger, and unused there
    for name, expected in run.items():
        found = described.get(name)
        if found != expected:
            raise StateError(
                f"{path} is of another run, with {name}={found!r}, not {expected!r}: {mend}"
            )
    check_shapes(path, found_shapes, model, mend)


def _mend(directory: Path) -> str:
    return f"delete the folder {directory} to train this run anew, or choose another --output."
