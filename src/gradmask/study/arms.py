"""Arms of a study: a kind of mask or control, perhaps with options that differ from the others'.

An arm is written `strategy[:option=value ...]`, for example `none`, `fisher`, `fisher:keep=0.7`,
`fisher:keep=0.25:scope=update`, `fisher:score=snip:which=lowest`, `slow:keep=0.25`,
`none:labels=random` or `sam:rho=0.1`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from gradmask.errors import OptionError, check_choice, check_keep
from gradmask.study.schema import literal

STRATEGIES = {
    "none": "no mask",
    "fisher": "Fisher mask",
    "random": "random mask",
    "random_matched": "matched random mask",
    "inverse": "inverse mask",
    "slow": "slow training",  # no mask, learning rate × keep
    "slow_matched": "matched slow training",  # each tensor's × the share the Fisher mask keeps
    "early": "early stopping",  # no mask, all numbers at the epoch that validation chooses
    "fixed": "fixed mask",  # of a file
    "sam": "SAM",  # no mask, sharpness-aware minimisation
}
MASKS = ("fisher", "random", "random_matched", "inverse")
# Their result is one of the method; all other arms are controls.
_METHODS = ("fisher", "fixed")
# Whose shares depend on what is measured: a control has to have them as the method does.
_CHOOSING = ("fisher", "random_matched", "inverse", "slow_matched")
_CHOSEN_BY = {"score": "fisher", "which": "highest", "per": "network", "average": None}
# What arms may change of the mask or control itself: those that have it, and its title. All other
# options are the training function's.
_OWN: dict[str, tuple[tuple[str, ...], type, str]] = {
    "keep": ((*MASKS, "slow", "slow_matched"), float, "keep {}"),
    "scope": ((*MASKS, "fixed"), str, "scope {}"),
    "kind": ((*MASKS, "slow_matched"), str, "{} Fisher information"),
    "max_samples": ((*MASKS, "slow_matched"), int, "{} samples"),
    "score": (_CHOOSING, str, "by {}"),
    "which": (("fisher", "random_matched", "slow_matched"), str, "{} values"),
    "per": ((*MASKS, "slow_matched"), str, "of each {}"),
    "average": (_CHOOSING, float, "average {}"),
    "patience": (("early",), int, "patience {}"),
    "file": (("fixed",), str, "{}"),
    "rho": (("sam",), float, "rho {}"),
}
_CHOICES: dict[str, Collection[str]] = {
    "scope": ("gradient", "update"),
    "kind": ("empirical", "sampled", "exact"),
    "which": ("highest", "lowest"),
    "per": ("network", "tensor"),
}
_TITLES = {"labels": "{} labels"}
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        name: As it is written.
        strategy: Kind of mask or control; of an arm of the user's own its name.
        options: What the arm changes, by name.
    """

    name: str
    strategy: str
    options: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The arm in words."""
        forms = {name: form for name, (_, _, form) in _OWN.items()} | _TITLES
        parts = [forms.get(k, f"{k} {{}}").format(v) for k, v in self.options.items()]
        return ", ".join([STRATEGIES.get(self.strategy, self.strategy), *parts])

    @property
    def is_method(self) -> bool:
        """Whether the arm is judged against the others: not a control."""
        return self.strategy in _METHODS or self.strategy not in STRATEGIES

    @property
    def masks(self) -> bool:
        """Whether the arm has a mask that is measured."""
        return self.strategy in MASKS

    @cached_property
    def own(self) -> dict[str, Any]:
        """Options of the mask or control."""
        return {name: value for name, value in self.options.items() if name in _OWN}

    @property
    def _chosen_by(self) -> dict[str, Any]:
        """What decides how many entries of each tensor learn."""
        return {name: self.own.get(name, usual) for name, usual in _CHOSEN_BY.items()}

    @cached_property
    def others(self) -> dict[str, Any]:
        """Options of the training function; those of an arm of the user's own are the arm's."""
        if self.strategy not in STRATEGIES:
            return {}
        return {name: value for name, value in self.options.items() if name not in _OWN}

    @property
    def baseline(self) -> str:
        """Name of the arm without a mask that is otherwise trained in the same way."""
        return ":".join(["none", *(f"{name}={value}" for name, value in self.others.items())])

    def is_control_of(self, method: Arm) -> bool:
        """Whether another arm is judged against this one."""
        if self.others != method.others or self.is_method:
            return False
        # Of a mask from a file, or an arm of the user's own, the size is known if it is given.
        told = method.strategy == "fisher" or "keep" in method.own
        size = told and self.own.get("keep") == method.own.get("keep")
        if self.strategy in ("random_matched", "slow_matched"):
            size = size and self._chosen_by == method._chosen_by
        match self.strategy:
            case "none" | "early" | "sam":
                return self.strategy != "sam"
            case "slow" | "slow_matched":
                return size
        scope = self.own.get("scope", "gradient") == method.own.get("scope", "gradient")
        return size and scope


def parse_arm(name: str, own: Iterable[str] = ()) -> Arm:
    """Read the name of an arm.

    Args:
        name: `strategy[:option=value ...]`.
        own: Strategies of the user's own.

    Returns:
        The arm; values of options of the training function are numbers or booleans where they look
        like one, else text.

    Raises:
        OptionError: If the strategy is unknown, an option has no meaning there, or a value is of
            the wrong type.
    """
    strategy, *parts = name.split(":")
    if strategy not in STRATEGIES and parts and _NAME.fullmatch(parts[0]):
        strategy = f"{strategy}:{parts.pop(0)}"  # package.module:function
    else:
        check_choice("arm", strategy, [*STRATEGIES, *own])
    options: dict[str, Any] = {}
    for part in parts:
        option, equals, text = part.partition("=")
        if not equals or not _NAME.fullmatch(option):
            raise OptionError(f"Arm {name!r}: write {part!r} as option=value.")
        if option not in (*_OWN, *_TITLES) and get_close_matches(option, _OWN, cutoff=0.85):
            check_choice(f"option of arm {name!r},", option, _OWN)
        options[option] = _value(name, strategy, option, text)
    if strategy == "fixed" and "file" not in options:
        raise OptionError(f"Arm {name!r} needs the file of the mask: fixed:file=mask.safetensors.")
    return Arm(name, strategy, options)


def _value(name: str, strategy: str, option: str, text: str) -> Any:
    if option not in _OWN or strategy not in STRATEGIES:
        return literal(text)
    strategies, kind, _ = _OWN[option]
    if strategy not in strategies:
        raise OptionError(
            f"Arm {name!r}: {option} has no meaning for {STRATEGIES[strategy]}: it is an option of "
            f"{', '.join(strategies)}."
        )
    try:
        value = kind(text)
    except ValueError as error:
        raise OptionError(f"Arm {name!r}: {option}={text!r} is not a number.") from error
    if option == "keep":
        check_keep(value)
    if option == "score":
        from gradmask import SCORES  # needs PyTorch, which options do not

        check_choice(option, value, SCORES)
    if option in _CHOICES:
        check_choice(option, value, _CHOICES[option])
    if option == "average" and not 0 <= value < 1:
        raise OptionError(f"Arm {name!r}: average={text!r} must be in [0, 1).")
    if option in ("max_samples", "patience") and value < 1:
        raise OptionError(f"Arm {name!r}: {option}={text!r} must be at least 1.")
    return value


def arm_title(name: str) -> str:
    """The arm in words; of a study's own arm its name."""
    return read_arm(name).title


def baseline(name: str) -> str:
    """Name of the arm without a mask that is otherwise trained in the same way."""
    return read_arm(name).baseline


def controls(name: str, names: Iterable[str]) -> list[str]:
    """Arms that an arm is judged against: no mask, and the controls with its options."""
    method = read_arm(name)
    return [other for other in names if other != name and read_arm(other).is_control_of(method)]


def read_arm(name: str) -> Arm:
    """Read the name of an arm that was checked when its study began."""
    return parse_arm(name, own=[name.split(":")[0]])
