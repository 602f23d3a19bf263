"""Disks that fill up, evil names, other data, numbers that are not finite: nothing is lost.

Every fault ends in a named error that names the file, or is recovered from.
"""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import timeless
from corruption import audit, go_on, report, train_into
from rich.console import Console

from gradmask.errors import DataError, OptionError, StateError
from gradmask.recipes.audit.files import write_audit_files
from gradmask.recipes.audit.report import write_audit_report
from gradmask.recipes.data import images as images_module
from gradmask.recipes.report import print_summary, write_report
from gradmask.recipes.results import check_comparison, check_theorem
from gradmask.recipes.training import run as train
from gradmask.study.budget import EpochsSpent
from gradmask.study.folder import check_ours, read_results, run_directory
from gradmask.study.spec import Spec

RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished and audited folder, and one stopped in its second run."""
    root = tmp_path_factory.mktemp("made")
    train_into(root / "done")
    audit(root / "done")
    with pytest.raises(EpochsSpent):
        train_into(root / "stopped", stop_after=3)
    return root


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        pytest.param(moment, number, marks=[pytest.mark.slow] * (moment % step > 0))
        for number, step in ((errno.ENOSPC, 2), (errno.EROFS, 8))
        for moment in range(20)
    ],
)
def test_a_disk_that_is_full_or_read_only(moment, number, made, tmp_path, monkeypatch):
    """From this write or rename on: resumed, it ends with the same bits."""
    real_sync, real_replace, calls = os.fsync, os.replace, []

    def full(real):
        def call(*args):
            calls.append(1)
            if len(calls) > moment:
                raise OSError(number, os.strerror(number))
            return real(*args)

        return call

    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full(real_sync))
        patch.setattr(os, "replace", full(real_replace))
        with pytest.raises(OSError, match=r"No space|Read-only"):
            train_into(folder)
    assert not list(folder.rglob("*.tmp"))
    assert timeless(train_into(folder)["runs"]) == timeless(
        read_results(made / "done", check=check_comparison)["runs"]
    )


@pytest.mark.parametrize("evil", ["0/../../../victim", "../victim", 10**30, True, None, "0"])
@pytest.mark.parametrize("key", ["seed", "arm"])
def test_nothing_that_is_read_becomes_a_path(evil, key, made, tmp_path):
    folder = shutil.copytree(made / "done", tmp_path / "a" / "out")
    for parent in (tmp_path, tmp_path / "a", folder, folder / "runs"):
        victim = parent / "victim" / "checkpoint.pt"
        victim.parent.mkdir(exist_ok=True)
        victim.write_bytes(b"mine")
    results = json.loads((folder / "results.json").read_text())
    results["runs"][0][key] = evil
    (folder / "results.json").write_text(json.dumps(results))
    for read in (go_on, report, audit):
        with pytest.raises(StateError, match=r"results\.json is damaged"):
            read(folder)
    assert len(list(tmp_path.rglob("victim/checkpoint.pt"))) == 4
    with pytest.raises(StateError, match="would not lie in"):
        run_directory(folder, Spec("none/../..", 0))
    (folder / "runs" / "inverse-seed0").symlink_to(tmp_path / "victim")
    with pytest.raises(StateError, match="would not lie in"):
        run_directory(folder, Spec("inverse", 0))


def test_other_data_are_refused(made, tmp_path, monkeypatch):
    original = images_module.open_source

    def other(*args):
        source = original(*args)
        source.test_images[0, 0, 0, 0] ^= 1  # one bit of one image
        return source

    folder = shutil.copytree(made / "done", tmp_path / "out")
    stopped = shutil.copytree(made / "stopped", tmp_path / "stopped")
    monkeypatch.setattr(images_module, "open_source", other)
    for visit in (
        lambda: train_into(folder, seeds=(0, 1)),
        lambda: train_into(folder, arms=("inverse",)),
        lambda: train_into(stopped),
        lambda: audit(folder),
    ):
        with pytest.raises(DataError, match=r"not those that .*results\.json was made with"):
            visit()


def test_weights_of_an_earlier_training_are_not_audited(made, tmp_path):
    folder = shutil.copytree(made / "done", tmp_path / "out")
    weights = folder / "runs" / "none-seed0" / "weights"
    shutil.copy(weights / "epoch-0002.pt", weights / "epoch-0003.pt")
    assert audit(folder).options.epochs == (1, 2)
    shutil.copy(folder / "runs/fisher-seed0/weights/epoch-0002.pt", weights / "epoch-0002.pt")
    with pytest.raises(StateError, match=r"epoch-0002\.pt is not of the run in results\.json"):
        audit(folder)
    (folder / "results.json").unlink()
    train_into(folder, arms=("none",))
    assert sorted(path.name for path in weights.iterdir()) == ["epoch-0001.pt", "epoch-0002.pt"]


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
def test_a_diverged_arm_does_not_take_others_along(optimizer, tmp_path, monkeypatch):
    original = train.train_epoch

    def diverging(run, *args):
        loss = original(run, *args)
        if run.mask is not None and run.epoch == 2:
            with torch.no_grad():
                next(run.model.parameters()).fill_(float("nan"))
        return loss

    monkeypatch.setattr(train, "train_epoch", diverging)
    folder = tmp_path / "out"
    options = {"optimizer": optimizer, "epochs": 3, "lr": 0.01, "seeds": (0, 1)}
    train_into(folder, arms=("fisher", "none"), **options)
    results = read_results(folder, check=check_comparison)
    assert [(r["arm"], len(r["epochs"])) for r in results["runs"]] == [
        *[("fisher", 1)] * 2,
        *[("none", 3)] * 2,
    ]
    assert all(r["diverged"]["epoch"] == 2 for r in results["runs"][:2])
    page = write_report(folder, results).read_text()
    console = Console(record=True, width=200)
    print_summary(results, console)
    for text in (page, console.export_text()):
        assert "Fisher mask: 2 of 2 runs diverged" in text
        assert re.search(r"Fisher mask\W.*diverged", text)
    assert not list(folder.rglob("checkpoint*"))
    monkeypatch.setattr(train, "train_epoch", None)  # nothing is left to do
    train_into(folder, arms=("fisher", "none"), **options)


@pytest.mark.parametrize(
    ("which", "value"),
    [
        ("one", "NaN"),
        ("all", "Infinity"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("one", "Infinity"), ("one", "null"), ("all", "NaN"), ("all", "null"))
        ),
    ],
)
def test_numbers_that_are_not_finite_do_not_break_a_report(value, which, made, tmp_path):
    folder = shutil.copytree(made / "done", tmp_path / "out")
    text = (folder / "results.json").read_text()
    text = re.sub(r'"test_loss": [\d.]+', f'"test_loss": {value}', text, count=which == "one")
    (folder / "results.json").write_text(text)
    report(folder)
    assert "diverged" in (folder / "report.html").read_text()
    train_into(folder)
    json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("folder", ["overfit", "figure1", "figure2", "table1-cifar100"])
def test_results_of_earlier_versions_are_read(folder):
    assert read_results(RESULTS / folder, check=check_comparison)["runs"]
    check_ours(RESULTS / folder)
    assert read_results(RESULTS / "theorem1", "theorem1.json", check_theorem)["runs"]


def test_reports_go_into_folders_of_runs_only(made, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(OptionError, match="no run that gradmask made"):
        write_report(tmp_path, read_results(made / "done", check=check_comparison))
    shutil.copy(made / "done" / "results.json", tmp_path)
    with pytest.raises(OptionError, match=r"no config\.yaml of theirs"):
        report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "mine"


def test_class_names_are_no_markup(made, tmp_path):
    folder = shutil.copytree(made / "done", tmp_path / "out")
    audited = audit(folder)
    evil = [r"$\frac{", "[/bold]{0}", "<script>alert(1)</script>", "%s", "${x}", "=1+1"] * 2
    for run in audited.runs.values():
        object.__setattr__(run.data, "class_names", tuple(evil[:10]))
    write_audit_files(audited)
    assert "<script>alert" not in write_audit_report(audited).read_text()
