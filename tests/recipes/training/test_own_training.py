"""Networks, weights and schedules of people's own, and what is said of runs that do not learn."""

import json
import math
import time
from dataclasses import replace
from io import StringIO

import pytest
import torch
from cyclopts import CoercionError, UnknownOptionError
from reading import read
from rich.console import Console
from torch import nn

from gradmask.cli import main
from gradmask.errors import GradmaskWarning, OptionError, StateError
from gradmask.recipes.compare import run_comparison
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.folders import warn_once
from gradmask.recipes.data.images import load_images
from gradmask.recipes.learnt import not_learnt
from gradmask.recipes.results import check_comparison
from gradmask.recipes.training import run as run_module
from gradmask.recipes.training.components import new_model
from gradmask.recipes.training.run import class_weights, train_run
from gradmask.study import progress as progress_module
from gradmask.study.options import from_plain, to_plain
from gradmask.study.progress import Progress
from gradmask.study.schema import Wrong
from gradmask.study.spec import Spec

CLOCKS = ("seconds", "refresh_seconds", "evaluation_seconds")
OWN = """
import torch
from torch import nn

def net(classes, image_size=5, *, channels):
    assert (classes, image_size, channels) == (10, 8, 1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

def every(**sizes): return nn.Sequential(nn.Flatten(), nn.Linear(64, sizes["classes"]))
def none(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
def needs(classes, width): return none()
def wrong(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 9))
def number(): return 3
one = none()
def shared(): return nn.Sequential(one)
clock = []
def unseeded():
    net = none()
    clock.append(0)
    net[1].bias.data.fill_(len(clock))
    return net
def brighter(image): return (image.float() * (0.5 + torch.rand(()))).clamp(0, 255).to(torch.uint8)
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_net.py").write_text(OWN)
    warn_once.cache_clear()


@pytest.fixture
def config(options, tmp_path):
    options = options | {"arms": ("none", "fisher"), "seeds": (0,), "epochs": 4}
    return Comparison(**options, output=tmp_path / "out")


def compare(config, console=None, **changes):
    return run_comparison(replace(config, **changes), Progress(console, config.epochs))


def measured(run):
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in run["epochs"]]


@pytest.mark.parametrize("name", ["net", "every", "none"])
def test_models_of_ones_own(config, name):
    config = replace(config, model=f"own_net:{name}", width=None, epochs=1)
    assert len(compare(config)["runs"]) == 2
    data = load_images(config, 0)
    first, again, other = (new_model(config, data, seed)[1].weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_net:needs", r"fails .*'width'.*called with those of classes=10, channels=1, image"),
        ("own_net:wrong", r"one number for each of the 10 classes, \(2, 10\) .* gives \(2, 9\)"),
        ("own_net:number", r"must return a torch\.nn\.Module, and returned int"),
        ("own_net:shared", "does not start alike each time"),
        ("own_net:unseeded", "does not start alike each time"),
        ("own_net:missing", "cannot be imported"),
        ("own_net:", "must be written module:function"),
    ],
)
def test_models_that_cannot_be_compared(config, name, message):
    with pytest.raises(OptionError, match=message):
        compare(config, model=name, width=None)
    assert not config.output.exists()
    with pytest.raises(OptionError, match="width is an option of mlp"):
        compare(config, model="own_net:net")


def test_weights_to_start_from(config, tmp_path):
    data = load_images(config, 0)
    state = new_model(config, data, 5).state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pt")
    from safetensors.torch import save_file

    save_file(state, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        found = new_model(replace(config, weights=name), data, 0).state_dict()
        assert all(torch.equal(found[k], state[k]) for k in state)
    rows = compare(config, weights="w.pt", epochs=1)["runs"][0]["epochs"]
    torch.save(new_model(config, data, 6).state_dict(), "w.pt")
    with pytest.raises(StateError, match=r"has other weights than earlier runs"):
        compare(config, weights="w.pt", epochs=1, seeds=(1,))
    assert (
        rows[0]["train_loss"]
        != compare(config, epochs=1, output=tmp_path / "o")["runs"][0]["epochs"][0]["train_loss"]
    )


def test_a_last_layer_of_other_classes_starts_at_random(config, tmp_path):
    data = load_images(config, 0)
    state = new_model(config, data, 5).state_dict()
    torch.save(state | {"fc3.weight": torch.ones(7, 16), "fc3.bias": torch.ones(7)}, "w.pt")
    with pytest.warns(GradmaskWarning, match=r"than the 10 of .*: fc3\.bias, fc3\.weight kee"):
        found = new_model(replace(config, weights="w.pt"), data, 0).state_dict()
    start = new_model(config, data, 0).state_dict()
    for name in state:
        assert torch.equal(found[name], (start if "fc3" in name else state)[name])


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_weights_that_cannot_be_used(config, tmp_path, capsys):
    with pytest.raises(StateError, match=r"weights='no\.pt' is no file"):
        compare(config, weights="no.pt")
    torch.save(nn.Linear(4, 2).state_dict(), "other.pt")
    with pytest.raises(StateError, match=r"other\.pt is of another network: 'bias' has shape"):
        compare(config, weights="other.pt")
    torch.save({"fc1.weight": Evil()}, "evil.pt")
    torch.save([1], "list.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\3\4")
    (tmp_path / "cut.safetensors").write_bytes(b"PK\3\4")
    for name in ("evil.pt", "list.pt", "cut.pt", "cut.safetensors"):
        with pytest.raises(StateError, match=rf"{name} is damaged .*: give weights of this"):
            compare(config, weights=name)
    assert "run" not in capsys.readouterr().out.split()
    assert not config.output.exists()


def test_fewer_evaluations_change_nothing_else(config):
    every = compare(config, epochs=5)
    results = compare(config, epochs=5, evaluate_every=2, output=config.output / "2")
    for run, whole in zip(results["runs"], every["runs"], strict=True):
        assert ["test_loss" in row for row in run["epochs"]] == [False, True, False, True, True]
        assert ["evaluation_seconds" in row for row in run["epochs"]] == [
            "test_loss" in row for row in run["epochs"]
        ]
        for row, full in zip(measured(run), measured(whole), strict=True):
            assert row == {key: full[key] for key in row}
    check_comparison(json.loads(json.dumps(results)))
    del results["runs"][0]["epochs"][1]["test_loss"]
    with pytest.raises(Wrong, match="an epoch lacks one of"):
        check_comparison(json.loads(json.dumps(results)))


def test_accuracy_of_each_class_is_in_the_results(config):
    results = compare(config)
    assert results["data"]["class_names"] == list("0123456789")
    shares = load_images(config, 0).test_labels.bincount() / results["data"]["test"]
    assert results["data"]["test_majority"] == pytest.approx(shares.max().item())
    for row in results["runs"][0]["epochs"]:
        mean = sum(a * s for a, s in zip(row["test_accuracy_per_class"], shares, strict=True))
        assert mean == pytest.approx(row["test_accuracy"], abs=1e-4)
    results["runs"][0]["epochs"][0]["test_accuracy_per_class"].pop()
    with pytest.raises(Wrong, match="test_accuracy_per_class does not fit"):
        check_comparison(json.loads(json.dumps(results)))


def test_class_weights(config, tmp_path):
    data = load_images(config, 0)
    kept = (data.train_labels > 1) | (torch.arange(len(data.train_labels)) % 4 == 0)
    data = replace(
        data,
        train_images=data.train_images[kept],
        train_labels=data.train_labels[kept],
        train_clean_labels=data.train_clean_labels[kept],
    )
    weights = class_weights(data)
    each = torch.zeros(10).scatter_add(0, data.train_labels, weights[data.train_labels])
    torch.testing.assert_close(each, torch.full((10,), len(data.train_labels) / 10))
    config = replace(config, epochs=1, lr=1e-9, batch_size=16)  # the loss of the start
    found = train_run(replace(config, class_weights="balanced"), data, "none", 0, tmp_path / "1")
    model = new_model(config, data, 0)
    inputs = run_module.Normalize.of(data.train_images)(data.train_images)
    losses = nn.functional.cross_entropy(model(inputs), data.train_labels, reduction="none")
    expected = (losses * weights[data.train_labels]).mean().item()
    assert found["epochs"][0]["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - losses.mean().item()) > 1e-3
    assert (
        Comparison(arms=("none", "none:class_weights=balanced"))
        .for_arm("none:class_weights=balanced")
        .class_weights
        == "balanced"
    )


def test_an_interrupted_run_with_all_of_it_ends_with_the_same_bits(config, tmp_path, monkeypatch):
    options = {"transform": "own_net:brighter", "class_weights": "balanced", "evaluate_every": 3}
    config = replace(config, **options, augment=True, checkpoint_every=1)
    data = load_images(config, 0)
    whole = train_run(config, data, "fisher", 0, tmp_path / "whole")
    monkeypatch.setattr(run_module, "TELL_EVERY", 0.0)
    told = []

    def stop(epoch, share):
        told.append((epoch, share))
        if len(told) in (3, 7):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_run(config, data, "fisher", 0, tmp_path / "cut", on_batch=stop)
    found = train_run(config, data, "fisher", 0, tmp_path / "cut", on_batch=stop)
    assert measured(found) == measured(whole)
    assert told[:5] == [(1, 0.2), (1, 0.4), (1, 0.6), (1, 0.8), (2, 0.2)]


def test_a_long_first_epoch_is_told_with_the_time_left(config, monkeypatch):
    monkeypatch.setattr(run_module, "TELL_EVERY", 0.0)
    monkeypatch.setattr(progress_module, "EVERY", 0.0)
    console = Console(file=StringIO(), width=200)
    compare(config, console)
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("10 classes: 135 images to train on (13 to 14 a class), 15 held out")
    assert lines[1].startswith("no mask, seed 0: epoch 1 of 4, 40%;  about ")
    assert lines[1].endswith(" s left of this run")


def test_the_time_left_is_that_of_the_batches(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console(file=StringIO(), width=200)
    progress, spec = Progress(console, 10), Spec("none", 0)
    progress.plan([spec], 0)
    for share in (0.1, 0.2, 0.3):
        now[0] += 20
        progress.epoch(spec, {"epoch": 1, "share": share})
    assert console.file.getvalue().splitlines() == [
        "no mask, seed 0: epoch 1 of 10, 20%;  about 33 min left of this run",
        "no mask, seed 0: epoch 1 of 10, 30%;  about 32 min left of this run",
    ]


def test_a_longer_schedule_is_a_new_run(config):
    compare(config)
    with pytest.raises(OptionError, match=r"epochs=4, not 9: a longer .* is a new run.*--output"):
        compare(config, epochs=9)


def test_switches_on_the_command_line():
    config = read("compare", "--no-flip", "--test-size", "9", "--fisher-samples", "null")
    assert (config.flip, config.crop, config.test_size, config.fisher_samples) == (
        False,
        True,
        9,
        None,
    )
    with pytest.raises(UnknownOptionError, match="Unknown option: --no-model"):
        read("--no-model")


def test_commas_part_arms_but_not_those_of_a_list(monkeypatch):
    arms, studies = ("none", "fixed:file=a,b.pt"), []
    monkeypatch.setattr("gradmask.cli.run.run_study", lambda found: studies.append(found) or 0)
    assert read("--arms", json.dumps(arms)).arms == arms
    assert main(["study", "a:b", f"--arms={json.dumps(arms)}"]) == 0
    assert studies[0].arms == arms
    assert read("--arms", "none,fisher", "slow").arms == ("none", "fisher", "slow")
    for words in (["--arms", *arms], ["--arms=none,fixed:file=a,b.pt"]):
        with pytest.raises(CoercionError, match=r"'b.pt' is none.*\[\"fixed:file=a,b.pt\"\]'"):
            read(*words)


def test_options_that_older_folders_lack_have_their_old_meaning():
    young = {"test_size", "evaluate_every", "crop", "flip", "transform", "class_weights"}
    young |= {"weights", "labels_csv"}
    old = {k: v for k, v in to_plain(Comparison()).items() if k not in young}
    old |= {"validation": 0.1, "fisher_samples": None}  # always written down
    found = from_plain(Comparison, old)
    assert (found.validation, found.fisher_samples, found.evaluate_every) == (0.1, None, 1)
    assert found.crop
    assert found.flip
    assert found.test_size is found.transform is found.weights is found.labels_csv is None


def test_a_checkpoint_of_an_older_version_goes_on(config, tmp_path, monkeypatch):
    data = load_images(config, 0)
    whole = train_run(config, data, "none", 0, tmp_path / "whole")

    def old(*args, original=run_module.describe_run):
        return {k: v for k, v in original(*args).items() if k not in ("flip", "evaluate_every")}

    def stop(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "describe_run", old)
        with pytest.raises(KeyboardInterrupt):
            train_run(config, data, "none", 0, tmp_path / "cut", stop)
    with pytest.raises(StateError, match="of another run, with flip=True, not False"):
        train_run(replace(config, flip=False), data, "none", 0, tmp_path / "cut")
    assert measured(train_run(config, data, "none", 0, tmp_path / "cut")) == measured(whole)


def results_of(config, **runs):
    """Results with a test accuracy and a train loss at the end of each run."""
    rows = lambda accuracy, loss: [  # noqa: E731
        {"epoch": 1, "train_loss": 2.3, "test_loss": 2.3, "test_accuracy": 0.1},
        {"epoch": 2, "train_loss": loss, "test_loss": 2.3, "test_accuracy": accuracy},
    ]
    return {
        "config": to_plain(config),
        "data": {"classes": 10, "test": 900, "test_majority": 0.3},
        "runs": [
            {"arm": arm, "seed": seed, "epochs": rows(*numbers)}
            for arm, found in runs.items()
            for seed, numbers in enumerate(found)
        ],
    }


def test_runs_that_have_not_learnt_are_named(config):
    well = results_of(config, none=[(0.5, 1.0), (0.6, 1.0)], fisher=[(0.34, 1.0)])
    assert not_learnt(well) == []
    found = not_learnt(results_of(config, none=[(0.32, 2.0), (0.6, 1.0)], fisher=[(0.1, 30.0)]))
    assert found == [
        "No mask, 1 of 2 runs, has not learnt: test accuracy is 32.0 % at best, and one answer for "
        "all images would have 30.0 %. Check the labels; try another lr, more epochs or another "
        "model.",
        "Fisher mask has not learnt: test accuracy is 10.0 % at best, and one answer for all "
        "images would have 30.0 %. Check the labels; try another lr, more epochs or another model.",
        "Fisher mask has exploded: a loss of the last epoch is 30, and that of a network that "
        "knows nothing is 2.30. Try a lower lr.",
    ]
    assert not_learnt(results_of(config, **{"none:labels=random": [(0.1, 0.5)]})) == []
    diverged = results_of(config, none=[(0.1, math.nan)])
    assert not_learnt(diverged) == []  # the report names it


def test_real_runs_that_have_not_learnt(config):
    assert not_learnt(compare(config, epochs=6)) == []
    assert len(not_learnt(compare(config, lr=1e-7, output=config.output / "slow"))) == 2
