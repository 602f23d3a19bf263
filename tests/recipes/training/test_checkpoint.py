import dataclasses
import json
import random
import sys
from itertools import product

import pytest
import torch
from checkpoints import (
    CLOCKS,
    assert_same_files,
    timeless,
)
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from gradmask.cli import main
from gradmask.errors import GradmaskWarning, OptionError, StateError
from gradmask.recipes.compare import run_comparison
from gradmask.recipes.config import Comparison
from gradmask.recipes.data import batches as batches_module
from gradmask.recipes.data.images import load_images
from gradmask.recipes.training import components
from gradmask.recipes.training import run as train
from gradmask.recipes.training.checkpoint import NEWEST, PREVIOUS
from gradmask.recipes.training.run import train_run
from gradmask.study.budget import EpochBudget, EpochsSpent
from gradmask.study.files import read_tensors
from gradmask.study.folder import read_results
from gradmask.study.progress import Progress
from gradmask.study.trial import Diverged
from gradmask.tensor_files import atomic_file

ARMS = ("none", "fisher", "random", "random_matched", "inverse", "sam")


class Interrupted(Exception):
    pass


@pytest.fixture
def config(options, monkeypatch):
    """Dropout, augmentation and a monitor: 3 epochs of 5 steps."""

    def build(*_):
        hidden = (nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(16, 10))

    monkeypatch.setattr(components, "build_model", build)
    small = {"monitor_sources": 4, "monitor_probe": 6, "monitor": ("quadratic",)}
    return Comparison(**options | small | {"augment": True, "monitor_every": 3, "save_every": 1})


def change(config, **changes):
    return Comparison(**(vars(config) | changes))


def run(config, directory, arm="fisher", **options):
    torch.rand(7)  # the caller's random state has no part in it
    return train_run(config, load_images(config, 0), arm, 0, directory, **options)


def run_until(batch, config, directory, arm="fisher"):
    """Interrupt the run at its so manieth batch."""
    original, calls = batches_module.augment_batch, []

    def counted(*args):
        calls.append(1)
        if len(calls) == batch:
            raise Interrupted
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "augment_batch", counted)
        return run(config, directory, arm)


def run_in_pieces(batches, config, directory, arm="fisher"):
    """Interrupt the run after every so many batches, until it is through."""
    for visits in range(1, 100):
        try:
            return run_until(batches, config, directory, arm), visits
        except Interrupted:
            continue


TRAININGS = [
    *product(ARMS, ["sgd"], ["gradient"]),
    *product(ARMS, ["adamw"], ["update"]),
    *(("fisher", "sgd", "update"), ("fisher", "adamw", "gradient")),
]
PIECES = [(*training, 2, 4, 7) for training in TRAININGS]
PIECES += [  # with a checkpoint after each epoch only
    pytest.param(*training, None, 8, 3, marks=() if training[0] == "fisher" else pytest.mark.slow)
    for training in TRAININGS
]


@pytest.mark.parametrize(("arm", "optimizer", "scope", "every", "batches", "visits"), PIECES)
def test_an_interrupted_run_ends_with_the_same_bits(
    arm, optimizer, scope, every, batches, visits, config, tmp_path
):
    config = change(config, optimizer=optimizer, scope=scope, lr=0.02, checkpoint_every=every)
    whole = run(config, tmp_path / "whole", arm)
    found, counted = run_in_pieces(batches, config, tmp_path / "parts", arm)
    assert counted == visits
    assert timeless(found) == timeless(whole)
    assert_same_files(tmp_path / "whole", tmp_path / "parts")
    assert len(found["influence"]) == 6


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
def test_schedules_go_on(schedule, config, tmp_path):
    config = change(config, schedule=schedule, checkpoint_every=1, augment=False, monitor=())
    whole = run(config, tmp_path / "whole")
    found, _ = run_in_pieces(2, config, tmp_path / "parts")
    assert timeless(found) == timeless(whole)
    assert_same_files(tmp_path / "whole", tmp_path / "parts")


def test_tensorboard_has_every_number_once(config, tmp_path):
    run(config, tmp_path / "whole")
    run_in_pieces(4, change(config, checkpoint_every=2), tmp_path / "parts")
    found = []
    for directory in (tmp_path / "whole", tmp_path / "parts"):
        board = EventAccumulator(str(directory)).Reload()
        tags = set(board.Tags()["scalars"]) - set(CLOCKS)
        found.append({t: [(e.step, e.value) for e in board.Scalars(t)] for t in tags})
    assert found[0] == found[1]
    assert [step for step, _ in found[0]["train_loss"]] == [1, 2, 3]


