"""One run of a study, as the training function sees it."""

from __future__ import annotations

import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradmask import FisherMask
from gradmask.errors import DataError, GradmaskWarning, OptionError, StateError
from gradmask.seeding import random_states, restore_random_states
from gradmask.study.arms import Arm, parse_arm
from gradmask.study.controls import new_mask
from gradmask.study.files import damaged, read_tensors
from gradmask.study.log import START, RunLog
from gradmask.study.results import Row
from gradmask.study.spec import Spec
from gradmask.tensor_files import atomic_file

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
VERSION = 1
_RESERVED = ("kept_per_parameter", "weights", "test_accuracy_per_class", "share")
_PLAIN = (int, float, bool, complex, str, bytes, type(None), torch.dtype, torch.device)


class Diverged(DataError):
    """The numbers of a run are no longer finite: the run is over, and the others go on.

    Args:
        message: What is wrong, where, and the mend.
        run: The run as `results.json` has it, with `diverged`: the epoch and the reason.
    """

    def __init__(self, message: str, run: Row) -> None:
        super().__init__(message)
        self.run = run

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.run)


class TrialOptions(Mapping[str, Any]):
    """Options of the training function; those that it never looks at are known.

    Attributes:
        unread: Their names; of an arm of the user's own those of the trial, which has them too.
    """

    def __init__(self, options: Mapping[str, Any], unread: set[str] | None = None) -> None:
        self._options = dict(options)
        self.unread = set(options) if unread is None else unread

    def __getitem__(self, name: str) -> Any:
        self.unread.discard(name)
        return self._options[name]

    def __iter__(self) -> Iterator[str]:
        self.unread.difference_update(self._options)
        return iter(self._options)

    def __len__(self) -> int:
        return len(self._options)


