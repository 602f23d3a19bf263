import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from rich.console import Console

from gradmask.errors import GradmaskError, ModelError, OptionError, StateError
from gradmask.recipes import compare
from gradmask.recipes.catalogue import RECIPES
from gradmask.recipes.compare import run_comparison
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.images import load_images
from gradmask.recipes.training import components
from gradmask.recipes.training import run as train
from gradmask.study import folder
from gradmask.study import runs as engine
from gradmask.study.folder import read_results
from gradmask.study.options import to_plain, to_yaml
from gradmask.study.progress import Progress


def quiet():
    return Progress(Console(quiet=True))


@pytest.fixture
def config(options, tmp_path):
    return Comparison(**options, arms=("none", "fisher"), output=tmp_path / "out")


def change(config, **changes):
    return Comparison(**(vars(config) | changes))


def runs(results):
    return [(run["arm"], run["seed"]) for run in results["runs"]]


def test_folder_holds_everything(config):
    results = run_comparison(config, quiet())
    assert runs(results) == [("none", 0), ("none", 1), ("fisher", 0), ("fisher", 1)]
    assert read_results(config.output) == json.loads(json.dumps(results))
    assert yaml.safe_load((config.output / "config.yaml").read_text()) == to_plain(config)
    assert results["data"]["train"] == 135
    assert results["environment"]["torch"] == torch.__version__
    for name, numel in results["parameters"]:
        assert isinstance(name, str)
        assert numel > 0
    for arm, seed in runs(results):
        lines = (config.output / "runs" / f"{arm}-seed{seed}" / "metrics.jsonl").read_text()
        assert len(lines.splitlines()) == config.epochs
    assert not list(config.output.glob(".*.tmp"))


def test_results_have_no_paths_of_the_machine(config, tmp_path):
    run_comparison(config, quiet())
    results = json.loads((config.output / "results.json").read_text())
    results["config"].pop("output")
    assert str(tmp_path) not in json.dumps(results)


def test_finished_runs_are_not_done_again(config, monkeypatch):
    whole = run_comparison(change(config, output=config.output.with_name("whole")), quiet())
    original, calls = train.train_run, []

    def counted(config, data, arm, seed, *rest, **options):
        calls.append((arm, seed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(config, data, arm, seed, *rest, **options)

    monkeypatch.setattr(compare, "train_run", counted)
    with pytest.raises(KeyboardInterrupt):
        run_comparison(config, quiet())
    assert len(read_results(config.output)["runs"]) == 2
    resumed = run_comparison(config, quiet())
    assert calls == [("none", 0), ("fisher", 0), ("none", 1), ("none", 1), ("fisher", 1)]
    assert losses(resumed) == losses(whole)
    run_comparison(config, quiet())
    assert len(calls) == 5


def losses(results):
    return [[row["test_loss"] for row in run["epochs"]] for run in results["runs"]]


def test_seeds_and_arms_can_be_added(config):
    run_comparison(change(config, seeds=(0,)), quiet())
    results = run_comparison(change(config, arms=("inverse",), seeds=(1,)), quiet())
    assert set(runs(results)) == {(a, s) for a in ("none", "fisher", "inverse") for s in (0, 1)}
    assert results["config"]["arms"] == ["none", "fisher", "inverse"]
    assert results["config"]["seeds"] == [0, 1]


@pytest.mark.parametrize("changes", [{"keep": 0.5}, {"epochs": 4}, {"model": "small_cnn"}])
def test_folder_of_a_different_run_is_refused(config, changes):
    run_comparison(config, quiet())
    before = (config.output / "results.json").read_bytes()
    with pytest.raises(OptionError, match=f"different run, with {next(iter(changes))}="):
        run_comparison(change(config, **changes), quiet())
    assert (config.output / "results.json").read_bytes() == before


def test_folder_without_a_finished_run_is_taken_over(config, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compare, "train_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_comparison(config, quiet())
    assert (config.output / "config.yaml").exists()
    results = run_comparison(change(config, keep=0.5, arms=("none",), seeds=(7,)), quiet())
    assert runs(results) == [("none", 7)]  # the earlier arms and seeds are not wanted any more
    assert results["config"]["keep"] == 0.5


def test_options_of_the_users_own_are_not_overwritten(config):
    config.output.mkdir()
    mine = config.output / "config.yaml"
    mine.write_text("keep: 0.5\n")
    temporary = config.output / ".notes.tmp"
    temporary.write_text("mine")
    for text in ("keep: 0.5\n", to_yaml(config)):
        mine.write_text(text)
        with pytest.raises(OptionError, match="no run that gradmask made: choose another"):
            run_comparison(config, quiet())
        assert mine.read_text() == text
    assert temporary.read_text() == "mine"


def test_folder_of_something_else_is_refused(config):
    config.output.mkdir()
    (config.output / "thesis.tex").write_text("mine")
    with pytest.raises(OptionError, match="no run that gradmask made"):
        run_comparison(config, quiet())
    assert [p.name for p in config.output.iterdir()] == ["thesis.tex"]
    with pytest.raises(OptionError, match="is a file"):
        run_comparison(change(config, output=config.output / "thesis.tex"), quiet())


def test_another_process_is_kept_out(config, monkeypatch):
    """Its unfinished files would be removed, and its results overwritten."""
    run_comparison(config, quiet())
    before = {p: p.read_bytes() for p in config.output.rglob("*") if p.is_file()}
    code = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); "
        "lock.acquire(); print('held', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(config.output / folder.LOCK)]
    more = change(config, seeds=(0, 1, 2))
    monkeypatch.setattr(folder, "LOCK_SECONDS", 0.1)
    with subprocess.Popen(words, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(StateError, match=r"Another process writes into .* another --output"):
            run_comparison(more, quiet())
        other.kill()
    assert before == {p: p.read_bytes() for p in config.output.rglob("*") if p.is_file()}
    assert len(run_comparison(more, quiet())["runs"]) == 6


@pytest.mark.parametrize("exists", [True, False])
def test_a_refused_run_leaves_no_folder(config, exists):
    if exists:
        config.output.mkdir()
    with pytest.raises(OptionError, match="colour images"):
        run_comparison(change(config, model="resnet18", width=None), quiet())
    assert config.output.exists() == exists
    assert not list(config.output.glob("*"))


def test_what_runs_were_made_with_stays(config, monkeypatch):
    first = run_comparison(config, quiet())
    monkeypatch.setattr(engine, "environment", lambda _: {"commit": "younger"})
    same = run_comparison(config, quiet())
    assert same["environment"] == first["environment"]
    more = run_comparison(change(config, seeds=(0, 1, 2)), quiet())
    assert more["environment"] == {"commit": "younger"}
    for run in more["runs"]:
        commit = "younger" if run["seed"] == 2 else first["environment"]["commit"]
        assert run["commit"] == commit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "small_cn"}, "Did you mean 'small_cnn'"),
        ({"model": "resnet18", "width": None}, "colour images"),
        ({"data": "./no/such/folder"}, "No folder"),
        ({"train_size": 10**6}, "more than the"),
        ({"device": "abacus"}, "device="),
    ],
)
def test_mistakes_are_found_before_anything_is_written(config, changes, message):
    with pytest.raises(GradmaskError, match=message):
        run_comparison(change(config, **changes), quiet())
    assert not config.output.exists()


