"""Images whose labels are in a table: a folder in any order, and a CSV file."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradmask.errors import DataError, first_names
from gradmask.recipes.data.folders import EXTENSIONS, SPLITS, rows_of, warn_once

_FILE, _LABEL = ("file", "file_name", "filename"), ("label",)


def labelled_images(folder: Path, table: Path) -> dict[str, Any]:
    """List the images that a table names; none is opened.

    Args:
        folder: Holds the images.
        table: Lines of `file` (a path in the folder), `label` and perhaps `split` (`train`, `val`
            or `test`), under a line of these names; between commas, semicolons or tabs.

    Returns:
        Data sets by split with the columns `image` and `label`. A warning says how many images of
        the folder the table does not name.

    Raises:
        DataError: If the table cannot be read, lacks a column, a label or a class, names a file
            twice or one that is not there, or has no line to train on.
    """
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    missing, seen = [], set()
    for line, name, label, split in _lines(table):
        path = os.path.normpath(folder / name)
        if path in seen:
            raise DataError(
                f"{table}, line {line}: {name!r} is there twice: keep one of the lines."
            )
        seen.add(path)
        if not os.path.isfile(path):
            missing.append(name)
        found[split][label].append(path)
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of the {len(seen)} files in {table}: "
            f"{first_names(missing, 3)}. Files must be written as paths in that folder, with "
            "their endings."
        )
    names = sorted(found["train"])
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    if len(names) < 2:
        raise DataError(f"{table} has {len(names)} classes to train on: two are needed at least.")
    for split, classes in found.items():
        if unknown := set(classes) - set(names):
            raise DataError(f"{table} has a class in {split} that is not in train: {min(unknown)}.")
    unnamed = sorted(set(_images(folder)) - seen)
    if unnamed:
        warn_once(
            f"Left out of {folder}: {len(unnamed)} images that {table.name} does not name (first: "
            f"{os.path.relpath(unnamed[0], folder)!r})."
        )
    return {split: rows_of(classes, names) for split, classes in found.items()}


def _lines(table: Path) -> Iterator[tuple[int, str, str, str]]:
    """Number, file, label and split of every line."""
    splits = {name: split for split, names in SPLITS.items() for name in names}
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter=max(",;\t", key=head.count))
            columns = {str(name).strip().lower(): name for name in reader.fieldnames or ()}
            of_file, of_label = (
                next((columns[name] for name in known if name in columns), None)
                for known in (_FILE, _LABEL)
            )
            if of_file is None or of_label is None:
                raise DataError(
                    f"{table} must have the columns file and label in its first line, and has "
                    f"{', '.join(columns) or 'none'}: name them so."
                )
            for row in reader:
                name, label = (row[of_file] or "").strip(), (row[of_label] or "").strip()
                split = (row.get(columns.get("split", "")) or "train").strip().lower()
                if not name or not label or split not in splits:
                    what = "file" if not name else "label" if not label else "known split"
                    raise DataError(f"{table}, line {reader.line_num} has no {what}: add it.")
                yield reader.line_num, name, label, splits[split]
    except OSError as error:
        raise DataError(f"labels_csv={str(table)!r} cannot be read: {error.strerror}.") from error
    except (csv.Error, UnicodeError) as error:
        raise DataError(f"{table} is no CSV file in UTF-8: {error}.") from error


def _images(folder: Path) -> Iterator[str]:
    for where, _, files in os.walk(folder):
        for name in files:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield os.path.normpath(os.path.join(where, name))
