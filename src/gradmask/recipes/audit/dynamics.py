"""`gradmask audit`: which labels are suspicious, by what training itself said of its images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from gradmask.audit import Dynamics, Ranking, rank
from gradmask.audit.scores import SCORES, suspicion_share
from gradmask.errors import OptionError, StateError, check_choice
from gradmask.recipes.audit.options import DynamicsAudit
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.images import ImageData, load_images
from gradmask.recipes.identity import check_data, data_sum
from gradmask.recipes.training.checkpoint import describe_run
from gradmask.recipes.training.run import DYNAMICS
from gradmask.study.files import read_kept
from gradmask.study.folder import RESULTS_FILE, check_ours, read_results, run_directory
from gradmask.study.options import from_plain
from gradmask.study.results import without_diverged
from gradmask.study.spec import Spec

COMBINED = "combined rank"
BASELINE = "last_loss"
Found = dict[str, float]


@dataclass(frozen=True)
class RankedRun:
    """One run with what its training said of each image.

    Attributes:
        spec: The run.
        data: Its images and labels.
        ranking: The images, ranked.
    """

    spec: Spec
    data: ImageData
    ranking: Ranking

    @property
    def wrong(self) -> Tensor:
        """Images whose label is known to be wrong, those that were planted not among them."""
        wrong = self.data.train_labels != self.data.train_clean_labels
        return wrong & ~self.ranking.planted

    @cached_property
    def detection(self) -> dict[str, Found] | None:
        """AUROC and average precision of each score; None where no wrong label is known."""
        audited = ~self.ranking.planted & self.ranking.suspicion.isfinite()
        wrong = self.wrong[audited]
        if not wrong.any() or wrong.all():
            return None
        ranks = {COMBINED: self.ranking.suspicion} | {
            name: suspicion_share(values, bool(SCORES[name].high))
            for name, values in self.ranking.scores.items()
            if SCORES[name].high is not None
        }
        return {
            name: {
                "auroc": float(roc_auc_score(wrong, rank_[audited])),
                "average_precision": float(average_precision_score(wrong, rank_[audited])),
            }
            for name, rank_ in ranks.items()
            if rank_[audited].isfinite().all()  # halves of a single visit are not known
        }

    def flagged(self) -> Found | None:
        """Shares of right labels among the flagged, and of wrong ones that were flagged."""
        flagged = self.ranking.flagged
        if self.detection is None or not flagged.any():
            return None
        right, found = ~self.wrong[flagged], flagged[self.wrong]
        return {
            "flagged": int(flagged.sum()),
            "false_alarms": right.double().mean().item(),
            "found": found.double().mean().item(),
        }


def audit_dynamics(options: DynamicsAudit) -> tuple[Comparison, list[RankedRun]]:
    """Rank the training images of each run.

    Args:
        options: Options of the audit.

    Returns:
        Options of the runs, and the runs.

    Raises:
        GradmaskError: If an option, the folder or the data cannot be used.
    """
    results = read_results(options.folder)
    check_ours(options.folder)
    if train := results["config"].get("train"):
        raise OptionError(
            f"{options.folder} holds runs of {train}: give the --output folder of gradmask run."
        )
    runs = without_diverged(results)["runs"]
    check_choice("arm", options.arm, dict.fromkeys(run["arm"] for run in runs))
    specs = [Spec.of(run) for run in runs if run["arm"] == options.arm]
    seeds = options.seeds or tuple(dict.fromkeys(spec.seed for spec in specs))
    for seed in seeds:
        if seed not in (known := [spec.seed for spec in specs]):
            raise OptionError(f"seed={seed} is not in {options.folder}, which has {known}.")
    config: Comparison = from_plain(Comparison, results["config"])
    wanted = [spec for spec in specs if spec.seed in seeds]
    return config, list(_ranked(options, config, wanted, results["data"].get("sum")))


def _ranked(
    options: DynamicsAudit, config: Comparison, specs: list[Spec], expected: str | None
) -> Iterator[RankedRun]:
    for spec in specs:
        own = replace(config, **spec.values).for_arm(spec.arm)
        data = load_images(own, spec.seed)
        found = data_sum(data)
        check_data(expected or found, found, options.folder / RESULTS_FILE)
        dynamics = read_dynamics(options.folder, spec, own, data)
        keys = None if data.stored is None else data.stored.names()
        ranking = rank(
            dynamics,
            data.train_labels,
            planted=data.planted,
            false_alarms=options.false_alarms,
            share=options.share,
            keys=keys,
            class_names=data.class_names,
        )
        yield RankedRun(spec, data, ranking)


def read_dynamics(folder: Path, spec: Spec, config: Comparison, data: ImageData) -> Dynamics:
    """The dynamics of a run that is over.

    Args:
        folder: Output folder of the runs.
        spec: The run.
        config: Options of the run's arm.
        data: Its images.

    Returns:
        The dynamics.

    Raises:
        StateError: If the run has none, or they are those of another training.
    """
    path = run_directory(folder, spec) / DYNAMICS
    state: dict[str, Any] | None = read_kept(path, describe_run(config, data, spec.arm, spec.seed))
    if state is None:
        raise StateError(
            f"{path} is missing, damaged or of another training. Runs of earlier versions kept no "
            "dynamics: train again, with another --output, or audit kept weights: --by influence."
        )
    dynamics = Dynamics(len(data.train_labels))
    dynamics.load_state_dict(state)
    return dynamics


def as_images(data: ImageData) -> Any:
    """The training images as `Ranking.report` takes them."""
    images = data.train_images
    return images if isinstance(images, torch.Tensor) else _Opened(images)


class _Opened:
    """Stored images, decoded one at a time."""

    def __init__(self, images: Any) -> None:
        self._images = images

    def __getitem__(self, index: int) -> Any:
        return self._images.open(index)
