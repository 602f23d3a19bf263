"""How many epochs one visit may train, all runs together."""

from __future__ import annotations


class EpochsSpent(Exception):
    """The visit has trained as many epochs as it may: no mistake, the same command goes on."""


class EpochBudget:
    """Epochs that a visit may still train.

    Args:
        epochs: How many; None for no limit.
    """

    def __init__(self, epochs: int | None = None) -> None:
        self.epochs = epochs
        self._trained = 0

    @property
    def spent(self) -> bool:
        """Whether no epoch is left."""
        return self.epochs is not None and self._trained >= self.epochs

    def count(self) -> None:
        """An epoch was trained."""
        self._trained += 1

    def check(self) -> None:
        """Raise `EpochsSpent` if no epoch is left."""
        if self.spent:
            raise EpochsSpent(
                f"Stopped after {self._trained} epoch{'s' * (self._trained > 1)} (--stop-after). "
                "Nothing is lost: the same command goes on."
            )
