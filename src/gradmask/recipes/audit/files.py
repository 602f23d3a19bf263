"""Files of an audit: a row for each training sample, and how well each score finds wrong labels."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict

from gradmask.recipes.audit.detection import ranking
from gradmask.recipes.audit.run import Audited
from gradmask.study.environment import environment
from gradmask.study.files import write_atomically, write_json
from gradmask.study.folder import check_ours
from gradmask.study.options import to_plain

AUDIT_VERSION = 1


def write_audit_files(audited: Audited) -> None:
    """Write `audit.json`, and `scores-seed<k>.csv` for each seed, in the folder's `audit/`.

    Args:
        audited: What the audit found.
    """
    check_ours(audited.options.folder)
    folder = audited.options.place
    for seed in audited.runs:
        write_atomically(folder / f"scores-seed{seed}.csv", _csv(audited, seed))
    write_json(
        folder / "audit.json",
        {
            "version": AUDIT_VERSION,
            "audit": to_plain(audited.options),
            "config": to_plain(audited.config),
            "data": {"sum": audited.data_sum},
            "environment": environment(audited.options.device),
            "ranked_by": asdict(audited.choice),
            "detection": audited.detection and audited.detection.to_plain(),
        },
    )


def _csv(audited: Audited, seed: int) -> str:
    """Labels of each sample, its scores at the epochs that count for each, and its rank."""
    run, choices = audited.runs[seed], audited.choices
    names = run.data.class_names
    ranks = (ranking(audited.choice.of(run.scores)).argsort() + 1).tolist()
    columns = [run.scores[choice.form][choice.rule].tolist() for choice in choices.values()]
    given, clean = run.data.train_labels.tolist(), run.data.train_clean_labels.tolist()
    known = audited.detection is not None
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    labels = ["given_label", *(["clean_label", "wrong"] if known else [])]
    scores = [f"{choice.form} ({choice.rule})" for choice in choices.values()]
    writer.writerow(["index", *labels, *scores, "rank"])
    for i, rank in enumerate(ranks):
        row = [i, names[given[i]]]
        if known:
            row += [names[clean[i]], int(given[i] != clean[i])]
        writer.writerow([*row, *(f"{column[i]:.6g}" for column in columns), rank])
    return text.getvalue()