class Trial:
    """One run: an arm with a seed, to be trained by a function of the user's own.

    Example:
        ```python
        def train(trial):
            model, optimizer, loader = build(seed=trial.seed, lr=trial.options.get("lr", 0.1))
            mask = trial.mask(model, optimizer)
            for epoch in range(trial.resume(model=model, optimizer=optimizer, mask=mask), 10):
                train_one_epoch(...)
                trial.report(epoch=epoch, val_accuracy=..., test_accuracy=..., test_loss=...)
                mask.refresh(loader)
                trial.save(model=model, optimizer=optimizer, mask=mask)
        ```

    Attributes:
        arm: The arm; `arm.strategy` and `arm.options` say what it is.
        seed: Seed of the run; PyTorch, NumPy and Python are seeded with it already.
        options: Options of the study, over them those of the arm and the values of the sweep.
        directory: The run's own folder, for whatever the function wants to keep.
        rows: What was reported so far.
        saved: What `resume` found, by name; plain values among it are for the function to use.
    """

    def __init__(
        self,
        spec: Spec,
        directory: Path,
        *,
        options: Mapping[str, Any] | None = None,
        arms: Mapping[str, Callable[..., Any] | None] | None = None,
        on_epoch: Callable[[Row], None] = lambda _: None,
    ) -> None:
        self._own = dict(arms or {})
        self.spec, self.seed, self.directory = spec, spec.seed, directory
        self.arm: Arm = parse_arm(spec.arm, own=self._own)
        own = self.arm.strategy in self._own
        changed = self.arm.options if own else self.arm.others
        self.options = TrialOptions({**(options or {}), **changed, **spec.values})
        if own:  # they may be read from either
            self.arm = replace(self.arm, options=TrialOptions(changed, self.options.unread))
        self.rows: list[Row] = []
        self.saved: dict[str, Any] = {}
        self._kept = 0  # of the rows, by what was saved last
        self._started = time.perf_counter()
        self._diverged: Diverged | None = None
        self._on_epoch = on_epoch
        self._mask: FisherMask | None = None
        self._log: RunLog | None = None

    @property
    def seconds(self) -> float:
        """Time that the run has taken, in earlier visits as far as they were saved."""
        return time.perf_counter() - self._started

    def mask(self, model: nn.Module, optimizer: Optimizer, **options: Any) -> FisherMask:
        """The arm's mask, attached to the optimizer; or what stands in its place.

        Args:
            model: The model that is trained.
            optimizer: Its optimizer.
            options: Options of `FisherMask`; the arm's own are taken over these.

        Returns:
            A mask with all methods of `FisherMask`: without a mask they do nothing, `slow` scales
            the learning rate, and an arm of the user's own is what its function returns.
        """
        function = self._own.get(self.arm.strategy)
        if function is None:
            return self.new_mask(model, **options).attach(optimizer)
        made = function(self, model, optimizer, **options)
        self._mask = made if made is not None else new_mask(_NONE, model).attach(optimizer)
        return self._mask

    def new_mask(self, model: nn.Module, **options: Any) -> FisherMask:
        """The same, yet to be attached to the optimizer; not for arms of the user's own.

        Args:
            model: The model that is trained.
            options: Options of `FisherMask`; the arm's own are taken over these.

        Raises:
            OptionError: If the arm is a function, which needs the optimizer.
        """
        if self.arm.strategy in self._own:
            raise OptionError(
                f"Arm {self.arm.name!r} is a function of yours, which needs the optimizer: call "
                "trial.mask(model, optimizer) in a loop of your own."
            )
        self._mask = new_mask(self.arm, model, **{"seed": self.seed, **options})
        return self._mask

    def report(self, *, epoch: float, **metrics: Any) -> None:
        """Report what was measured after an epoch, or within one.

        Names say what a metric is for (`val_...` chooses an epoch, `test_...` is judged) and if
        more is better (`..._accuracy`, `..._loss`), or the study's `metrics` do.

        Args:
            epoch: Number of the epoch, or of epochs with a part of one (2.5), larger than that of
                the report before.
            metrics: Numbers by name, the same in every run.

        Raises:
            OptionError: If something is no number, or the epoch is not a later one.
            Diverged: If a loss is not finite: the run ends, and is recorded as diverged.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, Real) or not 0 <= epoch < math.inf:
            raise OptionError(f"trial.report(epoch={epoch!r}): give a number from 0 on.")
        epoch = int(epoch) if float(epoch).is_integer() else round(float(epoch), 6)
        if self.rows and epoch <= self.rows[-1]["epoch"]:
            raise OptionError(
                f"trial.report(epoch={epoch}): epoch {self.rows[-1]['epoch']} was reported before; "
                "report each epoch once, in order."
            )
        row: Row = {"epoch": epoch}
        for name, value in metrics.items():
            if name in _RESERVED:
                raise OptionError(f"trial.report({name}=...): give the metric another name.")
            row[name] = _number(name, value)
        if self._mask is not None and "kept" not in row:
            row["kept"] = float(getattr(self._mask, "kept_fraction", 1.0))
            if isinstance(self._mask, FisherMask) and self.arm.masks:
                shares = self._mask.kept_fractions.values()
                row["kept_per_parameter"] = [round(share, 4) for share in shares]
        gone = [n for n, v in row.items() if "loss" in n and not math.isfinite(v)]
        if gone:
            reason = f"{gone[0]} is {row[gone[0]]}"
            self._diverged = Diverged(
                f"{self.spec.title}: {reason} in epoch {epoch}.",
                self._run() | {"diverged": {"epoch": math.ceil(epoch), "reason": reason}},
            )
            raise self._diverged
        self.rows.append(row)
        self._written().write(row)
        self._on_epoch(row)

    def save(self, **parts: Any) -> None:
        """Keep the state of the run, from which `resume` goes on; written whole or not at all.

        Args:
            parts: Objects with a `state_dict`, such as `model`, `optimizer`, `scheduler`, `mask`,
                or plain values and tensors.
        """
        state = {
            name: part.state_dict() if hasattr(part, "state_dict") else part
            for name, part in parts.items()
        }
        _check_plain("trial.save", state)
        counted = any(type(part) is int for part in parts.values())
        if parts and not counted and len(self.rows) == self._kept:
            warnings.warn(
                "trial.save without a trial.report since the last one: trial.resume goes on after "
                "the epoch that was reported last, and would train what is saved here twice. Save "
                "after the report, or keep the epoch: trial.save(epoch=epoch, ...), "
                "trial.saved['epoch'].",
                GradmaskWarning,
                stacklevel=2,
            )
        self._kept = len(self.rows)
        path = self.directory / CHECKPOINT
        position = list(self._written().position())
        kept = {
            "version": VERSION,
            "run": self.spec.as_row(),
            "rows": self.rows,
            "log": position,
            "random": random_states(),
            "seconds": self.seconds,
            "parts": state,
        }
        with atomic_file(path, previous=self.directory / PREVIOUS) as file:
            torch.save(kept, file)

    def resume(self, *, start: int = 0, **parts: Any) -> int:
        """Go on from what `save` kept, random states included.

        Args:
            start: Number of the first epoch.
            parts: The objects that were saved, as they were before training.

        Returns:
            Number of the next epoch: `start` where nothing was saved.

        Raises:
            StateError: If what was saved is damaged, or of other objects.
        """
        found = self._saved()
        if found is None:
            return start
        mend = f"delete the folder {self.directory} to train this run anew."
        lacking = parts.keys() - found["parts"].keys()
        if lacking:
            raise StateError(
                f"{self.directory / CHECKPOINT} holds no {sorted(lacking)[0]!r}, which was not "
                f"among what trial.save kept: {mend}"
            )
        try:
            for name, part in parts.items():
                if hasattr(part, "load_state_dict"):
                    part.load_state_dict(found["parts"][name])
            self.rows = list(found["rows"])
            self._kept = len(self.rows)
            size, digest = found["log"]
            random_ = found["random"]
            self.saved = found["parts"]
            self._started -= float(found["seconds"])
        except Exception as error:  # of other objects: they raise anything
            raise damaged(self.directory / CHECKPOINT, f"{error!r}", mend) from error
        self._close()
        self._log = RunLog(self.directory, (int(size), str(digest)))
        for row in self.rows:
            self._on_epoch(row)
        restore_random_states(random_)
        return int(self.rows[-1]["epoch"]) + 1 if self.rows else start

    def add_to_last(self, **metrics: Any) -> None:
        """Add what was measured after the last epoch to its report."""
        if not self.rows:
            self.report(epoch=0, **metrics)
            return
        self.rows[-1] |= {name: _number(name, value) for name, value in metrics.items()}
        self.forget_after(self.rows[-1]["epoch"])

    def forget_after(self, epoch: float) -> None:
        """Forget reports of later epochs, which are to be trained again."""
        self.rows = [row for row in self.rows if row["epoch"] <= epoch]
        self._close()
        self._log = RunLog(self.directory, START)
        for row in self.rows:
            self._log.write(row)

    def check_used(self) -> None:
        """Refuse a run whose arm had no effect.

        Raises:
            OptionError: If the mask was never asked for, or never made.
        """
        if self.arm.strategy in ("none", "early"):
            return
        if self._mask is None:
            raise OptionError(
                f"{self.spec.title}: the training function never asked for the arm's mask: call "
                "trial.mask(model, optimizer), or use FisherMaskCallback.of(trial)."
            )
        measured = self.arm.masks or self.arm.strategy == "slow_matched"
        if measured and not getattr(self._mask, "refreshes", 1):
            raise OptionError(
                f"{self.spec.title}: the mask was never made, so nothing was masked: call "
                "mask.refresh(loader) after each epoch."
            )

    def _saved(self) -> dict[str, Any] | None:
        error: StateError | None = None
        for name in (CHECKPOINT, PREVIOUS):
            path = self.directory / name
            if not path.exists():
                continue
            try:
                found = read_tensors(path)
                if found["version"] == VERSION and found["run"] == self.spec.as_row():
                    return dict(found)
                raise damaged(path, "it is of another run", "delete the run's folder.")
            except StateError as spoilt:
                error = error or spoilt
            except (KeyError, TypeError) as spoilt:
                error = error or damaged(path, spoilt, "delete the run's folder.")
        if error is not None:
            raise error
        return None

    def _written(self) -> RunLog:
        if self._log is None:
            self._log = RunLog(self.directory, START)
        return self._log

    def _run(self) -> Row:
        return {**self.spec.as_row(), "seconds": 0.0, "epochs": self.rows}

    def _close(self) -> None:
        if self._log is not None:
            self._log.__exit__()
            self._log = None


_NONE = parse_arm("none")


def _check_plain(where: str, value: Any) -> None:
    """Refuse what could be written, but not be read again without pickle."""
    if isinstance(value, dict):
        if type(value) not in (dict, OrderedDict):
            raise OptionError(f"{where}: a {type(value).__name__} cannot be kept: make it a dict.")
        for name, part in value.items():
            _check_plain(f"{where}[{name!r}]", part)
    elif type(value) in (list, tuple, set, torch.Size):
        for part in value:
            _check_plain(where, part)
    elif not isinstance(value, torch.Tensor) and type(value) not in _PLAIN:
        raise OptionError(
            f"{where}: a {type(value).__module__}.{type(value).__name__} cannot be kept, as no "
            "pickle is loaded: make it a number, a text, a tensor, or lists and dicts of these."
        )


def _number(name: str, value: Any) -> float:
    if not isinstance(value, Real) and getattr(value, "size", None) is not None:
        value = value.item() if torch.as_tensor(value).numel() == 1 else value  # of NumPy as well
    if isinstance(value, bool) or not isinstance(value, Real):
        raise OptionError(f"trial.report({name}={value!r}): give a number.")
    try:
        return float(value)
    except OverflowError as error:
        raise OptionError(f"trial.report({name}=...): the number is too large.") from error
