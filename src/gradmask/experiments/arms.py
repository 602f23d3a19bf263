"""Arms of a comparison: a kind of mask, perhaps with options that differ from the others'.

An arm is written `strategy[:option=value ...]`, for example `none`, `fisher`, `fisher:keep=0.7`,
`fisher:keep=0.25:scope=update`, `none:labels=random` or `sam:rho=0.1`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from gradmask.errors import OptionError, check_choice

STRATEGIES = {
    "none": "no mask",
    "fisher": "Fisher mask",
    "random": "random mask",
    "random_matched": "matched random mask",
    "inverse": "inverse mask",
    "sam": "SAM",  # no mask, sharpness-aware minimisation
}
MASKS = ("fisher", "random", "random_matched", "inverse")
# What an arm may change, and the titles of that.
_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "keep": (float, "keep {}"),
    "scope": (str, "scope {}"),
    "labels": (str, "{} labels"),
    "rho": (float, "rho {}"),
}
_MASK_OPTIONS = ("keep", "scope")

# Okabe and Ito's palette: told apart with any colour vision.
_COLOURS = {
    "none": "#3b3b3b",
    "fisher": "#0072b2",
    "random": "#e69f00",
    "random_matched": "#009e73",
    "inverse": "#cc79a7",
}
_MORE_COLOURS = ("#d55e00", "#56b4e9", *list(_COLOURS.values())[1:], "#f0e442")


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        strategy: Kind of mask, `none` or `sam`.
        options: Options of the comparison that this arm changes.
    """

    strategy: str
    options: dict[str, Any]

    @property
    def title(self) -> str:
        """The arm in words."""
        parts = [_OPTIONS[name][1].format(value) for name, value in self.options.items()]
        return ", ".join([STRATEGIES[self.strategy], *parts])

    @property
    def baseline(self) -> str:
        """The arm without a mask, on the same labels."""
        return f"none:labels={self.options['labels']}" if "labels" in self.options else "none"


def parse_arm(name: str) -> Arm:
    """Read the name of an arm.

    Args:
        name: `strategy[:option=value ...]`.

    Returns:
        The arm.

    Raises:
        OptionError: If the strategy or an option is unknown, or a value is of the wrong type.
    """
    strategy, *parts = name.split(":")
    check_choice("arm", strategy, STRATEGIES)
    options: dict[str, Any] = {}
    for part in parts:
        option, _, text = part.partition("=")
        check_choice(f"option of arm {name!r},", option, _OPTIONS)
        if strategy not in MASKS and option in _MASK_OPTIONS:
            raise OptionError(f"Arm {name!r} has no mask, so {option} has no meaning there.")
        if strategy != "sam" and option == "rho":
            raise OptionError(f"Arm {name!r} is not SAM, so rho has no meaning there.")
        try:
            options[option] = _OPTIONS[option][0](text)
        except ValueError as error:
            raise OptionError(f"Arm {name!r}: {option}={text!r} is not a number.") from error
    return Arm(strategy, options)


def arm_title(name: str) -> str:
    """The arm in words."""
    return parse_arm(name).title


def baseline(name: str) -> str:
    """Name of the arm without a mask, on the same labels."""
    return parse_arm(name).baseline


def arm_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each arm; those without options always have the same one."""
    names = list(names)
    plain = {name: _COLOURS[name] for name in names if name in _COLOURS}
    free = [colour for colour in _MORE_COLOURS if colour not in plain.values()]
    others = (name for name in names if name not in plain)
    return plain | {name: free[i % len(free)] for i, name in enumerate(others)}


def controls(name: str, names: Iterable[str]) -> list[str]:
    """Arms that a Fisher mask is judged against: no mask, and the other masks with its options."""
    ours = parse_arm(name)
    return [
        other
        for other in names
        if other == ours.baseline
        or (
            (arm := parse_arm(other)).options == ours.options
            and arm.strategy in MASKS
            and arm.strategy != ours.strategy
        )
    ]