def test_times_add_up(config, tmp_path):
    run_once = lambda: run(config, tmp_path, budget=EpochBudget(1))  # noqa: E731
    for epoch in (1, 2):
        with pytest.raises(EpochsSpent):
            run_once()
        state = read_tensors(tmp_path / NEWEST)
        assert (state["epoch"], state["step"]) == (epoch + 1, 0)
        assert state["seconds"] > sum(row["seconds"] for row in state["rows"])
    result = run_once()
    assert result["seconds"] > state["seconds"]


def test_epoch_budget(config, tmp_path, monkeypatch):
    config = change(config, arms=("none", "fisher"), seeds=(0,), output=tmp_path / "out")
    whole = run_comparison(change(config, output=tmp_path / "whole"), quiet())
    part = change(config, stop_after=2, checkpoint_every=10**6)
    trained = []
    original = train.train_epoch
    monkeypatch.setattr(
        train, "train_epoch", lambda *args: trained.append(args[0].epoch) or original(*args)
    )
    for epochs, finished in (([1, 2], 0), ([3, 1], 1)):
        with pytest.raises(EpochsSpent, match=r"after 2 epochs .*the same command goes on"):
            run_comparison(part, quiet())
        assert trained == epochs
        trained.clear()
        if finished:
            assert len(read_results(config.output)["runs"]) == finished
    results = run_comparison(part, quiet())
    assert trained == [2, 3]
    assert timeless(results["runs"]) == timeless(whole["runs"])
    assert "stop_after" not in results["config"]
    assert not list(config.output.rglob("checkpoint*"))
    for name in ("none-seed0", "fisher-seed0"):
        assert_same_files(tmp_path / "whole" / "runs" / name, config.output / "runs" / name)


def quiet():
    return Progress(Console(quiet=True))


@pytest.mark.slow
def test_every_recipe_can_be_stopped_and_continued(tmp_path, capsys):
    """The two kinds of recipe, on the command line."""
    words = ["--epochs=2", "--seeds=0", "--device=cpu", "--width=4", "--train-size=100"]
    kinds = {
        "figure1": (["--size=digits", "--arms=none"], "results.json"),
        "theorem1": (["--size=digits", "--models=small_cnn"], "theorem1.json"),
    }
    for recipe, (more, file) in kinds.items():
        found = {}
        for name, stop in (("whole", []), ("parts", ["--stop-after=1"])):
            folder = tmp_path / recipe / name
            command = ["run", recipe, *words, *more, *stop, "--output", str(folder)]
            if stop:
                assert main(command) == 75
                assert "Stopped after 1 epoch (--stop-after)" in capsys.readouterr().out
                assert list(folder.rglob(NEWEST))
            assert main(command) == 0
            found[name] = timeless(json.loads((folder / file).read_text()))
            found[name]["config"].pop("output")
            assert not list(folder.rglob("checkpoint*"))
        assert found["parts"] == found["whole"]
    assert main(["bench", "refresh", "--stop-after=1"]) == 2


@pytest.fixture
def stopped(config, tmp_path):
    """A run with two checkpoints, the newest inside the second epoch."""
    config = change(config, checkpoint_every=4)
    with pytest.raises(Interrupted):
        run_until(9, config, tmp_path / "run")
    return config


def contents(directory):
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_checkpoint_gives_way_to_the_one_before_it(share, stopped, tmp_path):
    whole = run(stopped, tmp_path / "whole")
    directory = tmp_path / "run"
    newest, before = directory / NEWEST, (directory / PREVIOUS).read_bytes()
    data = newest.read_bytes()
    newest.write_bytes(data[: int(share * len(data))])
    message = rf"{NEWEST} is damaged: going on from the checkpoint before it"
    with pytest.warns(GradmaskWarning, match=message), pytest.raises(Interrupted):
        run_until(1, stopped, directory)
    assert newest.read_bytes() == before  # the damaged one is not kept as the previous one
    assert timeless(run(stopped, directory)) == timeless(whole)
    assert_same_files(directory, tmp_path / "whole")


def test_a_lost_newest_checkpoint_is_no_damage(stopped, tmp_path):
    """What a process leaves that is killed between the two renames."""
    whole = run(stopped, tmp_path / "whole")
    (tmp_path / "run" / NEWEST).unlink()
    assert timeless(run(stopped, tmp_path / "run")) == timeless(whole)


