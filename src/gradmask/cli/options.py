"""A dataclass of options as the parameters of a command, with help, headings and defaults.

Each option is typed once, in the dataclass, whose docstring is its help.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter

from gradmask.cli.values import read_items, read_pairs, read_path, read_text, read_whole

_GROUPS = {
    "Data": "data labels_csv train_size test_size classes old_classes per_class image_size"
    " streaming workers skip_damaged label_noise noise noisy_validation plant labels validation"
    " augment crop flip transform forget forget_count",
    "Model": "model models weights width stem_stride pretrained",
    "Masks": "arms keep scope fisher_kind fisher_samples rho old_samples",
    "Comparison": "seeds sweep options choose judge metrics front rates levels",
    "Training": "epochs evaluate_every batch_size precision channels_last compile optimizer lr"
    " momentum nesterov weight_decay schedule class_weights updates more_epochs",
    "Influence": "monitor monitor_fisher monitor_sources monitor_probe monitor_step monitor_every"
    " sources probe decades steps",
    "Machine": "device engine jobs threads scheduler",
    "Output": "size config output save_every checkpoint_every stop_after",
}
HEADINGS = {
    name: Group(title, sort_key=place)
    for place, (title, names) in enumerate(_GROUPS.items())
    for name in names.split()
}
_POSITIONAL = ("train", "folder")


def command(
    run: Callable[..., int],
    parameters: Sequence[inspect.Parameter],
    text: str,
) -> Callable[..., int]:
    """A function as cyclopts reads it, with these parameters and docstring.

    `run` is called with what the command line gives, by name, and with nothing else: defaults are
    shown, and are below what a file says.
    """

    def called(*given: Any, **named: Any) -> int:
        names = [parameter.name for parameter in parameters]
        return run(**dict(zip(names, given, strict=False)), **named)

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {}
    called.__doc__ = text
    return called


def parameters_of(
    kind: type, defaults: Mapping[str, Any] | None = None, group: Group | None = None
) -> list[inspect.Parameter]:
    """The fields of a dataclass as parameters, with defaults in place of its own, or a heading."""
    hints = get_type_hints(kind)
    found = []
    for field in fields(kind):
        default = (defaults or {}).get(field.name, _default(field))
        heading = group or HEADINGS.get(field.name)
        annotation = _annotation(field.name, hints[field.name], default, heading)
        found.append(parameter(field.name, annotation, default))
    return found


def parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    """A parameter of a command: an option, or a word that stands first."""
    kinds = inspect.Parameter
    kind = kinds.POSITIONAL_OR_KEYWORD if name in _POSITIONAL else kinds.KEYWORD_ONLY
    return inspect.Parameter(name, kind, annotation=annotation, default=default)


def help_of(first: str, *kinds: type, **more: str) -> str:
    """Docstring of a command: a line, the options of dataclasses, and others by name."""
    docs = [(inspect.getdoc(kind) or "").partition("Attributes:\n")[2] for kind in kinds]
    docs = [re.sub(r"\n {8,}", " ", doc) for doc in docs]  # each in one line, to be wrapped anew
    options = [*docs, *(f"    {name}: {text}" for name, text in more.items())]
    return "\n".join([first, "", "Args:", *options])


def file_options() -> list[inspect.Parameter]:
    """The options `--config` and `--print-config`, whose help is `FILE_HELP`."""
    group = HEADINGS["config"]
    reader = Parameter(converter=read_path, group=group, allow_repeating=True)
    switch = Parameter(negative="", group=group, show_default=False)
    return [
        parameter("config", Annotated[Path | None, reader]),
        parameter("print_config", Annotated[bool, switch], False),
    ]


def size_option(sizes: Sequence[str]) -> inspect.Parameter:
    """The option `--size`, which is not shown where there are none."""
    group = HEADINGS["size"]
    about = Parameter(group=group, choices=sizes or None, show=bool(sizes), allow_repeating=True)
    return parameter("size", Annotated[str | None, about])


FILE_HELP = {
    "config": "YAML or TOML file with any of these options; the command line is over it.",
    "print_config": "Print all options as such a file, and end.",
}


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default


def _annotation(name: str, hint: Any, default: Any, group: Group | None) -> Any:
    """A field's type, and how its words are read."""
    optional = NoneType in get_args(hint)
    plain = next(one for one in get_args(hint) if one is not NoneType) if optional else hint
    # The last of several wins, so that what is longer may follow what a script has.
    more: dict[str, Any] = {"allow_repeating": True, "show_default": _shown(default)}
    if get_origin(plain) is tuple:
        more |= {**SEVERAL, "converter": partial(read_items, get_args(plain)[0])}
    elif get_origin(plain) is dict:
        hint = tuple[str, ...]
        more |= {**SEVERAL, "converter": partial(read_pairs, name == "sweep")}
    elif plain is int or (plain is str and optional):
        more["converter"] = partial(read_whole if plain is int else read_text, optional=optional)
    elif plain is Path:
        more["converter"] = read_path
    if group:
        more["group"] = group
    return Annotated[hint, Parameter(**more)]


# An option with several words; lists in brackets are read by `read_items`.
SEVERAL: dict[str, Any] = {"consume_multiple": 1, "negative": "", "json_list": False}


def _shown(default: Any) -> str | bool:
    """How a default is shown; None, no name and no list are not."""
    if isinstance(default, tuple) and default:
        return " ".join(map(str, default[:6])) + (" ..." if len(default) > 6 else "")
    return isinstance(default, bool | int | float | Path) or bool(default)
