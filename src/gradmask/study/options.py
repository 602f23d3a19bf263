"""Frozen dataclasses of options: plain values of them, and back, with every type checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_args, get_type_hints

from gradmask.errors import OptionError
from gradmask.study.schema import check_types


class Options(Protocol):
    """A dataclass of options."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class RunOptions(Options, Protocol):
    """A frozen dataclass of options, each with a default, that names its output folder.

    Attributes:
        EXTENDABLE: Options that name what is run, to which a later visit to the folder may add.
        NOT_RESULTS: Options that may change between visits, because no result depends on them.
    """

    EXTENDABLE: ClassVar[Any]
    NOT_RESULTS: ClassVar[Any]

    @property
    def output(self) -> Path:
        """Folder for results."""


Kind = TypeVar("Kind", bound=RunOptions)


def to_plain(config: Options) -> dict[str, Any]:
    """Options as values that YAML and JSON know, without that of a single visit, `stop_after`."""
    plain = {tuple: list, Path: str}
    return {
        name: next((turn(v) for kind, turn in plain.items() if isinstance(v, kind)), v)
        for name, v in asdict(config).items()
        if name != "stop_after"
    }


def from_plain(kind: type[Kind], options: dict[str, Any]) -> Kind:
    """Options as `to_plain` wrote them, perhaps by an earlier version that had fewer.

    Args:
        kind: The dataclass of the options.
        options: Plain values by name, from a file; those of unknown names are left out.

    Returns:
        The options.

    Raises:
        Wrong: If a value is of another type.
        OptionError: If one cannot work.
    """
    known = {field.name for field in fields(kind)}
    return kind(**typed(kind, {name: v for name, v in options.items() if name in known}))


def typed(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """Plain values of a file as a dataclass of options has them.

    Args:
        kind: The dataclass.
        options: Plain values by name.

    Raises:
        Wrong: If a value is of another type.
    """
    check_types(kind, options)
    turned: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    hints = get_type_hints(kind)
    for name in [n for n, v in turned.items() if isinstance(v, str)]:
        if hints[name] == Path or Path in get_args(hints[name]):
            turned[name] = Path(turned[name])
    return turned


def to_yaml(config: Options) -> str:
    """Options as the YAML that `gradmask run RECIPE --config` reads."""
    import yaml

    return yaml.safe_dump(to_plain(config), sort_keys=False, default_flow_style=None)


def check_different(name: str, values: Sequence[Any]) -> None:
    """Check that there are values, and none twice."""
    if not values or len(set(map(repr, values))) < len(values):
        raise OptionError(f"{name}={list(values)} must be one or more different values.")


def check_counts(options: object, *names: str) -> None:
    """Raise an error unless options are at least 1, or None.

    Args:
        options: A dataclass of options.
        names: Those that count something.

    Raises:
        OptionError: If one is less.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise OptionError(f"{name}={value!r} must be at least 1.")
