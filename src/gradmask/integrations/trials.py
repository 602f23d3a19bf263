"""Runs of a study in a framework's Trainer: the arm's mask in, the measurements out."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradmask.study import Trial

_NOT_METRICS = ("_runtime", "_per_second", "_preparation_time")


class Reporter:
    """Gathers what a framework measures at one time, and reports it to a study.

    Args:
        trial: The run.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self._epoch = 0.0
        self._found: dict[str, float] = {}

    def add(self, epoch: float, metrics: Mapping[str, Any]) -> None:
        """Note metrics; `eval_...` is validation, unless `eval_test_...`.

        Args:
            epoch: Epochs that are over, perhaps a part of one.
            metrics: Values by name; what is no number, or a time, is left out.
        """
        now = round(epoch, 6)  # as trials have it
        if now != self._epoch:
            self.flush()
            self._epoch = now
        for name, value in metrics.items():
            value = value.item() if getattr(value, "numel", lambda: 0)() == 1 else value
            if isinstance(value, Real) and name != "epoch" and not name.endswith(_NOT_METRICS):
                self._found[_plain(name)] = float(value)

    def flush(self) -> None:
        """Report what was measured; after training it is of the last epoch."""
        found, self._found = self._found, {}
        rows = self.trial.rows
        if found and rows and rows[-1]["epoch"] >= self._epoch:
            self.trial.add_to_last(**found)
        elif found:
            self.trial.report(epoch=self._epoch, **found)

    def save(self) -> None:
        """Keep what was reported, beside the framework's own checkpoint."""
        self.flush()
        self.trial.save()

    def resume(self, epoch: float) -> None:
        """Go on with what was reported until the framework's checkpoint.

        Args:
            epoch: Epochs that were over then.
        """
        self.trial.resume()
        self.trial.forget_after(round(epoch, 6))


def _plain(name: str) -> str:
    """A metric's name as studies read it: `val_...` or `test_...`."""
    name = name.replace("/", "_").replace("-", "_")
    for prefix, plain in (("eval_test_", "test_"), ("eval_val_", "val_"), ("eval_", "val_")):
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def mask_options(trial: Trial, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a callback, over them those of the arm that the callback checks itself."""
    return {**options, **{k: v for k, v in trial.arm.own.items() if k == "keep"}}
