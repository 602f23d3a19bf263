"""Small comparisons that are interrupted."""

import json
import time
from pathlib import Path

import torch

from gradmask.study.files import read_tensors

CLOCKS = ("seconds", "refresh_seconds", "evaluation_seconds")


def timeless(value):
    """Measurements without the times they took."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in CLOCKS}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def lines(directory):
    text = (directory / "metrics.jsonl").read_text()
    return [timeless(json.loads(line)) for line in text.splitlines()]


def assert_same_files(ours, theirs):
    """The same log and, to the bit, the same weights after every epoch."""
    assert lines(ours) == lines(theirs)
    weights = [sorted((d / "weights").iterdir()) for d in (ours, theirs)]
    assert [p.name for p in weights[0]] == [p.name for p in weights[1]] != []
    for a, b in zip(*(map(read_tensors, paths) for paths in weights), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


# What is killed.
TINY = [
    *("run", "compare", "--data=digits", "--train-size=120", "--model=small_cnn", "--width=4"),
    *("--arms", "fisher", "inverse", "--seeds=0", "--epochs=2", "--batch-size=16", "--lr=0.02"),
    *("--monitor=quadratic", "--monitor-every=5", "--monitor-sources=4", "--monitor-probe=6"),
    *("--checkpoint-every=3", "--save-every=1", "--device=cpu", "--threads=1"),
]


def wait_until_it_trains(folder):
    while not (folder / "config.yaml").exists():
        time.sleep(0.01)
    return time.perf_counter()


def assert_same_comparison(ours: Path, theirs: Path):
    found = [timeless(json.loads((f / "results.json").read_text())) for f in (ours, theirs)]
    for results in found:
        results["config"].pop("output")
        for part in (results["environment"], *results["runs"]):
            part.pop("commit")  # "dirty" once somebody edits a file meanwhile
    assert found[0] == found[1]
    for directory in (theirs / "runs").iterdir():
        assert_same_files(ours / "runs" / directory.name, directory)
    names = [
        {p.relative_to(f) for p in f.rglob("*") if "tfevents" not in p.name} for f in (ours, theirs)
    ]
    assert names[0] == names[1]  # no checkpoint and no unfinished file is left
