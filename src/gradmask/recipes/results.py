"""What `results.json` of image comparisons and `theorem1.json` must hold to be used."""

from __future__ import annotations

from typing import Any

from gradmask.recipes.config import Comparison
from gradmask.recipes.theorem.config import TheoremCheck
from gradmask.study.arms import parse_arm
from gradmask.study.options import from_plain
from gradmask.study.results import DIVERGED, Results, check_named, check_results
from gradmask.study.schema import Wrong, items, number, optional, record, seed, text, whole

_LOSSES = ("train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy")
_DATA = record(
    dict.fromkeys(("train", "validation", "test", "classes"), whole) | {"image": items(whole)},
    {"sum": text, "weights": text, "class_names": items(text), "test_majority": number},
)


def check_comparison(found: Any) -> Results:
    """Check what `results.json` holds, of image comparisons more than of others.

    Args:
        found: Its contents.

    Returns:
        The same, with NaN for numbers that were not finite.

    Raises:
        Wrong: If something in it cannot be used.
        OptionError: If an option or an arm cannot work.
    """
    results = check_results(found)
    if "train" in results["config"]:  # a training function of the user's own
        return results
    if "parameters" not in results or "data" not in results:
        raise Wrong("parameters or data are missing")
    _DATA(results["data"])
    config = from_plain(Comparison, results["config"])
    parameters, names = len(results["parameters"]), range(results["data"]["classes"])
    times: dict[str, Any] = {}
    for run in results["runs"]:
        rows, where = run["epochs"], f"run of arm {run['arm']!r}, seed {run['seed']}"
        for row in rows:
            due = row["epoch"] % config.evaluate_every == 0 or row["epoch"] == config.epochs
            if any(name not in row for name in (_LOSSES if due else _LOSSES[:1])):
                raise Wrong(f"{where}: an epoch lacks one of {', '.join(_LOSSES)}")
            if len(row.get("test_accuracy_per_class", names)) != len(names):
                raise Wrong(f"{where}: test_accuracy_per_class does not fit the classes")
        if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
            raise Wrong(f"{where}: its epochs are not in order")
        arm = parse_arm(run["arm"])
        if "diverged" in run:
            continue
        if len(rows) != config.epochs and arm.strategy != "early":
            raise Wrong(f"{where}: it has {len(rows)} of {config.epochs} epochs")
        if arm.masks and any(len(r.get("kept_per_parameter", ())) != parameters for r in rows):
            raise Wrong(f"{where}: kept_per_parameter does not fit the parameters")
        shape = [(record["epoch"], sorted(record)) for record in run.get("influence", ())]
        if times.setdefault(run["arm"], shape) != shape:
            raise Wrong(f"{where}: its influence was measured at other times than that of others")
    return results


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
_TRAINED = record({"model": text, "seed": seed, "seconds": number}, {"diverged": DIVERGED})
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
    check_named(results, ("model", "seed"), (config.models, config.seeds))
    for run in results["runs"]:
        for row in run.get("measurements", ()):
            if row["activation"] not in ("own", "smooth") or not row["steps"]:
                raise Wrong(f"a measurement of {run['model']!r} is of no known network")
            if len({len(row[name]) for name in _SERIES}) > 1:
                raise Wrong(f"measurements of {run['model']!r} differ in length")
    return results
