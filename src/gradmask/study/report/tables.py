"""The numbers of a comparison as CSV files, one row for each measurement."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from gradmask.study.statistics import Results


def to_csv(results: Results) -> dict[str, str]:
    """CSV sources of what was measured.

    Args:
        results: Contents of `results.json`.

    Returns:
        `{name: source}`: `epochs`, and `influence` if it was monitored.
    """
    tables = {"epochs": _csv(_rows(results, "epochs"))}
    if any("influence" in run for run in results["runs"]):
        tables["influence"] = _csv(_rows(results, "influence"))
    return tables


def _rows(results: Results, key: str) -> Iterator[dict[str, Any]]:
    for run in results["runs"]:
        for row in run.get(key, []):
            numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
            yield {"arm": run["arm"], "seed": run["seed"], **numbers}


def _csv(rows: Iterator[dict[str, Any]]) -> str:
    found = list(rows)
    text = io.StringIO()
    columns = dict.fromkeys(name for row in found for name in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()
