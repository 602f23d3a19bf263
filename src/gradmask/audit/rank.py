"""One table of all that is known of each sample, the most suspicious first."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from gradmask.audit.dynamics import Dynamics
from gradmask.audit.planted import (
    Planted,
    Threshold,
    check_false_alarms,
    threshold,
    whole_labels,
)
from gradmask.audit.scores import combined, highest
from gradmask.errors import DataError, GradmaskWarning, OptionError, StateError

FALSE_ALARMS = 0.1
COLUMNS = (  # of the table, beside the scores
    *("sample", "key", "position", "label", "prediction", "suggestion", "suggestion_probability"),
    *("suspicion", "flagged", "planted"),
)


@dataclass(frozen=True, repr=False)
class Ranking:
    """Every sample with its scores, in the order of the data.

    Attributes:
        ids: Number of each sample, int64; with `positions`, of each label's sample.
        positions: Place of each label within its sample, or None.
        labels: Given label of each, or None.
        predictions: What training took each for: its label, or the suggestion if most visits were
            wrong; -1 where that is not known.
        suggestions: The most probable class other than the label; -1 where there is none.
        suggestion_probabilities: Mean probability of the suggestion if the label is excluded.
        suspicion: Combined rank in [0, 1], high where the label is suspicious; NaN where training
            has made no visit.
        flagged: Suspicion beyond the threshold, or the share that was asked for.
        planted: Samples that were planted, which are not audited.
        scores: By name, as in `SCORES`.
        threshold: The threshold and what it promises, with planted samples.
        keys: Name of each sample, such as its file, or None.
        class_names: Name of each class, or None.
        originals: Labels from before some were planted, or None.
    """

    ids: Tensor
    positions: Tensor | None
    labels: Tensor | None
    predictions: Tensor
    suggestions: Tensor
    suggestion_probabilities: Tensor
    suspicion: Tensor
    flagged: Tensor
    planted: Tensor
    scores: dict[str, Tensor]
    threshold: Threshold | None = None
    keys: Sequence[Any] | None = None
    class_names: Sequence[str] | None = None
    originals: Tensor | None = None

    def __repr__(self) -> str:
        """How much there is, and what comes first."""
        first = ", ".join(str(i) for i in self.ids[self.order[:5]].tolist())
        return (
            f"Ranking of {len(self)}, {int(self.flagged.sum())} flagged; the most suspicious: "
            f"{first}. Look at it with .report('page.html') or .save('table.csv')."
        )

    def __len__(self) -> int:
        """Number of samples, or of labels."""
        return len(self.ids)

    @property
    def order(self) -> Tensor:
        """Rows from the most suspicious to the least; planted and unvisited ones last."""
        known = torch.where(self.planted, torch.nan, self.suspicion).nan_to_num(-1.0)
        return known.argsort(descending=True, stable=True)

    def clean(self, dataset: Any) -> Subset[Any]:
        """The data set without the flagged samples, in their order.

        Args:
            dataset: What was trained on, with the same numbers.
        """
        kept = self._whole("clean", ~self.flagged)
        if hasattr(dataset, "__len__") and len(dataset) != len(kept):
            raise DataError(
                f"The data set has {len(dataset)} samples, and {len(kept)} were ranked: give the "
                "one that was trained on."
            )
        return Subset(dataset, kept.nonzero().flatten().tolist())

    def relabelled(self, minimum: float = 0.5) -> Tensor:
        """The given labels, but for flagged samples the suggestion, where it is probable enough.

        Planted samples get back the label that they had before.

        Args:
            minimum: The least `suggestion_probabilities` to follow.

        Returns:
            Labels of all samples, int64.
        """
        if self.labels is None:
            raise OptionError("No labels are known: give rank(..., labels=...).")
        likely = self.flagged & (self.suggestion_probabilities >= minimum)
        changed = likely & (self.suggestions >= 0)
        labels = self.labels
        if self.originals is not None:
            labels = torch.where(self.planted, self.originals, labels)
        return self._whole("relabelled", torch.where(changed, self.suggestions, labels))

    def save(self, path: str | Path) -> Path:
        """Write the table, the most suspicious first: `.csv`, or `.parquet` (with pyarrow).

        Args:
            path: Where; its end says which form.

        Returns:
            The path.
        """
        from gradmask.audit.export import save_table

        return save_table(self, Path(path))

    def issues(self) -> Any:
        """As cleanlab has label issues: a pandas `DataFrame` in the order of the data.

        Returns:
            Columns `is_label_issue`, `label_score` (1 − suspicion), `given_label`,
            `predicted_label`.
        """
        from gradmask.audit.export import issues

        return issues(self)

    def report(self, path: str | Path, images: Any = None, top: int = 200) -> Path:
        """Write one self-contained page: sorted, filtered, with images where there are some.

        Args:
            path: Where.
            images: Image of a sample by its number, as `images[i]`: a PIL image, an array, a tensor
                (channels, height, width), or a sample of a data set that begins with one.
            top: Samples on the page, the most suspicious ones.

        Returns:
            The path.

        Raises:
            ImportError: If the extra `study` is not installed.
        """
        try:
            from gradmask.audit.report import write_page
        except ImportError as error:
            raise ImportError(
                f"The page needs {error.name}: pip install 'gradmask[study]'. (.save('table.csv') "
                "needs nothing more.)"
            ) from error
        return write_page(self, Path(path), images, top)

    def _whole(self, doing: str, values: Tensor) -> Tensor:
        if self.positions is not None:
            raise OptionError(
                f"{doing}() is of whole samples, and each of several labels has a row."
            )
        return values


def rank(
    dynamics: Dynamics,
    labels: Tensor | Sequence[int] | None = None,
    *,
    extra: Mapping[str, Tensor] | None = None,
    planted: Planted | None = None,
    false_alarms: float = FALSE_ALARMS,
    share: float | None = None,
    keys: Sequence[Any] | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
) -> Ranking:
    """Rank all training samples by how suspicious their labels are.

    The combined rank is Σ_k w_k r_k, where r_k is the share of samples less suspicious by score k,
    and the weights w (`COMBINED`) were fitted on other data.

    Args:
        dynamics: What training said of the samples: `Dynamics`, or a `DynamicsCallback`.
        labels: Their given labels, (samples,), or (samples, positions) where each has several.
        extra: Further scores by name, one value a sample, such as those of `gradient_scores`.
        planted: Samples whose label was made wrong (`plant`), by which the threshold is calibrated.
        false_alarms: Share of the flagged samples whose label may be right (with `planted`).
        share: Flag this share of the samples in place of a threshold, the most suspicious ones.
            Without it and without planted samples none is flagged, since nothing says where to cut.
        keys: Names of the samples, such as their files.
        class_names: Names of the classes, in their order or by number.

    Returns:
        The table.

    Raises:
        DataError: If something is of another length than the samples, or labels are not whole.
        OptionError: If an option is out of range.
        StateError: If ranks have noted what has not been gathered, or no sample was visited.
    """
    if share is not None and (not isinstance(share, Real) or not 0 <= share < 1):
        raise OptionError(f"share={share!r} must be at least 0 and below 1.")
    dynamics = getattr(dynamics, "dynamics", dynamics)
    if not isinstance(dynamics, Dynamics):
        raise OptionError(f"A {type(dynamics).__name__} is not Dynamics, nor has it any yet.")
    scores = {name: value.flatten() for name, value in dynamics.scores().items()}
    for name, value in (extra or {}).items():
        if name in (*scores, *COLUMNS):
            raise OptionError(f"The table has a column {name!r}: give the score another name.")
        values = torch.as_tensor(value, dtype=torch.float64, device="cpu")
        _check_length(name, values.flatten(), len(scores["visits"]))
        scores[name] = values.flatten()
    suggestions, probabilities = (value.flatten() for value in dynamics.suggestions())
    rows = len(suggestions)
    positions = rows // dynamics.samples
    keys = None if keys is None else list(keys)  # by their order, also those of pandas
    _check_length("keys", keys, dynamics.samples)
    if labels is not None:
        labels = whole_labels(labels).flatten()
        _check_length("labels", labels, rows)
    place = torch.arange(rows, device="cpu")
    chosen = torch.zeros(rows, dtype=torch.bool, device="cpu")
    if planted is not None:
        if positions > 1:
            raise OptionError("planted= is of whole samples, and each of several labels has a row.")
        _check_length("planted.labels", planted.labels, rows)
        chosen[planted.ids.cpu()] = True
    suspicion = combined(scores)
    if not suspicion.isfinite().any():
        raise StateError(
            "No sample was visited: call dynamics.update(ids, logits, targets) in each step of a "
            "training before rank()."
        )
    known = suspicion.isfinite() & ~chosen
    cut = None
    check_false_alarms(false_alarms)
    if planted is not None and share is None:
        cut = threshold(suspicion[known], suspicion[chosen & suspicion.isfinite()], false_alarms)
        _warn_if_not_learnt(scores["last_loss"][known], cut)
    if planted is not None and planted.kind == "class":
        own = int(planted.labels.max())
        suggestions = torch.where(suggestions == own, -1, suggestions)
    flagged = _flagged(suspicion, known, cut, share)
    unlabelled = torch.full_like(suggestions, -1)
    right = unlabelled if labels is None else torch.where(scores["visits"] > 0, labels, -1)
    found = Ranking(
        ids=place // positions,
        positions=place % positions if positions > 1 else None,
        labels=labels,
        predictions=torch.where(scores["wrong_share"] > 0.5, suggestions, right),
        suggestions=suggestions,
        suggestion_probabilities=probabilities,
        suspicion=suspicion,
        flagged=flagged,
        planted=chosen,
        scores=scores,
        threshold=cut,
        keys=keys,
        class_names=_names(class_names),
        originals=None if planted is None else planted.originals,
    )
    return found if positions == 1 else _labelled(found)


def _warn_if_not_learnt(last_loss: Tensor, cut: Threshold) -> None:
    """Right labels that are not learnt yet look like planted ones."""
    open_ = float((last_loss > math.log(2)).double().mean())
    if open_ > 0.5 and cut.value < math.inf:
        warnings.warn(
            f"At the end of training {open_:.0%} of the labels have a probability below a half: "
            "they are not learnt yet, right ones neither, and the promised rate of false alarms "
            "does not hold. Train longer, or give share=.",
            GradmaskWarning,
            stacklevel=3,
        )


def _flagged(
    suspicion: Tensor, known: Tensor, cut: Threshold | None, share: float | None
) -> Tensor:
    if share is None:
        value = torch.inf if cut is None else cut.value
        return known & (suspicion >= value)
    return highest(suspicion, known, round(share * int(known.sum())))


def _names(names: Sequence[str] | Mapping[int, str] | None) -> list[str] | None:
    if names is None or not isinstance(names, Mapping):
        return None if names is None else [str(name) for name in names]
    try:
        found = {int(number): str(name) for number, name in names.items()}
    except (TypeError, ValueError) as error:
        raise OptionError(
            "class_names must be a list, or names by their class's number."
        ) from error
    return [found.get(number, str(number)) for number in range(max(found, default=-1) + 1)]


def _labelled(ranking: Ranking) -> Ranking:
    """Only the rows that had a label: of samples of several labels, some have fewer."""
    seen = ranking.scores["visits"] > 0
    columns = {
        name: value[seen] for name, value in vars(ranking).items() if isinstance(value, Tensor)
    }
    scores = {name: value[seen] for name, value in ranking.scores.items()}
    return Ranking(**{**vars(ranking), **columns, "scores": scores})


def _check_length(name: str, values: Any, expected: int) -> None:
    if values is None:
        return
    found = values.numel() if isinstance(values, Tensor) else len(values)
    if found != expected:
        raise DataError(f"{name} has {found} entries, and there are {expected}: one for each.")
