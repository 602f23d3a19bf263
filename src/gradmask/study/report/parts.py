"""What a page is made of: sections with tables and figures, as plain values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gradmask.study.arms import arm_title, read_arm

Spec = dict[str, Any]  # of Vega-Lite

# Okabe and Ito's palette, told apart with any colour vision, and two more: the colour on a light
# background, on a dark one, and the strategy that it belongs to.
_COLOURS = (
    ("#3b3b3b", "#d3d7de", "none"),
    ("#0072b2", "#4ea8de", "fisher"),
    ("#e69f00", "#f0b429", "random"),
    ("#009e73", "#2bbf93", "random_matched"),
    ("#cc79a7", "#e29cc4", "inverse"),
    ("#d55e00", "#f0803c", "slow"),
    ("#56b4e9", "#8fd0f5", "early"),
    ("#8c6d31", "#c9a86a", "slow_matched"),
    ("#7570b3", "#a9a4e0", "sam"),
)
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
    """How arms look.

    Each has a colour of its own, the first of a strategy that of the strategy; where arms are more
    than colours, all of a strategy share its colour, and are told apart by their dashes.
    """
    arms, found = list(arms), list[Look]()
    places = {strategy: place for place, (_, _, strategy) in enumerate(_COLOURS)}
    strategies = [read_arm(arm).strategy for arm in arms]
    free = [p for s, p in places.items() if s not in strategies]
    few, used = len(arms) <= len(_COLOURS), Counter[int]()
    for order, (arm, strategy) in enumerate(zip(arms, strategies, strict=True)):
        place = places.get(strategy, order % len(_COLOURS))
        if few and (used[place] or strategy not in places):
            place = free.pop(0)
        title = arm_title(arm)
        title = arm if title in (look.title for look in found) else title
        light, dark, _ = _COLOURS[place]
        found.append(Look(arm, title, light, dark, _DASHES[used[place] % len(_DASHES)]))
        used[place] += 1
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
        least_width: Width below which a panel scrolls in the page.
    """

    name: str
    title: str
    panels: Sequence[Spec]
    columns: int = 2
    arms: Sequence[str] = ()
    file_width: int = 430
    least_width: int = 290


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
