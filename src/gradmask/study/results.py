"""What `results.json` must hold to be used: every value is checked."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from gradmask.study.schema import (
    Wrong,
    anything,
    items,
    number,
    optional,
    record,
    seed,
    text,
    whole,
)

Results = dict[str, Any]
Row = dict[str, Any]


def _epoch(value: Any) -> float:
    if not (found := number(value)) >= 0:
        raise Wrong(f"{value!r} is no number from 0 on")
    return found


_ROW = record(
    {"epoch": _epoch},
    {
        "kept_per_parameter": items(number),
        "test_accuracy_per_class": items(number),
        "weights": text,
    },
    others=number,
)
_RECORD = record({"epoch": number, "seconds": number}, others=number)
DIVERGED = record({"epoch": whole, "reason": text})
_RUN = record(
    {"arm": text, "seed": seed, "seconds": number, "epochs": items(_ROW)},
    {
        "values": record({}, others=anything),
        "influence": items(_RECORD),
        "commit": optional(text),
        "source": text,
        "diverged": DIVERGED,
    },
)


def _parameter(value: Any) -> list[Any]:
    name, entries = items(anything, 2)(value)
    return [text(name), whole(entries)]


_NAMES = record({"arms": items(text), "seeds": items(seed)}, others=anything)
_RESULTS = record(
    {"runs": items(_RUN), "config": _NAMES, "environment": record({}, others=optional(anything))},
    {"parameters": items(_parameter)},
)


def check_results(found: Any) -> Results:
    """Check what `results.json` holds.

    Args:
        found: Its contents.

    Returns:
        The same, with NaN for numbers that were not finite.

    Raises:
        Wrong: If something in it cannot be used.
    """
    results: Results = _RESULTS(found)
    check_named(results, ("arm", "seed"), (results["config"]["arms"], results["config"]["seeds"]))
    for run in results["runs"]:
        epochs = [row["epoch"] for row in run["epochs"]]
        if epochs != sorted(set(epochs)) or not (epochs or "diverged" in run):
            raise Wrong(f"run of arm {run['arm']!r}, seed {run['seed']}: epochs are not in order")
    return results


def check_named(results: Results, keys: tuple[str, ...], names: tuple[Any, ...]) -> None:
    """Check that every run is one of those that the options name, and is there once."""
    runs = Counter((*(run[key] for key in keys), str(values_of(run))) for run in results["runs"])
    for found, count in runs.items():
        if count > 1 or not all(one in known for one, known in zip(found, names, strict=False)):
            name, number_ = found[:2]
            raise Wrong(f"run {name!r}, seed {number_} is not among its options, or there twice")


def values_of(run: Row) -> dict[str, Any]:
    """The values of a sweep that a run was made with."""
    return dict(run.get("values", {}))


def diverged_at(run: dict[str, Any]) -> int | None:
    """The epoch in which a run diverged: a loss, or influence, is not finite.

    Args:
        run: One of the runs of `results.json`.

    Returns:
        The epoch, or None if all is well.
    """
    if "diverged" in run:
        return int(run["diverged"]["epoch"])
    losses = ((row["epoch"], v) for row in run["epochs"] for k, v in row.items() if "loss" in k)
    records = ((row["epoch"], v) for row in run.get("influence", ()) for v in row.values())
    found = (math.ceil(epoch) for epoch, v in (*losses, *records) if not math.isfinite(v))
    return min(found, default=None)


def without_diverged(results: Results) -> Results:
    """The same with the runs whose numbers can be compared."""
    return results | {"runs": [run for run in results["runs"] if diverged_at(run) is None]}
