"""Training functions of the user's own: their names, their code, and one run by them."""

from __future__ import annotations

import hashlib
import inspect
import os
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gradmask.errors import OptionError, TrialError
from gradmask.seeding import seed_everything
from gradmask.study.results import Row
from gradmask.study.spec import Spec
from gradmask.study.trial import Diverged, Trial

ERROR = "error.txt"  # the traceback of a run that failed


def name_of(function: Callable[..., Any]) -> str:
    """A function's name, `package.module:function`."""
    inner: Any = function
    while isinstance(inner, partial):
        inner = inner.func
    module = getattr(inner, "__module__", "") or "__main__"
    return f"{module}:{getattr(inner, '__qualname__', type(inner).__name__)}"


def source_sum(function: Callable[..., Any]) -> str:
    """SHA-256 of the file that a function is in, and of arguments that it has already."""
    digest = hashlib.sha256()
    while isinstance(function, partial):
        digest.update(repr((function.args, function.keywords)).encode())
        function = function.func
    plain = (int, float, str, bool, type(None))
    own = getattr(function, "__dict__", {}) if not inspect.isroutine(function) else {}
    digest.update(repr({k: v for k, v in own.items() if isinstance(v, plain)}).encode())
    try:
        of = inspect.unwrap(function) if inspect.isroutine(function) else type(function)
        digest.update(Path(inspect.getsourcefile(of) or "").read_bytes())
    except (TypeError, OSError):  # typed by hand
        digest.update(getattr(getattr(function, "__code__", None), "co_code", b""))
    return digest.hexdigest()


def run_trial(
    train: Callable[[Trial], Any],
    options: Mapping[str, Any],
    arms: Mapping[str, Callable[..., Any] | None],
    source: str,
    spec: Spec,
    directory: Path,
    on_epoch: Callable[[Row], None],
) -> Row:
    """Train one run by a function of the user's own.

    Args:
        train: The function.
        options: Options of the study.
        arms: Arms of the user's own by name.
        source: Sum of the function's code, kept with the run.
        spec: The run.
        directory: Its folder.
        on_epoch: Called with each reported row.

    Returns:
        The run as `results.json` has it; the loss of a diverged one is not finite.

    Raises:
        OptionError: If nothing was reported, or an option was never looked at.
        TrialError: If the function failed; the traceback is then in `error.txt` of the folder.
    """
    trial = Trial(spec, directory, options=options, arms=arms, on_epoch=on_epoch)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ERROR).unlink(missing_ok=True)
    seed_everything(spec.seed)
    folder, dtype, threads = Path.cwd(), torch.get_default_dtype(), torch.get_num_threads()
    try:
        train(trial)
    except Diverged as diverged:
        trial._diverged = diverged
    except OptionError:  # wrong use, most likely of every run
        raise
    except (Exception, SystemExit) as error:
        with suppress(OSError):  # a full disk, perhaps
            (directory / ERROR).write_text(traceback.format_exc(), "utf-8", "backslashreplace")
        raise TrialError(f"{spec.title}: {type(error).__name__}: {error}") from error
    finally:  # the next run begins as this one did
        trial._close()
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
    run = trial._run() if trial._diverged is None else trial._diverged.run
    run |= {"seconds": trial.seconds, "source": source}
    if (named := trial.options.unread) and "diverged" not in run:
        raise OptionError(
            f"{sorted(named)[0]!r} of the run {spec.title} was never looked at by the training "
            "function: read trial.options, or leave it out."
        )
    if "diverged" not in run:
        trial.check_used()
    if not run["epochs"] and "diverged" not in run:
        raise OptionError(
            "The training function reported nothing: call trial.report(epoch=..., "
            "val_accuracy=..., test_accuracy=...) after each epoch."
        )
    return run
