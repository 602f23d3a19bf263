"""When a mask that follows somebody's training is made anew."""

from __future__ import annotations

from typing import Any, Literal

from gradmask.errors import OptionError

Refresh = Literal["epoch", "start", "online"] | int


class Schedule:
    """When a mask is made: after every epoch, after so many steps, or once at the start.

    Args:
        refresh: `epoch`, a number of optimizer steps, or `start` (measured once and kept); or
            `online` (of training's own passes, not of passes in between).
        steps: With `online`, a number of optimizer steps; default: after every epoch.
        every: With `online`, one of so many batches is collected.

    Raises:
        OptionError: If it is something else.
    """

    def __init__(self, refresh: Refresh, steps: int | None = None, every: int = 10) -> None:
        if not _number(refresh) and refresh not in ("epoch", "start", "online"):
            raise OptionError(
                f"refresh={refresh!r} must be 'epoch', 'start' (once), 'online', or a number of "
                "optimizer steps, at least 1."
            )
        if steps is not None and (refresh != "online" or not _number(steps)):
            raise OptionError(
                f"steps={steps!r} must be a number of optimizer steps, at least 1, and goes with "
                "refresh='online'. To measure in passes of their own, refresh=<number of steps>."
            )
        self.refresh, self.online, self.every = refresh, refresh == "online", every
        self.steps = refresh if isinstance(refresh, int) else steps

    def at_start(self, refreshes: int) -> bool:
        """Whether before the first step; not again in a run that goes on.

        Args:
            refreshes: Times that the mask was made already.
        """
        return self.refresh == "start" and refreshes == 0

    def after_step(self, step: int) -> bool:
        """Whether after this optimizer step, counted from 1."""
        return self.steps is not None and step % self.steps == 0

    def after_epoch(self, *, last: bool) -> bool:
        """Whether after an epoch; after the last one no step would use the mask."""
        return self.refresh in ("epoch", "online") and self.steps is None and not last


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
