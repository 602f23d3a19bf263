"""`gradmask audit clean`: does it help to drop, or to relabel, what an audit finds?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gradmask.audit.scores import highest, suspicion_share
from gradmask.errors import OptionError
from gradmask.recipes.audit.dynamics import BASELINE, RankedRun, audit_dynamics
from gradmask.recipes.audit.options import Clean, DynamicsAudit
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.images import ImageData, load_images
from gradmask.recipes.training.run import train_run
from gradmask.seeding import seeded_generator
from gradmask.study import Trial, compare
from gradmask.study.files import write_json
from gradmask.study.folder import read_results, remove_checkpoints
from gradmask.study.metrics import Metric, metrics_of
from gradmask.study.options import from_plain
from gradmask.study.progress import Progress
from gradmask.study.results import Results
from gradmask.study.statistics import compare_arms, corrected, summarise, values

ALL, CLEAN = "none", "none:labels=clean"
DROPPED, RELABELLED = "none:labels=dropped", "none:labels=relabelled"
RANDOM, BY_LOSS = "none:labels=dropped-at-random", "none:labels=dropped-by-loss"
ARMS = {
    ALL: "training on all labels as given",
    DROPPED: "dropping what the audit finds",
    RELABELLED: "relabelling it, or dropping it where no other class is probable",
    BY_LOSS: "dropping as many by the loss of the last epoch",
    RANDOM: "dropping as many at random",
    CLEAN: "training on all with their true labels",
}
CHANGED = "changed.json"  # in a run's folder: how many labels were dropped and relabelled
LIKELY = 0.5  # mean probability from which on a suggestion is followed


def run_clean(options: Clean, progress: Progress) -> Results:
    """Train on the data as the audit leaves them, and on those of each control.

    Args:
        options: Options of the command.
        progress: Shows how far the work is.

    Returns:
        The contents of `results.json` of the new runs.

    Raises:
        GradmaskError: If the folder has no runs to audit, or nothing says how much to drop; before
            training starts.
    """
    audit = DynamicsAudit(options.folder, seeds=options.seeds, share=options.share)
    config, runs = audit_dynamics(audit)
    if any(run.spec.values for run in runs):
        raise OptionError(
            f"{options.folder} holds a sweep: audit runs of one value of each option."
        )
    counts = [_count(run, options.share) for run in runs]  # of each, so that each is checked
    if not any(counts):
        raise OptionError(
            "Nothing is to be dropped: no label is estimated to be wrong. Give --share to drop "
            "the most suspicious ones all the same."
        )
    arms = [arm for arm in ARMS if arm != CLEAN or config.label_noise]
    return compare(
        train,
        arms,
        [run.spec.seed for run in runs],
        options.output or options.folder / "clean",
        progress=progress,
        options={"folder": str(options.folder.resolve()), "share": options.share},
        judge=("test_accuracy@last",),
        jobs=options.jobs,
        threads=options.threads,
    )


def train(trial: Trial) -> None:
    """Train one network of the audited runs anew, on the data of an arm.

    Args:
        trial: The run; its arm says what is done with the suspicious samples.
    """
    folder = Path(trial.options["folder"])
    share, kind = trial.options["share"], trial.options.get("labels", "all")
    found: Comparison = from_plain(Comparison, read_results(folder)["config"])
    config = replace(found, plant=0.0, arms=("none",), sweep={})
    if kind in ("all", "clean"):
        data = load_images(config, trial.seed)
        if kind == "clean":
            data = replace(data, train_labels=data.train_clean_labels)
    else:
        audit = DynamicsAudit(folder, seeds=(trial.seed,), share=share)
        (run,) = audit_dynamics(audit)[1]
        data, changed = _cleaned(run, kind, _count(run, share))
        dropped = len(run.data.train_labels) - len(data.train_labels)
        write_json(trial.directory / CHANGED, {"dropped": dropped, "relabelled": changed})
    directory = trial.directory / "training"
    directory.mkdir(exist_ok=True)

    def report(row: dict[str, Any]) -> None:
        measured = {k: v for k, v in row.items() if isinstance(v, float) and _is_metric(k)}
        if "test_accuracy" in measured:
            trial.report(epoch=row["epoch"], **measured)

    train_run(config, data, "none", trial.seed, directory, report)
    remove_checkpoints(directory)


def _is_metric(key: str) -> bool:
    return key.startswith(("train_", "val_", "test_"))


def _count(run: RankedRun, share: float | None) -> int:
    """How many samples to drop."""
    cut = run.ranking.threshold
    if share is None and cut is None:
        raise OptionError(
            "Nothing says how much to drop: train with --plant 0.05, by which the share of wrong "
            "labels is estimated, or give --share."
        )
    share = cut.wrong_share if share is None and cut is not None else share
    return round(float(share or 0) * int((~run.ranking.planted).sum()))


def _cleaned(run: RankedRun, kind: str, count: int) -> tuple[ImageData, int]:
    """The run's data without the samples that an arm drops; how many have another label."""
    data, ranking = run.data, run.ranking
    labels = data.train_labels if ranking.originals is None else ranking.originals
    first = highest(ranking.suspicion, ~ranking.planted, count)
    if kind == "dropped-by-loss":
        share = suspicion_share(ranking.scores[BASELINE], high=True)
        first = highest(share, ~ranking.planted, count)
    elif kind == "dropped-at-random":
        generator = seeded_generator(run.spec.seed, "dropped at random")
        first = highest(torch.rand(len(labels), generator=generator), ~ranking.planted, count)
    dropped, changed = first, 0
    if kind == "relabelled":
        likely = first & (ranking.suggestions >= 0)
        likely &= ranking.suggestion_probabilities >= LIKELY
        labels = torch.where(likely, ranking.suggestions, labels)
        dropped, changed = first & ~likely, int(likely.sum())
    kept = (~dropped).nonzero().flatten()
    return replace(data, train_labels=labels, planted=None).only(train=kept), changed


