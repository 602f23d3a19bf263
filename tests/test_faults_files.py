"""Files that are cut, flipped, swapped, or of a wrong kind; disks that fill up as they are written.

Every fault ends in a named error that names the file, or is recovered from; nothing is lost.
"""

import errno
import io
import json
import os
import random
import re
import shutil
import warnings
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_checkpoint import timeless

from gradmask.errors import DataError, GradmaskError, OptionError, StateError
from gradmask.experiments.audit import run as audit_module
from gradmask.experiments.audit.files import write_audit_files
from gradmask.experiments.audit.report import write_audit_report
from gradmask.experiments.audit.run import Audit, run_audit
from gradmask.experiments.compare import run_comparison
from gradmask.experiments.config import Comparison
from gradmask.experiments.data import images as images_module
from gradmask.experiments.data import sources
from gradmask.experiments.folder import check_ours, read_results, run_directory
from gradmask.experiments.progress import Progress
from gradmask.experiments.reports import comparison
from gradmask.experiments.reports.comparison import print_summary, write_report
from gradmask.experiments.training import run as train
from gradmask.experiments.training.budget import EpochsSpent

RESULTS = Path(__file__).resolve().parents[1] / "results"
QUIET = Console(quiet=True)
OPTIONS = {
    "data": "digits",
    "train_size": 150,
    "label_noise": 0.2,
    "augment": False,
    "model": "mlp",
    "width": 4,
    "epochs": 2,
    "seeds": (0,),
    "arms": ("none", "fisher"),
    "batch_size": 64,
    "save_every": 1,
    "checkpoint_every": 1,
    "device": "cpu",
}
FAULTS = 216