def test_any_damage_is_found(stopped, tmp_path):
    newest = tmp_path / "run" / NEWEST
    whole = newest.read_bytes()
    generator = random.Random(0)
    for _ in range(300):
        place = generator.randrange(len(whole))
        spoilt = bytearray(whole)
        spoilt[place : place + 64] = generator.randbytes(len(spoilt[place : place + 64]))
        newest.write_bytes(bytes(spoilt))
        try:
            found = read_tensors(newest)
        except StateError:
            continue
        # Padding between the tensors may be anything.
        newest.write_bytes(whole)
        assert str(found) == str(read_tensors(newest))


def test_checkpoints_that_cannot_be_used(stopped, tmp_path, monkeypatch):
    directory = tmp_path / "run"

    def refused(message, config=stopped, arm="fisher"):
        before = contents(directory)
        with pytest.raises(StateError, match=message) as error:
            run(config, directory, arm)
        assert f"delete the folder {directory}" in str(error.value)
        assert contents(directory) == before

    refused(r"another run, with keep=0.25, not 0.5", change(stopped, keep=0.5))
    refused(r"another run, with arm='fisher', not 'random'", arm="random")
    with monkeypatch.context() as patch:
        data = load_images(change(stopped, train_size=100), 0)
        patch.setattr(sys.modules[__name__], "load_images", lambda *_: data)
        refused(r"another run, with images=\[135, .*not \[90")
    for name in ("train_images", "train_labels"):  # of the same shape
        with monkeypatch.context() as patch:
            data = load_images(stopped, 0)
            changed = dataclasses.replace(data, **{name: getattr(data, name) ^ 1})
            patch.setattr(sys.modules[__name__], "load_images", lambda *_, found=changed: found)
            kind = "given_labels" if name == "train_labels" else "contents"
            refused(rf"another run, with {kind}='\w{{32}}', not '\w{{32}}'")
    with monkeypatch.context() as patch:
        layers = (nn.Flatten(), nn.Linear(64, 10))
        patch.setattr(components, "build_model", lambda *_: nn.Sequential(*layers))
        refused(r"of another network: '1\.bias'")
    log = directory / "metrics.jsonl"
    text = log.read_text()
    log.write_text(text[:10])
    refused(r"metrics\.jsonl is shorter than the run's checkpoint says")
    log.write_text(text)
    state = read_tensors(directory / NEWEST)
    for changed, version in ((state | {"version": 9}, 9), ([state], None)):
        with atomic_file(directory / NEWEST) as file:
            torch.save(changed, file)
        refused(rf"of version {version}; this gradmask reads version 3")
    for name in (NEWEST, PREVIOUS):
        (directory / name).write_bytes(b"no checkpoint")
    refused(rf"{NEWEST} is damaged, and no other is sound")
    (directory / NEWEST).unlink()
    refused(rf"{PREVIOUS} is damaged, and no other is sound")


def test_folder_with_a_checkpoint_is_not_taken_over(config, tmp_path):
    config = change(config, output=tmp_path / "out", stop_after=1)
    with pytest.raises(EpochsSpent):
        run_comparison(config, quiet())
    before = contents(config.output)
    with pytest.raises(OptionError, match=r"different run, with lr=0\.1, not 0\.2"):
        run_comparison(change(config, lr=0.2), quiet())
    assert contents(config.output) == before


def test_folder_of_a_process_killed_at_its_first_file_is_empty(config, tmp_path):
    config = change(config, output=tmp_path / "out", arms=("none",), seeds=(0,), epochs=1)
    config.output.mkdir()
    (config.output / ".config.yaml.1.tmp").write_text("ep")
    run_comparison(config, quiet())
    assert sorted(path.name for path in config.output.glob(".*")) == [".gradmask", ".lock"]


def test_a_diverged_run_leaves_no_checkpoint(config, tmp_path):
    config = change(config, optimizer="sgd", schedule="constant", lr=1e30, output=tmp_path / "out")
    config = change(config, checkpoint_every=1, monitor=())
    with pytest.raises(Diverged, match="Try a lower lr"):
        run(config, tmp_path / "run", "none")
    run_comparison(config, quiet())
    assert not list(config.output.rglob("checkpoint*"))


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write():
        with atomic_file(path, tmp_path / "older") as file:
            file.write(b"new")
            raise OSError("disk is full")

    with pytest.raises(OSError, match="disk is full"):
        write()
    assert contents(tmp_path) == {path: b"old"}


def test_another_device_has_its_own_kind_of_optimizer(stopped, tmp_path, monkeypatch):
    made = []
    original = train.new_state

    def fused(*args):
        made.append(original(*args))
        made[-1].optimizer.param_groups[0]["fused"] = True
        return made[-1]

    monkeypatch.setattr(train, "new_state", fused)
    run(stopped, tmp_path / "run")
    assert made[-1].optimizer.param_groups[0]["fused"] is True