def sentences(results: Results) -> list[str]:
    """What the runs show, in words.

    Args:
        results: Contents of `results.json`.

    Returns:
        How each way to use the audit compares with each control, corrected for their number
        (Holm), and what it regains of what the wrong labels cost.
    """
    metric = metrics_of(results).judged[0]
    there = {run["arm"] for run in results["runs"]}
    pairs = [
        (arm, other)
        for arm in (DROPPED, RELABELLED)
        for other in (ALL, RANDOM, BY_LOSS)
        if {arm, other} <= there
    ]
    found = corrected([compare_arms(results, arm, other, metric) for arm, other in pairs])
    lines = []
    for (arm, other), difference in zip(pairs, found, strict=True):
        if difference is None:
            continue
        text = f"{ARMS[arm][0].upper()}{ARMS[arm][1:]}: {100 * difference.mean:+.1f} points of "
        text += f"{metric.title} against {ARMS[other]}"
        if difference.low is None or difference.high is None:
            lines.append(f"{text} (one seed: nothing is shown).")
            continue
        low, high = 100 * difference.low, 100 * difference.high
        shown = difference.corrected is not None and difference.corrected < 0.05
        text += f" (95 % interval {low:+.1f} to {high:+.1f}, {difference.n} seeds)"
        lines.append(f"{text}: {'shown' if shown else 'not shown'}.")
    return lines + [
        line for arm in (DROPPED, RELABELLED) if (line := _regained(results, arm, metric))
    ]


def _regained(results: Results, arm: str, metric: Metric) -> str | None:
    """Share of the gap between noisy and true labels that an arm closes."""
    every, true, cleaned = (values(results, name, metric) for name in (ALL, CLEAN, arm))
    seeds = [seed for seed in cleaned if seed in every and seed in true]
    gap = sum(true[seed] - every[seed] for seed in seeds)
    if not seeds or gap <= 0:
        return None
    share = sum(cleaned[seed] - every[seed] for seed in seeds) / gap
    regains = f"regains {share:.0%}" if share > 0 else "regains none"
    gaps = summarise([100 * (true[seed] - every[seed]) for seed in seeds])
    return (
        f"{ARMS[arm][0].upper()}{ARMS[arm][1:]} {regains} of the "
        f"{gaps.show(lambda value: f'{value:.1f}')} points that wrong labels cost."
    )
