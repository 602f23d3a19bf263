"""`gradmask audit`: which training samples a run memorises, from the weights that it kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from gradmask.errors import OptionError, StateError, check_choice
from gradmask.recipes.audit.detection import (
    Choice,
    Detection,
    Scores,
    by_rule,
    detect,
    usual,
)
from gradmask.recipes.audit.options import Audit
from gradmask.recipes.audit.scores import AUDIT_SCORES, Measured, measure
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.images import ImageData, load_images
from gradmask.recipes.data.sources import in_memory, stratified
from gradmask.recipes.data.transforms import channel_statistics, normalize
from gradmask.recipes.identity import check_data, data_sum, tensors_sum
from gradmask.recipes.training.components import new_model, resolve_device
from gradmask.recipes.training.weights import load_weights, saved_epochs, weights_path
from gradmask.study.files import keep, read_kept
from gradmask.study.folder import (
    RESULTS_FILE,
    check_ours,
    read_results,
    run_directory,
)
from gradmask.study.options import from_plain
from gradmask.study.results import Results, without_diverged
from gradmask.study.spec import Spec


@dataclass(frozen=True)
class AuditedRun:
    """One seed: its data, and every score with the epoch rules.

    Attributes:
        data: The run's images and labels.
        scores: `{form: {epoch rule: one value a training sample}}`.
    """

    data: ImageData
    scores: Scores

    @property
    def wrong(self) -> Tensor:
        """Training samples whose label is known to be wrong."""
        return self.data.train_labels != self.data.train_clean_labels


@dataclass(frozen=True)
class Audited:
    """What an audit found.

    Attributes:
        options: Options of the audit, with seeds and epochs filled in.
        config: Options of the runs.
        data_sum: Sum of their images and labels.
        runs: By seed.
        detection: How well wrong labels are found; None without label noise.
    """

    options: Audit
    config: Comparison
    data_sum: str
    runs: dict[int, AuditedRun]
    detection: Detection | None

    @property
    def choices(self) -> dict[str, Choice]:
        """Epoch rule and order of each form: chosen on a seed if that could be done."""
        return usual() if self.detection is None else self.detection.choices

    @property
    def choice(self) -> Choice:
        """What ranks the samples."""
        return self.choices[self.options.score]


def run_audit(options: Audit, console: Console) -> Audited:
    """Score every training sample at each kept epoch.

    What was measured at an epoch is kept in `audit/measured`, so an interrupted audit goes on.

    Args:
        options: Options of the audit.
        console: Where to say how far the work is.

    Returns:
        What was found.

    Raises:
        GradmaskError: If an option, the folder, its weights or the data cannot be used; all of
            these are checked before measuring starts.
    """
    device = resolve_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    results = read_results(options.folder)
    check_ours(options.folder)
    options = _fill_in(options, results)
    config = from_plain(Comparison, results["config"]).for_arm(options.arm)
    assert options.seeds is not None
    data = {seed: load_images(config, seed) for seed in options.seeds}
    sums = {data_sum(found) for found in data.values()}
    for found_sum in sums:
        expected = results["data"].get("sum", found_sum)
        check_data(expected, found_sum, options.folder / RESULTS_FILE)
    _check_probe(options, next(iter(data.values())))
    (options.place / "measured").mkdir(parents=True, exist_ok=True)
    runs = {}
    for seed in options.seeds:
        measured = dict(
            _measure_epochs(options, config, data[seed], seed, device, console, results)
        )
        runs[seed] = AuditedRun(
            data[seed],
            {
                form.name: by_rule({e: form.of(m) for e, m in measured.items()})
                for form in AUDIT_SCORES
            },
        )
    detection = None
    if all(0 < run.wrong.sum() < len(run.wrong) for run in runs.values()):
        detection = detect(
            {seed: run.scores for seed, run in runs.items()},
            {seed: run.wrong for seed, run in runs.items()},
        )
    return Audited(options, config, sums.pop(), runs, detection)


def _fill_in(options: Audit, results: Results) -> Audit:
    """Find the seeds and epochs to audit, and check those asked for."""
    runs = without_diverged(results)["runs"]
    check_choice("arm", options.arm, dict.fromkeys(run["arm"] for run in runs))
    found = [run["seed"] for run in runs if run["arm"] == options.arm]
    seeds = options.seeds or tuple(found)
    for seed in seeds:
        if seed not in found:
            raise OptionError(f"seed={seed} is not in {options.folder}, which has {found}.")
    kept = [set(_kept(options, results, seed)) for seed in seeds]
    for seed, epochs in zip(seeds, kept, strict=True):
        if not epochs:
            directory = run_directory(options.folder, Spec(options.arm, seed))
            raise StateError(
                f"{directory} has no weights: train with "
                "--save-every N, which keeps them after every N epochs."
            )
    common = sorted(set.intersection(*kept))
    missing = [epoch for epoch in options.epochs or () if epoch not in common]
    if missing or not common:
        raise OptionError(
            f"epochs={missing or 'all'}: no weights were kept then by every seed; there are those "
            f"of {common}."
        )
    return replace(options, seeds=seeds, epochs=tuple(sorted(set(options.epochs or common))))


def _kept(options: Audit, results: Results, seed: int) -> dict[int, str | None]:
    """Epochs whose weights are those of the run in the results, and their sums.

    Weights without a sum are of another training, unless an earlier version has written all.
    """
    found = saved_epochs(run_directory(options.folder, Spec(options.arm, seed)))
    if "sum" not in results["data"]:
        return dict.fromkeys(found)
    run = next(r for r in results["runs"] if (r["arm"], r["seed"]) == (options.arm, seed))
    sums = {row["epoch"]: row["weights"] for row in run["epochs"] if "weights" in row}
    return {epoch: sums[epoch] for epoch in found if epoch in sums}


def _check_probe(options: Audit, data: ImageData) -> None:
    count, classes = len(data.train_labels), len(data.class_names)
    if not 2 * classes <= options.probe <= count:
        raise OptionError(
            f"probe={options.probe} must be from {2 * classes}, two samples for each of the "
            f"{classes} classes, to {count}, all training samples."
        )


def _measure_epochs(
    options: Audit,
    config: Comparison,
    data: ImageData,
    seed: int,
    device: torch.device,
    console: Console,
    results: Results,
) -> Iterator[tuple[int, Measured]]:
    count = len(data.train_labels)
    probe, _ = stratified(data.train_labels, torch.arange(count), options.probe)
    images = in_memory(data.train_images)
    statistics = channel_statistics(images)
    model = new_model(config, data, seed)
    prepare = partial(normalize, mean=statistics[0].to(device), std=statistics[1].to(device))
    images, labels = images.to(device), data.train_labels.to(device)
    assert options.epochs is not None
    sums, labels_sum = _kept(options, results, seed), tensors_sum({"labels": labels})
    for epoch in options.epochs:
        weights = weights_path(run_directory(options.folder, Spec(options.arm, seed)), epoch)
        loaded = load_weights(weights, model, sums[epoch])
        name = run_directory(options.folder, Spec(options.arm, seed)).name
        path = options.place / "measured" / f"{name}-{epoch:04d}.pt"
        # A folder that was trained again is measured again.
        key = [options.fisher, options.probe, data_sum(data), labels_sum, loaded]
        measured = _read_measured(path, key)
        if measured is None:
            console.print(f"seed {seed}, epoch {epoch}: {count} samples ...", highlight=False)
            measured = measure(
                model.to(device),
                images,
                labels,
                prepare,
                probe,
                fisher=options.fisher,
                step=config.lr,
            )
            keep(path, key, vars(measured))
        yield epoch, measured


def _read_measured(path: Path, key: list[Any]) -> Measured | None:
    try:
        return Measured(**read_kept(path, key))
    except TypeError:  # there is none, or it is of another version: measured again
        return None
