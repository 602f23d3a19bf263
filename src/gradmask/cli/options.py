"""The options of `gradmask run` and `study`, from the command line and YAML files.

They are typed once, in the dataclasses `Comparison`, `StudyOptions` and those of recipes.
jsonargparse was chosen to read them because one parser then checks the command line and a YAML file
alike, by the same types.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from gradmask.cli.parser import Printing, usable_path
from gradmask.errors import OptionError, check_choice

if TYPE_CHECKING:
    from gradmask.recipes.catalogue import Options
    from gradmask.study import StudyOptions

_LISTS = ("arms", "models", "seeds", "levels", "rates", "monitor", "judge", "front")
_SWITCHES = ("augment", "crop", "flip", "noisy_validation")  # --no-flip is --flip=false
_MAPPINGS = ("sweep", "options", "metrics")  # name=value, of a sweep name=value,value


def read_options(words: list[str]) -> Options:
    """Read the options: defaults, over them the recipe's, a YAML file's, the command line's.

    Args:
        words: What follows `gradmask run`.

    Returns:
        The recipe's options.

    Raises:
        OptionError: If the recipe or an option is unknown, or a value cannot work.
    """
    from gradmask.recipes.catalogue import find_recipe

    named = bool(words) and not words[0].startswith("-")
    recipe = find_recipe(words[0] if named else "compare")
    size, words = _size(words[named:])
    program = f"gradmask run {recipe.name}", recipe.description
    found: Options = _read(program, recipe.config(size), words, recipe.sizes)
    return found


def read_study(words: list[str]) -> StudyOptions:
    """Read the options of `gradmask study`.

    Args:
        words: What follows `gradmask study`: the training function, then options.

    Returns:
        The options.

    Raises:
        OptionError: If there is no function, an option is unknown, or a value cannot work.
    """
    from gradmask.study import StudyOptions

    if words and not words[0].startswith("-"):
        words = ["--train", *words]
    description = "compare arms by a training function of your own: package.module:function"
    found: StudyOptions = _read(("gradmask study", description), StudyOptions(), words)
    if not found.train:
        raise OptionError("gradmask study needs a training function: package.module:function.")
    return found


def _read(program: tuple[str, str], defaults: Any, words: list[str], sizes: Any = ()) -> Any:
    """Options of a dataclass, with an object of it as their defaults."""
    from jsonargparse import ArgumentParser

    class Parser(Printing, ArgumentParser):
        def format_help(self, *args: Any, **kwargs: Any) -> str:
            text = super().format_help(*args, **kwargs)
            return re.sub(r"--\w+", lambda option: option[0].replace("_", "-"), text)

    kind = type(defaults)
    parser = Parser(prog=program[0], description=program[1], exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    if sizes:
        parser.add_argument("--size", help=f"preset: {', '.join(sizes)}")
    parser.add_class_arguments(kind)
    names = [field.name for field in fields(kind)]
    parser.set_defaults({name: getattr(defaults, name) for name in names})
    normal = _normal_form(words, [*names, "config", "print_config", "help"])
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    files.add_argument("--config", action="append", default=[])
    try:
        for file in files.parse_known_args(normal)[0].config:
            _check_file(file, names)
        parsed = parser.parse_args(normal)
    except argparse.ArgumentError as error:
        raise OptionError(_plain(str(error))) from error
    except (ValueError, RecursionError, TypeError) as error:
        raise OptionError(f"An option cannot be read: {error}") from error
    options = {name: getattr(parsed, name) for name in names}
    options["output"] = usable_path("output", options["output"])
    return kind(**options)


def _size(words: list[str]) -> tuple[str | None, list[str]]:
    """Take `--size` out: the defaults of all other options depend on it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--size")
    try:
        found, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise OptionError("--size needs a value.") from error
    return found.size, rest


