"""When a mask that follows somebody's training is made anew."""

from __future__ import annotations

from typing import Literal

from gradmask.errors import OptionError

Refresh = Literal["epoch", "start"] | int


class Schedule:
    """When a mask is measured: after every epoch, after so many steps, or once at the start.

    Args:
        refresh: `epoch`, a number of optimizer steps, or `start` (measured once and kept).

    Raises:
        OptionError: If it is something else.
    """

    def __init__(self, refresh: Refresh) -> None:
        steps = isinstance(refresh, int) and not isinstance(refresh, bool) and refresh > 0
        if not steps and refresh not in ("epoch", "start"):
            raise OptionError(
                f"refresh={refresh!r} must be 'epoch', 'start' (once) or a number of optimizer "
                "steps, at least 1."
            )
        self.refresh = refresh

    def at_start(self, refreshes: int) -> bool:
        """Whether before the first step; not again in a run that goes on.

        Args:
            refreshes: Times that the mask was made already.
        """
        return self.refresh == "start" and refreshes == 0

    def after_step(self, step: int) -> bool:
        """Whether after this optimizer step, counted from 1."""
        return isinstance(self.refresh, int) and step % self.refresh == 0

    def after_epoch(self, *, last: bool) -> bool:
        """Whether after an epoch; after the last one no step would use the mask."""
        return self.refresh == "epoch" and not last
