"""Options from YAML and TOML files."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gradmask.cli.values import usable_path
from gradmask.errors import OptionError, check_choice


def read_file(kind: type, path: Path | None) -> dict[str, Any]:
    """Read options from a YAML or TOML file.

    Args:
        kind: The dataclass of the options.
        path: The file; None for no options.

    Returns:
        Values by name, of the types of the dataclass.

    Raises:
        OptionError: If the file cannot be read, or a name or a type in it is wrong.
    """
    if path is None:
        return {}
    from gradmask.study.options import typed
    from gradmask.study.schema import Wrong

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"config={str(path)!r} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"config={str(path)!r} is not plain text in UTF-8.") from error
    options = _parse(path, text)
    if not isinstance(options, dict) or not options:
        raise OptionError(f"config={str(path)!r} holds no options: write lines as in config.yaml.")
    for name in options:
        check_choice(f"{path} option", name, [field.name for field in fields(kind)])
    if "output" in options:
        options["output"] = usable_path("output", str(options["output"]))
    hints = get_type_hints(kind)
    for name, value in options.items():
        if get_origin(hints[name]) is Literal:
            check_choice(f"{path} {name}", value, get_args(hints[name]))
    try:
        return typed(kind, options)
    except Wrong as error:
        raise OptionError(f"{path}: {error}.") from error


def _parse(path: Path, text: str) -> Any:
    import tomllib

    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 1e-3 as a number, as YAML 1.2 does."""

    number = re.compile(r"[-+]?\d+[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    kind = "TOML" if path.suffix == ".toml" else "YAML"
    try:
        return tomllib.loads(text) if kind == "TOML" else yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        other = "it is not plain text" if isinstance(error, yaml.reader.ReaderError) else str(error)
        reason = getattr(error, "problem", None) or other
        raise OptionError(f"config={str(path)!r} is not valid {kind}{where}: {reason}.") from error
