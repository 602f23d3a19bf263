"""What `results.json` and `theorem1.json` must hold to be used: every value is checked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from gradmask.experiments.arms import MASKS, parse_arm
from gradmask.experiments.config import Comparison, from_plain
from gradmask.experiments.schema import (
    Check,
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
from gradmask.experiments.theorem.config import TheoremCheck

Results = dict[str, Any]

_LOSSES = ("train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy")
_ROW = record(
    {"epoch": lambda value: whole(value, 1), **dict.fromkeys(_LOSSES, number)},
    {"kept_per_parameter": items(number), "weights": text},
    others=number,
)
_RECORD = record({"epoch": number, "seconds": number}, others=number)
_DIVERGED = record({"epoch": whole, "reason": text})
_RUN = record(
    {"arm": text, "seed": seed, "seconds": number, "epochs": items(_ROW)},
    {
        "influence": items(_RECORD),
        "commit": optional(text),
        "diverged": _DIVERGED,
    },
)


def _parameter(value: Any) -> list[Any]:
    name, entries = items(anything, 2)(value)
    return [text(name), whole(entries)]


_COMPARISON = record(
    {
        "runs": items(_RUN),
        "config": record({}),
        "data": record(
            dict.fromkeys(("train", "validation", "test", "classes"), whole)
            | {"image": items(whole)},
            {"sum": text},
        ),
        "parameters": items(_parameter),
        "environment": record({}, others=optional(anything)),
    }
)


def check_comparison(found: Any) -> Results:
    """Check what `results.json` holds.

    Args:
        found: Its contents.

    Returns:
        The same, with NaN for numbers that were not finite.

    Raises:
        Wrong: If something in it cannot be used.
        OptionError: If an option or an arm cannot work.
    """
    results: Results = _COMPARISON(found)
    config = from_plain(Comparison, results["config"])
    _check_seeds(results, "arm", config.arms, config.seeds)
    parameters = len(results["parameters"])
    times: dict[str, Any] = {}
    for run in results["runs"]:
        rows, where = run["epochs"], f"run of arm {run['arm']!r}, seed {run['seed']}"
        if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
            raise Wrong(f"{where}: its epochs are not in order")
        if "diverged" in run:
            continue
        if len(rows) != config.epochs:
            raise Wrong(f"{where}: it has {len(rows)} of {config.epochs} epochs")
        masked = parse_arm(run["arm"]).strategy in MASKS
        if masked and any(len(r.get("kept_per_parameter", ())) != parameters for r in rows):
            raise Wrong(f"{where}: kept_per_parameter does not fit the parameters")
        shape = [(record["epoch"], sorted(record)) for record in run.get("influence", ())]
        if times.setdefault(run["arm"], shape) != shape:
            raise Wrong(f"{where}: its influence was measured at other times than that of others")
    return results


def _check_seeds(
    results: Results, key: str, names: tuple[str, ...], seeds: tuple[int, ...]
) -> None:
    """Every run is one of those that the options name, and is there once."""
    runs = Counter((run[key], run["seed"]) for run in results["runs"])
    for (name, seed_), count in runs.items():
        if name not in names or seed_ not in seeds or count > 1:
            raise Wrong(f"run {name!r}, seed {seed_} is not among its options, or there twice")


_SLOPES = record({"kl": optional(number), "error": optional(number)})
_ERRORS = record({"mean": number, "median": number})
_RATIOS = ("spearman", "spearman_of_norm", "ratio_median", "ratio_min", "ratio_max")
_DIAGONAL = record(dict.fromkeys(_RATIOS, number))
_SERIES = ("steps", "kl", "quadratic", "error", "error_median", "rounding")
_MEASUREMENT = record(
    {
        "state": text,
        "activation": text,
        **dict.fromkeys((*_SERIES, "fitted"), items(number)),
        "slopes": _SLOPES,
        "relative_error": record({"lr": _ERRORS, "lr_over_batch": _ERRORS}),
        "diagonal": record({"exact": _DIAGONAL, "empirical": _DIAGONAL}),
    }
)
_TRAINED = record({"model": text, "seed": seed, "seconds": number}, {"diverged": _DIVERGED})
_MEASURED = record(
    {
        **dict.fromkeys(("train_loss", "test_accuracy"), number),
        "parameters": whole,
        "measurements": items(_MEASUREMENT),
    }
)


def _trained(value: Any) -> Any:
    run = _TRAINED(value)
    return run if "diverged" in run else _MEASURED(run)


_THEOREM = record(
    {"runs": items(_trained), "config": record({})},
    {"data": record({"sum": text}), "environment": record({})},
)


def check_theorem(found: Any) -> Results:
    """Check what `theorem1.json` holds, as `check_comparison` does."""
    results: Results = _THEOREM(found)
    config = from_plain(TheoremCheck, results["config"])
    _check_seeds(results, "model", config.models, config.seeds)
    for run in results["runs"]:
        for row in run.get("measurements", ()):
            if row["activation"] not in ("own", "smooth") or not row["steps"]:
                raise Wrong(f"a measurement of {run['model']!r} is of no known network")
            if len({len(row[name]) for name in _SERIES}) > 1:
                raise Wrong(f"measurements of {run['model']!r} differ in length")
    return results


CHECKS: dict[str, Check] = {"results.json": check_comparison, "theorem1.json": check_theorem}


def diverged_at(run: dict[str, Any]) -> int | None:
    """The epoch in which a run diverged: its loss, or another number of it, is not finite.

    Args:
        run: One of the runs of `results.json`.

    Returns:
        The epoch, or None if all is well.
    """
    if "diverged" in run:
        return int(run["diverged"]["epoch"])
    rows = [*run["epochs"], *run.get("influence", ())]
    return min((math.ceil(r["epoch"]) for r in rows if not all(_numbers(r))), default=None)


def _numbers(row: dict[str, Any]) -> Iterator[bool]:
    for value in row.values():
        for one in value if isinstance(value, list) else [value]:
            yield not isinstance(one, float) or math.isfinite(one)


def without_diverged(results: Results) -> Results:
    """The same with the runs whose numbers can be compared."""
    return results | {"runs": [run for run in results["runs"] if diverged_at(run) is None]}
