"""The output folder of a run: what it holds, and that one process at a time writes into it.

A folder that this tool made has a marker, `.gradmask`. Only such a folder is written into, one
that is empty, or one of an earlier version that holds results or checkpoints and their options.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from gradmask.errors import OptionError, StateError
from gradmask.study.files import (
    damaged,
    is_temporary,
    read_json,
    read_yaml,
    write_atomically,
    write_json,
)
from gradmask.study.options import RunOptions, from_plain, to_plain
from gradmask.study.results import Results, check_results, values_of
from gradmask.study.schema import Check, Wrong
from gradmask.study.spec import Spec

RESULTS_VERSION = 1
RESULTS_FILE = "results.json"
RESULTS_FILES = (RESULTS_FILE, "theorem1.json")
OPTIONS_FILE = "config.yaml"
MARKER = ".gradmask"
LOCK = ".lock"
LOCK_SECONDS = 6  # the workers of a process that was killed end within five
Options = TypeVar("Options", bound=RunOptions)
CHECKPOINTS = "checkpoint.*"  # of any engine, in the folder of a run
_LONGEST = 100
_RUN_NAME = re.compile(r"[\w.=+-]+-seed-?\d+", re.ASCII)


def run_directory(folder: Path, spec: Spec) -> Path:
    """Where the files of one run lie in the folder of a study.

    Args:
        folder: The study's folder.
        spec: The run; its names are perhaps read from a file.

    Returns:
        A folder inside `folder`.

    Raises:
        StateError: If it would be anywhere else.
    """
    values = "".join(f"-{name}={value}" for name, value in spec.values.items())
    plain = spec.arm.replace(":", "-") + values
    odd = not _RUN_NAME.fullmatch(f"{plain}-seed0") or len(plain) > _LONGEST
    if odd and ".." not in plain:  # names of files, models, ... may have any letters
        digest = hashlib.blake2b(plain.encode(), digest_size=4).hexdigest()
        plain = f"{re.sub(r'[^A-Za-z0-9_.=+-]+', '_', plain)[:60]}-{digest}"
    name = f"{plain}-seed{spec.seed}"
    path = folder / "runs" / name
    where = folder.resolve() / "runs" / name
    if not _RUN_NAME.fullmatch(name) or path.resolve() != where:
        raise StateError(
            f"Run {name!r} would not lie in {folder}: mend the names in its {RESULTS_FILE} and "
            f"{OPTIONS_FILE}, remove links from it, or choose another --output."
        )
    return path


def has_checkpoint(directory: Path) -> bool:
    """Whether the folder of a run holds a checkpoint."""
    return any(directory.glob(CHECKPOINTS))


def remove_checkpoints(directory: Path) -> None:
    """Remove the checkpoints of a run whose results are kept, or that is of no use any more."""
    for path in sorted(directory.glob(CHECKPOINTS), reverse=True):  # the one before it first
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def mark_folder(folder: Path) -> None:
    """Say that this tool made a folder."""
    if not (folder / MARKER).exists():
        write_atomically(folder / MARKER, "gradmask writes into this folder.\n")


def check_ours(folder: Path) -> None:
    """Check that a folder may be written into, before anything is.

    Args:
        folder: A folder that this tool made, or an empty one, or none yet.

    Raises:
        OptionError: If it is a file, or holds something else.
        StateError: If options in it are damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"output={str(folder)!r} is a file: choose another --output.")
    if _is_empty(folder) or (folder / MARKER).is_file():
        return
    options = folder / OPTIONS_FILE
    if not any((folder / file).is_file() for file in RESULTS_FILES) and not _begun(folder):
        raise OptionError(
            f"{folder} holds files, but no run that gradmask made: choose another --output, or an "
            "empty folder."
        )
    if not options.is_file() or not {"seeds", "output"} <= _read(options).keys():
        raise OptionError(
            f"{folder} holds results, but no {OPTIONS_FILE} of theirs: choose another folder, or "
            "copy the whole folder of the run."
        )


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or what a process left that was killed at its first file."""
    if not folder.exists():
        return True
    first = (f".{MARKER}.", f".{OPTIONS_FILE}.")
    return all(
        (p.name == LOCK and p.is_file() and not p.stat().st_size)
        or (is_temporary(p) and p.name.startswith(first))
        for p in folder.iterdir()
    )


def _begun(folder: Path) -> bool:
    return any(map(has_checkpoint, (folder / "runs").glob("*-seed*")))


def open_folder(
    config: Options,
    stack: ExitStack,
    file: str = RESULTS_FILE,
    check: Check = check_results,
) -> tuple[Options, Results]:
    """Check the output folder, read what it holds already, and keep other processes out of it.

    Args:
        config: Options of the comparison, or of another recipe that writes runs into a folder.
        stack: The folder is held until this is closed.
        file: Name of its results, which hold a list `runs`.
        check: Checks what they hold.

    Returns:
        The options with what the folder was extended by earlier (arms and seeds), and its results
        so far. A folder without a finished run or a checkpoint has nothing to lose: it is taken
        over as if it were empty.

    Raises:
        OptionError: If the folder holds a different run, or other files, all left as they are.
        StateError: If another process has it, or a file in it is damaged.
    """
    _held(config, file, check)
    stack.enter_context(_sole_writer(config.output))
    return _held(config, file, check)


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


def _held(config: Options, file: str, check: Check) -> tuple[Options, Results]:
    results: Results = {"version": RESULTS_VERSION, "runs": []}
    folder = config.output
    check_ours(folder)
    path = folder / OPTIONS_FILE
    if (folder / file).exists():
        results = read_results(folder, file, check)
    if not path.exists() and not results["runs"] and not _begun(folder):
        return config, results
    written = _read(path)
    try:
        earlier_config = from_plain(type(config), written)
    except (Wrong, OptionError) as error:
        raise damaged(path, error, _MEND) from error
    if not results["runs"] and not _begun(folder):
        return config, results
    earlier, asked = to_plain(earlier_config), to_plain(config)
    for name, value in asked.items():
        if name not in (*config.EXTENDABLE, *config.NOT_RESULTS) and earlier.get(name) != value:
            mend = "choose another --output, or delete it"
            if name == "epochs":
                mend = (
                    "a longer or shorter schedule is a new run, as the learning rate follows it "
                    f"from the start. For a new run {mend}"
                )
            raise OptionError(
                f"{folder} holds a different run, with {name}={earlier.get(name)!r}, not "
                f"{value!r}: {mend}."
            )
    merged = {name: _merged(earlier[name], asked[name]) for name in config.EXTENDABLE}
    if None in merged.values():
        raise OptionError(
            f"{folder} holds a sweep over {', '.join(earlier['sweep']) or 'nothing'}, not over "
            f"{', '.join(asked['sweep']) or 'nothing'}: choose another --output."
        )
    return replace(config, **merged), results


def _merged(earlier: Any, asked: Any) -> Any:
    """What there was and what is new; None for sweeps over different options."""
    if isinstance(earlier, dict):
        if earlier.keys() != asked.keys():
            return None
        return {name: list(_merged(values, asked[name])) for name, values in earlier.items()}
    return tuple(dict.fromkeys([*earlier, *asked]))


_MEND = "choose another --output, or delete the folder."


def _read(path: Path) -> dict[str, Any]:
    return read_yaml(path, _MEND)


def read_results(folder: Path, file: str = RESULTS_FILE, check: Check = check_results) -> Results:
    """Read `results.json` of a comparison, and check all that is in it.

    Args:
        folder: The comparison's output folder.
        file: Another name, of other results.
        check: Checks what it holds.

    Returns:
        Its contents.

    Raises:
        StateError: If there is none, or it is damaged or of another version.
    """
    path, mend = folder / file, "delete it and run again."
    if not path.is_file():
        raise StateError(f"No {file} in {folder}: give the --output folder of a run.")
    found = read_json(path, mend)
    if not isinstance(found, dict) or "version" not in found:
        raise damaged(path, "it has no version", mend)
    if found["version"] != RESULTS_VERSION:
        raise StateError(
            f"{path} is of version {str(found['version'])[:40]}; this gradmask reads version "
            f"{RESULTS_VERSION}."
        )
    try:
        results: Results = check(found)
    except (Wrong, OptionError) as error:
        raise damaged(path, error, mend) from error
    return results


def save_results(folder: Path, results: Results) -> None:
    """Write `results.json`, with its runs in the order of arms and seeds."""
    order = {arm: i for i, arm in enumerate(results["config"]["arms"])}
    results["runs"].sort(key=lambda run: (order[run["arm"]], str(values_of(run)), run["seed"]))
    write_json(folder / RESULTS_FILE, results)