def train_into(folder, **changes):
    config = Comparison(**OPTIONS | changes | {"output": folder})
    return run_comparison(config, Progress(QUIET))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished and audited folder, one stopped in its second run, and that one gone on with."""
    root = tmp_path_factory.mktemp("made")
    train_into(root / "done")
    audit(root / "done")
    with pytest.raises(EpochsSpent):
        train_into(root / "stopped", stop_after=3)
    shutil.copytree(root / "stopped", root / "whole")
    train_into(root / "whole")
    return root


def scores(folder):
    return run_audit(Audit(folder, epochs=(2,), probe=20, device="cpu"), QUIET)


def audit(folder):
    audited = run_audit(Audit(folder, probe=20, top=2, device="cpu"), QUIET)
    write_audit_files(audited)
    return audited


def report(folder):
    results = read_results(folder)
    print_summary(results, QUIET)
    write_report(folder, results)


def go_on(folder):
    results = train_into(folder)
    assert [len(run["epochs"]) for run in results["runs"]] == [2, 2]
    return results


READ = {  # a folder, a file in it, and who reads it
    "results.json": ("done", "results.json", report),
    "config.yaml": ("done", "config.yaml", go_on),
    "checkpoint": ("stopped", "runs/fisher-seed0/checkpoint.pt", go_on),
    "previous checkpoint": ("stopped", "runs/fisher-seed0/checkpoint.previous.pt", go_on),
    "log": ("stopped", "runs/fisher-seed0/metrics.jsonl", go_on),
    "weights": ("done", "runs/none-seed0/weights/epoch-0002.pt", scores),
    "measured": ("done", "audit/measured/none-seed0-0002.pt", scores),
    "marker": ("done", ".gradmask", go_on),
    "lock": ("done", ".lock", go_on),
}


def cut(data, draw, _):
    return data[: draw.randrange(len(data) + 1)]


def hole(data, draw, _):
    start = draw.randrange(len(data) + 1)
    return data[:start] + data[start + 100 :]


def flipped(data, draw, _):
    spoilt = bytearray(data)
    for _ in range(8):
        if spoilt:
            spoilt[draw.randrange(len(spoilt))] ^= 1 << draw.randrange(8)
    return bytes(spoilt)


def noise(data, draw, _):
    return draw.randbytes(len(data))


def empty(*_):
    return b""


def huge(*_):
    return b"[" * 300_000


def not_utf8(data, draw, _):
    place = draw.randrange(len(data) + 1)
    return data[:place] + b"\xff\xfe\x00" + data[place:]


def swapped(_data, draw, others):
    return draw.choice(others)


def wrong_type(data, draw, _):
    """One value of a JSON or YAML file, or a whole file of tensors, of another type."""
    wrong = draw.choice(["null", "[]", "{}", '"../../x"', "1e999", "-1", "NaN", "true", "9" * 400])
    places = list(re.finditer(rb"(?<=: )[^\s,{}\[\]]+", data))
    if data.startswith(b"PK") or not places:
        contents = io.BytesIO()
        torch.save(draw.choice([None, [1], {"version": 3}, {"model": 1, "version": 3}]), contents)
        return contents.getvalue()
    place = draw.choice(places)
    return data[: place.start()] + wrong.encode() + data[place.end() :]


KINDS = (cut, hole, flipped, noise, empty, huge, not_utf8, swapped, wrong_type)


def corrupt(made, tmp_path, count, seed):
    """Try so many faults; return how many were recovered from and how many had named errors."""
    draw, found = random.Random(seed), Counter()
    others = [(made / folder / file).read_bytes() for folder, file, _ in READ.values()]
    whole = timeless(read_results(made / "whole")["runs"])
    pairs = [(name, kind) for name in READ for kind in KINDS]
    for number in range(count):
        name, kind = pairs[number % len(pairs)]
        source, file, read = READ[name]
        folder = tmp_path / f"{number}"
        shutil.copytree(made / source, folder, symlinks=True)
        (folder / file).write_bytes(kind((folder / file).read_bytes(), draw, others))
        kept = {p: p.read_bytes() for p in (folder / "runs").rglob("*.pt")}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results = read(folder)
        except GradmaskError as error:
            message = str(error)
            assert str(folder) in message, (name, kind.__name__, message)
            assert len(message) < 800, (name, kind.__name__)
            assert {p: p.read_bytes() for p in kept if p.exists()} == kept  # nothing is lost
            found["named"] += 1
        except BaseException as error:
            raise AssertionError(f"{name}, {kind.__name__}, fault {number}: {error!r}") from error
        else:
            if source == "stopped":
                assert timeless(results["runs"]) == whole  # to the bit
            found["recovered"] += 1
        shutil.rmtree(folder)
    return found


@pytest.mark.filterwarnings("ignore")
def test_corrupted_files(made, tmp_path):
    with pytest.MonkeyPatch.context() as patch:  # what follows reading is in the long form
        patch.setattr(comparison, "draw_all", lambda _: {})
        patch.setattr(audit_module, "detect", lambda *_: None)
        patch.setattr(sources, "load_digits", cache(sources.load_digits))
        found = corrupt(made, tmp_path, FAULTS, 0)
    assert found.total() == FAULTS
    assert min(found["named"], found["recovered"]) > FAULTS // 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_corrupted_files(made, tmp_path):
    found = corrupt(made, tmp_path, 3000, 1)
    print(dict(found))
    assert found.total() == 3000


def test_hole_in_the_newest_checkpoint(made, tmp_path):
    """100 bytes cut out: the previous one is gone on from, to the same bits."""
    draw = random.Random(0)
    whole = timeless(read_results(made / "whole")["runs"])
    for number in range(5):
        folder = shutil.copytree(made / "stopped", tmp_path / f"{number}")
        file = folder / READ["checkpoint"][1]
        file.write_bytes(hole(file.read_bytes()[:-100], draw, None))
        with pytest.warns(UserWarning, match="going on from the checkpoint before it"):
            assert timeless(go_on(folder)["runs"]) == whole


@pytest.mark.parametrize("moment", range(20))
def test_a_disk_that_is_full(moment, made, tmp_path, monkeypatch):
    """At this write or rename, all later ones too: resumed, it ends with the same bits."""
    real_sync, real_replace, calls = os.fsync, os.replace, []

    def full(real):
        def call(*args):
            calls.append(1)
            if len(calls) > moment:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        return call

    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full(real_sync))
        patch.setattr(os, "replace", full(real_replace))
        with pytest.raises(OSError, match="No space"):
            train_into(folder)
    assert not list(folder.rglob("*.tmp"))
    assert timeless(train_into(folder)["runs"]) == timeless(read_results(made / "done")["runs"])


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
        run_directory(folder, "none/../..", 0)
    (folder / "runs" / "inverse-seed0").symlink_to(tmp_path / "victim")
    with pytest.raises(StateError, match="would not lie in"):
        run_directory(folder, "inverse", 0)


def test_other_data_are_refused(made, tmp_path, monkeypatch):
    original = images_module.load_source

    def other(*args):
        source = original(*args)
        source.test_images[0, 0, 0, 0] ^= 1  # one bit of one image
        return source

    folder = shutil.copytree(made / "done", tmp_path / "out")
    stopped = shutil.copytree(made / "stopped", tmp_path / "stopped")
    monkeypatch.setattr(images_module, "load_source", other)
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


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
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
    results = read_results(folder)
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
        assert "Conclusion on the Fisher mask in this run: it diverged." in text
        assert re.search(r"Fisher mask\W.*diverged", text)
    assert not list(folder.rglob("checkpoint*"))
    monkeypatch.setattr(train, "train_epoch", None)  # nothing is left to do
    train_into(folder, arms=("fisher", "none"), **options)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null"])
@pytest.mark.parametrize("which", ["all", "one"])
def test_numbers_that_are_not_finite_do_not_break_a_report(value, which, made, tmp_path):
    folder = shutil.copytree(made / "done", tmp_path / "out")
    text = (folder / "results.json").read_text()
    text = re.sub(r'"test_loss": [\d.]+', f'"test_loss": {value}', text, count=which == "one")
    (folder / "results.json").write_text(text)
    report(folder)
    assert "diverged" in (folder / "report.html").read_text()
    train_into(folder)
    json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("folder", ["cifar100-small", "figure1", "figure2", "table1-cifar100"])
def test_results_of_earlier_versions_are_read(folder):
    assert read_results(RESULTS / folder)["runs"]
    check_ours(RESULTS / folder)
    assert read_results(RESULTS / "theorem1", "theorem1.json")["runs"]


def test_reports_go_into_folders_of_runs_only(made, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(OptionError, match="no run that gradmask made"):
        write_report(tmp_path, read_results(made / "done"))
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
