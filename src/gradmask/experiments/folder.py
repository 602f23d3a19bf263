"""The output folder of a run: what it holds, and that one process at a time writes into it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from filelock import FileLock, Timeout

from gradmask.errors import OptionError, StateError
from gradmask.experiments.config import EXTENDABLE, NOT_RESULTS, RunOptions, to_plain
from gradmask.experiments.files import is_temporary, write_json
from gradmask.experiments.reports.statistics import Results
from gradmask.experiments.training.checkpoint import has_checkpoint

RESULTS_VERSION = 1
RESULTS_FILE = "results.json"
LOCK = ".lock"
LOCK_SECONDS = 6  # the workers of a process that was killed end within five
Options = TypeVar("Options", bound=RunOptions)


def run_directory(folder: Path, arm: str, seed: int) -> Path:
    """Where the files of one run lie in the folder of a comparison."""
    return folder / "runs" / f"{arm.replace(':', '-')}-seed{seed}"


def open_folder(
    config: Options,
    stack: ExitStack,
    file: str = RESULTS_FILE,
    extendable: tuple[str, ...] = EXTENDABLE,
) -> tuple[Options, Results]:
    """Check the output folder, read what it holds already, and keep other processes out of it.

    Args:
        config: Options of the comparison, or of another recipe that writes runs into a folder.
        stack: The folder is held until this is closed.
        file: Name of its results, which hold a list `runs`.
        extendable: Options that name what is run, to which a later visit may add.

    Returns:
        The options with what the folder was extended by earlier (arms and seeds), and its results
        so far. A folder without a finished run or a checkpoint has nothing to lose: it is taken
        over as if it were empty.

    Raises:
        OptionError: If the folder holds a different run, or other files, all left as they are.
        StateError: If another process has it.
    """
    _held(config, file, extendable)
    stack.enter_context(_sole_writer(config.output))
    return _held(config, file, extendable)


@contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from writing runs into a folder.

    The lock ends with the process, however that ends. A folder that was not there is made, and
    removed again, with the folders above it that were made, if nothing was written into it.

    Args:
        folder: The output folder.

    Raises:
        StateError: If another process has it.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path, timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout as error:
        raise StateError(
            f"Another process writes into {folder}: wait until it ends, or choose another --output."
        ) from error
    try:
        yield
    finally:
        if list(folder.iterdir()) == [path]:
            path.unlink()
            for parent in made:
                parent.rmdir()
        lock.release()


def _held(config: Options, file: str, extendable: tuple[str, ...]) -> tuple[Options, Results]:
    results: Results = {"version": RESULTS_VERSION, "runs": []}
    folder = config.output
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"output={str(folder)!r} is a file: choose another --output.")
    if not folder.exists() or all(p.name == LOCK or is_temporary(p) for p in folder.iterdir()):
        return config, results
    if not (folder / "config.yaml").exists():
        raise OptionError(
            f"{folder} holds files, but no run (no config.yaml): choose another --output."
        )
    written, ours = _read_options(folder / "config.yaml"), to_plain(config)
    if (folder / file).exists():
        results = read_results(folder, file)
    begun = results["runs"] or any(map(has_checkpoint, (folder / "runs").glob("*")))
    if not begun and written.keys() == ours.keys():  # not a user's own config.yaml
        return config, results
    earlier = to_plain(type(config)()) | written  # options it does not name are younger than it
    for name, value in ours.items():
        if name not in (*extendable, *NOT_RESULTS) and earlier.get(name) != value:
            raise OptionError(
                f"{folder} holds a different run, with {name}={earlier.get(name)!r}, not "
                f"{value!r}: choose another --output, or delete it."
            )
    merged: dict[str, Any] = {
        name: tuple(dict.fromkeys([*earlier.get(name, []), *ours[name]])) for name in extendable
    }
    return replace(config, **merged), results


def _read_options(path: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        options = None
    if not isinstance(options, dict):
        raise StateError(f"{path} is damaged: choose another --output, or delete the folder.")
    return options


def read_results(folder: Path, file: str = RESULTS_FILE) -> Results:
    """Read `results.json` of a comparison.

    Args:
        folder: The comparison's output folder.
        file: Another name, of another recipe's results.

    Returns:
        Its contents.

    Raises:
        StateError: If there is none, or it is damaged or of another version.
    """
    path = folder / file
    if not path.is_file():
        raise StateError(f"No {file} in {folder}: give the --output folder of a run.")
    try:
        results: Results = json.loads(path.read_text(encoding="utf-8"))
        version = results["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path} is damaged ({error}): delete it and run again.") from error
    if version != RESULTS_VERSION:
        raise StateError(
            f"{path} is of version {version}; this gradmask reads version {RESULTS_VERSION}."
        )
    return results


def save_results(folder: Path, results: Results) -> None:
    """Write `results.json`, with its runs in the order of arms and seeds."""
    order = {arm: i for i, arm in enumerate(results["config"]["arms"])}
    results["runs"].sort(key=lambda run: (order[run["arm"]], run["seed"]))
    write_json(folder / RESULTS_FILE, results)
