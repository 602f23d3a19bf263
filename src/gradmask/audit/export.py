"""A ranking as other tools read it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradmask.errors import OptionError
from gradmask.tensor_files import atomic_file

if TYPE_CHECKING:
    from gradmask.audit.rank import Ranking


def columns(ranking: Ranking, order: Tensor | None = None) -> dict[str, list[Any]]:
    """The table, column by column: names of classes where they are known.

    Args:
        ranking: The ranking.
        order: Rows, in order (default: all, the most suspicious first).
    """
    order = ranking.order if order is None else order
    ids = ranking.ids[order].tolist()
    found: dict[str, list[Any]] = {"sample": ids}
    if ranking.keys is not None:
        found["key"] = [_text(ranking.keys[i]) for i in ids]
    if ranking.positions is not None:
        found["position"] = ranking.positions[order].tolist()
    if ranking.labels is not None:
        found["label"] = _named(ranking.labels[order], ranking.class_names)
    found |= {
        "prediction": _named(ranking.predictions[order], ranking.class_names),
        "suggestion": _named(ranking.suggestions[order], ranking.class_names),
        "suggestion_probability": ranking.suggestion_probabilities[order].tolist(),
        "suspicion": ranking.suspicion[order].tolist(),
        "flagged": ranking.flagged[order].tolist(),
    }
    if ranking.threshold is not None:
        found["planted"] = ranking.planted[order].tolist()
    return found | {name: value[order].tolist() for name, value in ranking.scores.items()}


def save_table(ranking: Ranking, path: Path) -> Path:
    """Write the table atomically, the most suspicious sample first.

    Args:
        ranking: The ranking.
        path: Ends in `.csv` or `.parquet`.

    Returns:
        The path.

    Raises:
        OptionError: If the path ends in something else, or pyarrow is not installed.
    """
    table = columns(ranking)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix.lower()
    if kind == ".csv":
        with atomic_file(path) as file:
            file.write(_csv(table).encode())
    elif kind == ".parquet":
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise OptionError(
                "Parquet needs pyarrow: pip install pyarrow, or save a .csv."
            ) from error
        with atomic_file(path) as file:
            pyarrow.parquet.write_table(pyarrow.table(table), file)
    else:
        raise OptionError(f"{path.name} must end in .csv or .parquet.")
    return path


def issues(ranking: Ranking) -> Any:
    """As cleanlab has label issues.

    Args:
        ranking: The ranking.

    Returns:
        A pandas `DataFrame` with `is_label_issue`, `label_score`, `given_label` and
        `predicted_label`, in the order of the data; of several labels a sample also `sample` and
        `position`.

    Raises:
        OptionError: If pandas is not installed, or no labels are known.
    """
    try:
        import pandas
    except ImportError as error:
        raise OptionError("cleanlab's form is a table of pandas: pip install pandas.") from error
    if ranking.labels is None:
        raise OptionError("No labels are known: give rank(..., labels=...).")
    places = {}
    if ranking.positions is not None:
        places = {"sample": ranking.ids.numpy(), "position": ranking.positions.numpy()}
    return pandas.DataFrame(
        {
            **places,
            "is_label_issue": ranking.flagged.numpy(),
            "label_score": (1 - ranking.suspicion).numpy(),
            "given_label": _named(ranking.labels, ranking.class_names),
            "predicted_label": _named(ranking.predictions, ranking.class_names),
        }
    )


def _named(labels: Tensor, names: Sequence[str] | None) -> list[Any]:
    """Names of labels where there are some; nothing where there is no label."""
    if names is None:
        return [None if label < 0 else label for label in labels.tolist()]
    return [
        _text(names[label]) if 0 <= label < len(names) else (None if label < 0 else str(label))
        for label in labels.tolist()
    ]


def _text(value: Any) -> str:
    """A name as files can hold it: names of files may have bytes that are no characters."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _csv(table: dict[str, list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    for row in zip(*table.values(), strict=True):
        writer.writerow(map(_cell, row))
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return int(value) if isinstance(value, bool) else value