def _normal_form(words: list[str], known: list[str]) -> list[str]:
    """Options as jsonargparse wants them: underscores, lists in brackets; unknown names refused."""
    normal: list[str] = []
    mappings: dict[str, list[str]] = {}
    place = 0
    while place < len(words):
        word = words[place]
        place += 1
        if not word.startswith("--"):
            normal.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name.removeprefix("no_") in _SWITCHES and name not in known and not equals:
            name, equals, value = name.removeprefix("no_"), "=", "false"
        if name in _SWITCHES and not equals:
            told = place < len(words) and not words[place].startswith("--")
            equals, value = ("", value) if told else ("=", "true")
        check_choice("option", name, known)
        if name in _LISTS:
            items = [value] if equals else []
            while not equals and place < len(words) and not words[place].startswith("--"):
                items.append(words[place])
                place += 1
            if name == "arms":
                _check_commas(items)
            text = ",".join(items)
            normal.append(f"--{name}={text if text.startswith('[') else f'[{text}]'}")
        elif name in _MAPPINGS:
            items = [value] if equals else []
            while not equals and place < len(words) and not words[place].startswith("--"):
                items.append(words[place])
                place += 1
            mappings.setdefault(name, []).extend(items)
        else:
            if name == "output" and (equals or place < len(words)):
                usable_path(name, value if equals else words[place])
            normal.append(f"--{name}{equals}{value}")
    normal += [f"--{name}={_mapping(name, items)}" for name, items in mappings.items()]
    return normal


def _check_commas(arms: list[str]) -> None:
    """Refuse a comma within an arm, such as in a file's name: it would part the arm in two."""
    from gradmask.study.arms import STRATEGIES

    for word in arms:
        before = ""
        for part in [] if word.startswith("[") else word.split(","):
            if "=" in before and ":" not in part and not get_close_matches(part, STRATEGIES):
                example = json.dumps([f"{before},{part}"])
                raise OptionError(
                    f"arms {word!r}: a comma parts arms, and {part!r} is none. For an arm with a "
                    f"comma write a list: --arms '{example}'."
                )
            before = part


def _mapping(name: str, items: list[str]) -> str:
    """`name=value` words as JSON; the values of a sweep are lists."""
    from gradmask.study.schema import literal

    found: dict[str, Any] = {}
    for item in items:
        if item.startswith("{"):  # as jsonargparse wants it
            return item
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise OptionError(f"{name} {item!r} must be written name=value.")
        key = key.replace("-", "_")
        if key in found:
            raise OptionError(f"{name} has {key} twice: write {key}=value,value.")
        found[key] = (
            [literal(part) for part in text.split(",")] if name == "sweep" else literal(text)
        )
    return json.dumps(found)


def _check_file(file: str, names: list[str]) -> None:
    """Refuse a YAML file in plain words; jsonargparse would speak of its parser."""
    import yaml

    try:
        options = yaml.safe_load(usable_path("config", file).read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"config={file!r} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        unreadable = isinstance(error, UnicodeDecodeError | yaml.reader.ReaderError)
        other = "it is not plain text in UTF-8" if unreadable else str(error)
        reason = getattr(error, "problem", None) or other
        raise OptionError(f"config={file!r} is not valid YAML{where}: {reason}.") from error
    if not isinstance(options, dict):
        raise OptionError(f"config={file!r} holds no options: write lines such as 'keep: 0.25'.")
    for name in options:
        check_choice(f"{file} option", name, names)
    if "output" in options:
        usable_path("output", str(options["output"]))


def _plain(message: str) -> str:
    """Jsonargparse's message in the words of the other errors."""
    text = " ".join(line.strip() for line in message.splitlines() if line.strip())
    found = re.match(r'Parser key "(\w+)": .*?(?:<class \'(\w+)\'>|Literal\[(.*?)\]).*: (.*)', text)
    if not found:
        return text
    name, kind, choices, value = found.groups()
    if choices:
        check_choice(name, value, re.findall(r"'(\w+)'", choices))
    return f"{name}={value!r} is not of the type {kind}."
