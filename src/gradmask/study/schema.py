"""What a file that is read must hold: small checks that are put together to a schema.

A check takes a value as it was read and returns it as it is used, or raises `Wrong`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Check = Callable[[Any], Any]
_LARGEST = 1 << 63
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class Wrong(ValueError):
    """What is wrong with a value that was read."""


def number(value: Any) -> float:
    """A number; null stands for one that is not finite."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Wrong(f"{_short(value)} is no number")
    if isinstance(value, int) and abs(value) >= _LARGEST:
        raise Wrong("a number is too large")
    return value


def whole(value: Any, low: int = 0) -> int:
    """A whole number from `low` on."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < _LARGEST:
        raise Wrong(f"{_short(value)} is no whole number from {low} on")
    return value


def seed(value: Any) -> int:
    """A whole number, perhaps negative."""
    return whole(value, -_LARGEST + 1)


def text(value: Any) -> str:
    """Text in one line."""
    if not isinstance(value, str) or _CONTROL.search(value):
        raise Wrong(f"{_short(value)} is no text in one line")
    return value


def anything(value: Any) -> Any:
    """Any value."""
    return value


def optional(check: Check) -> Check:
    """A value, or null."""
    return lambda value: None if value is None else check(value)


def items(check: Check, count: int | None = None) -> Check:
    """A list, of `count` values if that is given."""

    def checked(value: Any) -> list[Any]:
        if not isinstance(value, list) or count not in (None, len(value)):
            raise Wrong(f"{_short(value)} is no list{'' if count is None else f' of {count}'}")
        return [_at(where, check, found) for where, found in enumerate(value)]

    return checked


def record(
    required: Mapping[str, Check],
    known: Mapping[str, Check] | None = None,
    others: Check = anything,
) -> Check:
    """A mapping with names that must be there, some that may, and how to check all others."""
    checks = {**(known or {}), **required}

    def checked(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise Wrong(f"{_short(value)} is no mapping")
        for name in required:
            if name not in value:
                raise Wrong(f"{name} is missing")
        return {name: _at(name, checks.get(name, others), found) for name, found in value.items()}

    return checked


def literal(text: str) -> Any:
    """A value as it is written on the command line: a number, true, false or none, else text."""
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else text
    return text


def check_types(kind: type, options: Mapping[str, Any]) -> None:
    """Check values against the types of a dataclass's fields.

    Args:
        kind: The dataclass.
        options: Values by name, lists for tuples and text for paths.

    Raises:
        Wrong: If one is of another type.
    """
    hints = get_type_hints(kind)
    for name, value in options.items():
        if not _fits(value, hints[name]):
            kind_of = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
            raise Wrong(f"{name}={_short(value)} is not of the type {kind_of}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(v, inner[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    if hint is Path:  # a folder may have any name; it is escaped where it is shown
        return isinstance(value, str | Path) and "\0" not in str(value)
    if hint is str:
        return isinstance(value, str) and not _CONTROL.search(value)
    if hint is float and isinstance(value, float):
        return math.isfinite(value)
    if hint in (int, float):
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST
    return isinstance(value, hint)


def _at(where: object, check: Check, value: Any) -> Any:
    try:
        return check(value)
    except Wrong as error:
        raise Wrong(f"{where}: {error}") from None


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
