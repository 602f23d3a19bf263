"""What a page is made of: sections with tables and figures, as plain values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gradmask.study.arms import arm_colours, arm_title

Spec = dict[str, Any]  # of Vega-Lite

# The same colours where the background is dark.
_ON_DARK = {
    "#3b3b3b": "#d3d7de",
    "#0072b2": "#4ea8de",
    "#e69f00": "#f0b429",
    "#009e73": "#2bbf93",
    "#cc79a7": "#e29cc4",
    "#d55e00": "#f0803c",
    "#56b4e9": "#8fd0f5",
}
_DASHES = ((1, 0), (7, 3), (2, 2), (9, 2, 2, 2))


@dataclass(frozen=True)
class Look:
    """How one arm looks in every figure of a page.

    Attributes:
        arm: Its name.
        title: Its title, unlike that of any other arm.
        light: Its colour on a light background.
        dark: Its colour on a dark one.
        dash: Lengths of dashes and gaps, which tell arms of one colour apart.
    """

    arm: str
    title: str
    light: str
    dark: str
    dash: tuple[int, ...]


def looks(arms: Iterable[str]) -> list[Look]:
    """How arms look: a colour, a dash and a title for each."""
    arms, found = list(arms), list[Look]()
    colours = arm_colours(arms)
    for arm in arms:
        title, colour = arm_title(arm), colours[arm]
        title = arm if title in (look.title for look in found) else title
        used = sum(look.light == colour for look in found)
        dash = _DASHES[used % len(_DASHES)]
        found.append(Look(arm, title, colour, _ON_DARK.get(colour, colour), dash))
    return found


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What is shown.
        value: What its column is sorted by; NaN comes last.
        style: `best`, `weak`, `good` or `bad`.
        arm: The arm whose colour stands before the text.
        more: A second line.
    """

    text: str
    value: float | str = math.nan
    style: str = ""
    arm: str | None = None
    more: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: What stands above it; may be empty.
        columns: Titles of its columns.
        rows: Its cells.
        words: Number of leading columns that hold words.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: int = 1


@dataclass(frozen=True)
class Figure:
    """A figure of one or more panels.

    Attributes:
        name: Name of its files.
        title: What it shows, for those who cannot see it.
        panels: Specifications of Vega-Lite, of views without a width.
        columns: Panels side by side.
        arms: Arms of its legend, which shows and hides them; none if it needs no legend.
        file_width: Width of a panel in files, in pixels.
    """

    name: str
    title: str
    panels: Sequence[Spec]
    columns: int = 2
    arms: Sequence[str] = ()
    file_width: int = 430


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        title: Its heading.
        text: Paragraphs at its beginning.
        tables: Its tables.
        figures: Its figures.
        notes: Paragraphs at its end, in small print.
        folded: Title, and sentences or tables, of what is shown on request.
    """

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    folded: tuple[str, Sequence[str | Table]] | None = None


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: Its heading.
        subtitle: What was done.
        conclusions: What it shows, in sentences.
        sections: Its sections.
        looks: How arms look.
        files: Texts that can be saved from the page, by name.
        plain: Titles and texts that stand folded at the end: options, environment.
    """

    title: str
    subtitle: str
    conclusions: Sequence[str]
    sections: Sequence[Section]
    looks: Sequence[Look]
    files: dict[str, str]
    plain: dict[str, str]