def test_model_that_cannot_be_measured_is_found_before_training(config, monkeypatch):
    def build(*_):
        norm = torch.nn.BatchNorm1d(64, track_running_stats=False)
        return torch.nn.Sequential(torch.nn.Flatten(), norm, torch.nn.Linear(64, 10))

    monkeypatch.setattr(components, "build_model", build)
    with pytest.raises(ModelError, match=r"Layer '1'.*batch statistics"):
        run_comparison(config, quiet())
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("model", "size", "reason"),
    [("alexnet", 32, "too small"), ("inception_v3", 32, "Kernel size"), ("vit_b_16", 30, "patch")],
)
def test_model_that_does_not_fit_the_images_is_named(config, model, size, reason, monkeypatch):
    def colour(*_):
        grey = load_images(change(config, image_size=size), 0)
        parts = ("train_images", "val_images", "test_images")
        return replace(grey, **{part: getattr(grey, part).repeat(1, 3, 1, 1) for part in parts})

    monkeypatch.setattr(compare, "load_images", colour)
    message = rf"model='{model}'.*{size} x {size} pixels.*{reason}.*--image-size"
    with pytest.raises(OptionError, match=message):
        run_comparison(change(config, model=model, width=None), quiet())
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "damaged"), ("[]", "damaged"), ("{}", "damaged"), ('{"version": 9}', "version 9")],
)
def test_damaged_results_are_named(text, message, tmp_path):
    with pytest.raises(StateError, match=r"No results\.json"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(StateError, match=message):
        read_results(tmp_path)


def test_damaged_options_are_named(config):
    config.output.mkdir()
    folder.mark_folder(config.output)
    for text in ("- 1", "{", "keep"):
        (config.output / "config.yaml").write_text(text)
        with pytest.raises(StateError, match=r"config\.yaml is damaged"):
            run_comparison(config, quiet())


def test_recipes_are_valid():
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)
    for recipe in RECIPES:
        size = f"-{next(iter(recipe.sizes))}" if recipe.sizes else ""
        assert recipe.config().output.name == recipe.name + size
        assert recipe.config(seeds=(7,)).seeds == (7,)
        for size in recipe.sizes:
            assert recipe.config(size).output.name == f"{recipe.name}-{size}"
        with pytest.raises(OptionError, match=r"one size only|Unknown size 'tiny'"):
            recipe.config("tiny")
