"""Named errors: each message says what is wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral, Real


class GradmaskError(Exception):
    """Base class of all errors that gradmask raises on purpose."""


class OptionError(GradmaskError, ValueError):
    """An option has a value that cannot work."""


class ModelError(GradmaskError, ValueError):
    """The model cannot be measured or masked as it is."""


class DataError(GradmaskError, ValueError):
    """The data are empty, out of range, or not where they were said to be."""


class OptimizerError(GradmaskError, ValueError):
    """The optimizer does not fit the model or cannot be masked."""


class StateError(GradmaskError, ValueError):
    """A saved state does not fit the object it is loaded into."""


class DistributedError(GradmaskError, RuntimeError):
    """Another process failed at what this one does with it."""


class TrialError(GradmaskError, RuntimeError):
    """A run of a study failed, or the workers that trained it."""


class GradmaskWarning(UserWarning):
    """Something works, but perhaps not as the user expects."""


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Raise an error that names the nearest known value unless `value` is one of `choices`.

    Args:
        option: The option's name, for the message.
        value: The value that was given.
        choices: The known values.

    Raises:
        OptionError: If `value` is not known.
    """
    known = list(choices)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        names = f"Known: {', '.join(known)}." if len(known) <= 40 else f"{len(known)} are known."
        raise OptionError(f"Unknown {option} {value!r}.{hint} {names}")


def first_names(names: Iterable[str], most: int = 5) -> str:
    """The first of many names, and how many more there are, for a message.

    Args:
        names: The names.
        most: As many are written out.
    """
    found = sorted(names)
    rest = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + rest


def check_keep(keep: float) -> None:
    """Raise an error unless 0 < keep <= 1.

    Args:
        keep: The share of parameters that still learn.

    Raises:
        OptionError: If `keep` is outside (0, 1].
    """
    if not isinstance(keep, Real) or not 0.0 < keep <= 1.0:
        raise OptionError(
            f"keep={keep!r} must be in (0, 1]: it is the share of parameters that still learn, "
            "for example keep=0.25 masks three quarters of them."
        )


def check_max_samples(max_samples: int | None) -> None:
    """Raise an error unless a number of samples is a whole number from 1, or None.

    Args:
        max_samples: The number.

    Raises:
        OptionError: If it is something else.
    """
    if max_samples is not None and not (isinstance(max_samples, Integral) and max_samples >= 1):
        raise OptionError(
            f"max_samples={max_samples!r} must be a whole number, at least 1, or None for all."
        )
