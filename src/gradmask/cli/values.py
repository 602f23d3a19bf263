"""How words of the command line become values, where cyclopts has no notion of it.

Arms hold commas, lists may be written with commas, `name=value` pairs are no options of their own,
and a whole number is no rounded fraction. Each reader is a converter of cyclopts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmask.errors import OptionError

if TYPE_CHECKING:
    from cyclopts import Token

_MOST = 2**40  # what no computer has


def read_whole(
    hint: Any, tokens: Sequence[Token], least: int = -_MOST, optional: bool = False
) -> int | None:
    """Read a whole number; cyclopts itself would round 1.5.

    Args:
        hint: Its type, for cyclopts.
        tokens: Its words, of which the last counts.
        least: The smallest.
        optional: Whether `none` and `null` leave it out.

    Returns:
        The number.

    Raises:
        OptionError: If it is none, or too small or large.
    """
    if optional and tokens[-1].value.lower() in ("none", "null"):
        return None
    return _whole(tokens[-1], tokens[-1].value, least)


def _whole(token: Token, text: str, least: int) -> int:
    if re.fullmatch(r"[-+]?\d{1,20}", text, re.ASCII) and least <= int(text) <= _MOST:
        return int(text)
    limits = f" from {least} to {_MOST}" if least > -_MOST else ""
    raise OptionError(f"{token.keyword}={text!r} must be a whole number{limits}.")


def read_text(hint: Any, tokens: Sequence[Token], optional: bool = False) -> str | None:
    """Read text; `null` leaves it out where that can be."""
    text = tokens[-1].value
    return None if optional and text == "null" else text


def read_items(
    kind: type, hint: Any, tokens: Sequence[Token], least: int = -_MOST
) -> tuple[Any, ...]:
    """Read a list: words, perhaps with commas between them, or JSON where a comma is in a word."""
    # Of several lists the last counts.
    tokens = tokens[max(place for place, token in enumerate(tokens) if token.index == 0) :]
    name, words = tokens[0].keyword, [token.value for token in tokens]
    text = " ".join(words)
    if text.startswith("["):
        try:
            words = [str(item) for item in json.loads(text)]
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{name}={text!r} is no list: write words.") from error
    else:
        if name == "--arms":
            _check_commas(words)
        words = [part.strip() for word in words for part in word.split(",")]
    if not all(words):
        raise OptionError(f"{name}={text!r} has an empty word.")
    return tuple(_whole(tokens[0], w, least) if kind is int else kind(w) for w in words)


def _check_commas(arms: Sequence[str]) -> None:
    """Refuse a comma within an arm, such as in a file's name: it would part the arm in two."""
    from gradmask.study.arms import STRATEGIES

    for word in arms:
        before = ""
        for part in word.split(","):
            if "=" in before and ":" not in part and not get_close_matches(part, STRATEGIES):
                example = json.dumps([f"{before},{part}"])
                raise OptionError(
                    f"arms {word!r}: a comma parts arms, and {part!r} is none. For an arm with a "
                    f"comma write a list: --arms '{example}'."
                )
            before = part


def read_pairs(lists: bool, hint: Any, tokens: Sequence[Token]) -> dict[str, Any]:
    """Read words `name=value`, or `name=value,value` for lists."""
    from gradmask.study.schema import literal

    found: dict[str, Any] = {}
    for token in tokens:
        key, equals, text = token.value.partition("=")
        if not equals or not key:
            raise OptionError(f"{token.keyword} {token.value!r} must be written name=value.")
        key = key.replace("-", "_")
        if key in found:
            raise OptionError(f"{token.keyword} has {key} twice: write {key}=value,value.")
        found[key] = [literal(part) for part in text.split(",")] if lists else literal(text)
    return found


def read_path(hint: Any, tokens: Sequence[Token]) -> Path:
    """Read a path."""
    name = (tokens[-1].keyword or "folder").removeprefix("--")
    return usable_path(name, tokens[-1].value)


def usable_path(option: str, text: str | os.PathLike[str]) -> Path:
    """A path of the user, with `~` for a home folder.

    Args:
        option: The option that it was given to.
        text: The path.

    Returns:
        The path.

    Raises:
        OptionError: If it is empty, has a NUL, is not UTF-8, or names nobody's home.
    """
    name = os.fspath(text)
    if not name or "\0" in name:
        raise OptionError(f"{option}={name!r} is no path: give the name of a file or folder.")
    if name != name.encode(errors="replace").decode():
        raise OptionError(f"{option}={name!r} is no name in UTF-8: rename it.")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise OptionError(f"{option}={name!r} names a home folder that is not known.") from error
