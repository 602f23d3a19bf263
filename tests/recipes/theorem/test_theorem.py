"""The recipe `theorem1`: slopes, the rule they are fitted by, files, resumption."""

import csv
import itertools
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from rich.console import Console
from theorem_runs import options

from gradmask.cli import main
from gradmask.errors import DataError, OptionError
from gradmask.recipes.results import check_theorem
from gradmask.recipes.theorem import run as theorem
from gradmask.recipes.theorem.config import SIZES, TheoremCheck
from gradmask.recipes.theorem.report import (
    findings,
    grouped,
    print_theorem,
    tables,
    to_markdown,
    write_theorem,
)
from gradmask.recipes.theorem.run import run_theorem
from gradmask.recipes.training import run as train
from gradmask.study.folder import read_results

pytestmark = pytest.mark.usefixtures("repeatable")

QUIET = Console(quiet=True)


def verdict(results):
    return findings(results)[-1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = options(tmp_path_factory.mktemp("theorem") / "out")
    results = run_theorem(config, QUIET)
    write_theorem(config.output, results)
    return config, results


def test_slopes_of_the_recipe(finished):
    _, results = finished
    groups = dict(grouped(results))
    assert set(groups) == {
        (model, state, activation)
        for model in ("mlp", "small_cnn")
        for state in ("initial", "trained")
        for activation in ("own", "smooth")
    }
    for (_, _, activation), runs in groups.items():
        for run in runs:
            assert len(run["fitted"]) >= 4
            assert run["slopes"]["kl"] == pytest.approx(2, abs=0.1)
            if activation == "smooth":  # a network with kinks need not keep to it
                assert run["slopes"]["error"] == pytest.approx(3, abs=0.1)
    assert results["runs"][0]["measurements"][0] != results["runs"][1]["measurements"][0]


def test_steps_end_at_the_learning_rate(finished):
    config, _ = finished
    steps = config.step_sizes()
    assert len(steps) == config.steps
    assert steps[-1] == config.lr
    assert steps[0] == pytest.approx(config.lr * 10**-config.decades)
    ratios = [b / a for a, b in itertools.pairwise(steps)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


def test_files(finished):
    config, results = finished
    folder = config.output
    assert json.loads((folder / "theorem1.json").read_text()) == json.loads(json.dumps(results))
    assert {"commit", "torch", "device"} <= set(results["environment"])
    with (folder / "theorem1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * 2 * config.steps  # models, seeds, states, networks
    first = results["runs"][0]["measurements"][0]
    assert float(rows[0]["kl"]) == pytest.approx(first["kl"][0], rel=1e-5)
    assert sum(int(row["fitted"]) for row in rows[: config.steps]) == len(first["fitted"])
    assert (folder / "theorem1.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "theorem1.svg").read_text()
    ET.fromstring(text)
    for word in ("mlp, initial", "small_cnn, trained", "slope 2", "slope 3", "step size"):
        assert word in text
    assert (folder / "theorem1.md").read_text() == to_markdown(results)


def test_tables_and_findings(finished):
    _, results = finished
    console = Console(record=True, width=200)
    print_theorem(results, console)
    text = " ".join(console.export_text().split())
    for sentence in findings(results):
        assert sentence in text
    for _, header, rows in tables(results):
        assert all(len(row) == len(header) for row in rows)
    markdown = to_markdown(results)
    assert "| mlp, trained | SiLU | 2.00 ± 0.00 |" in markdown
    assert verdict(results).startswith("Slopes within 0.1 in every seed")


def test_verdict_follows_the_slopes(finished):
    _, results = finished
    results = json.loads(json.dumps(results))
    for run in results["runs"]:
        for found in run["measurements"]:
            found["slopes"] = {"kl": 2.05, "error": 2.95, "error_median": 3.0}
    assert "KL as ε² in 4 of 4 networks" in verdict(results)
    assert "the error as ε³ in 4 of 4 as built and in 4 of 4" in verdict(results)
    results["runs"][0]["measurements"][0]["slopes"]["error"] = 2.89  # one seed is enough
    assert "(3: holds in 1 of 2 seeds)" in findings(results)[0]
    assert "the error as ε³ in 3 of 4 as built and in 4 of 4" in verdict(results)
    results["runs"][0]["measurements"][0]["slopes"]["error"] = None
    assert "the error as ε³ in 3 of 4 as built and in 4 of 4" in verdict(results)
    assert "cannot be told" in findings(results)[0]


def test_files_of_a_model_without_relu(finished, tmp_path):
    _, results = finished
    results = json.loads(json.dumps(results))
    for run in results["runs"]:
        run["measurements"] = [m for m in run["measurements"] if m["activation"] == "own"]
    write_theorem(tmp_path, results)
    assert "SiLU for ReLU as" not in "".join(findings(results)[:-1])


def test_an_interrupted_run_goes_on(finished, tmp_path, monkeypatch):
    _, whole = finished
    config, run, done = options(tmp_path / "out", models=("mlp",)), theorem._run, []

    def interrupted(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(theorem, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_theorem(config, QUIET)
    kept = json.loads((config.output / "theorem1.json").read_text())["runs"]
    assert len(kept) == 1
    monkeypatch.setattr(theorem, "_run", run)
    console = Console(record=True, width=100)
    results = run_theorem(config, console)
    assert "1 finished runs found; 1 to go" in console.export_text()
    assert results["runs"][0] == kept[0]
    expected = [run for run in whole["runs"] if run["model"] == "mlp"]
    for ours, theirs in zip(results["runs"], expected, strict=True):
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_run_that_diverges_does_not_take_others_along(epoch, tmp_path, monkeypatch):
    """In the middle of training, or in the last step: no loss is computed after it."""
    original = train.train_epoch

    def diverging(run, *args):
        loss = original(run, *args)
        first = next(run.model.parameters())
        if first.dim() == 2 and run.epoch == epoch:  # the MLP's
            with torch.no_grad():
                first.fill_(math.nan)
        return loss

    monkeypatch.setattr(train, "train_epoch", diverging)
    config = options(tmp_path / "out", epochs=2, seeds=(0,))
    console = Console(record=True, width=200)
    run_theorem(config, console)
    assert re.search(r"mlp, seed 0: .* s, diverged in epoch 2", console.export_text())
    results = read_results(config.output, "theorem1.json", check_theorem)
    assert [run["model"] for run in results["runs"]] == ["mlp", "small_cnn"]
    assert results["runs"][0]["diverged"]["epoch"] == 2
    assert "measurements" in results["runs"][1]
    write_theorem(config.output, results)
    print_theorem(results, console)
    sentence = "mlp: 1 of 1 runs diverged, left out of all tables and figures: seed 0 in epoch 2."
    for text in (console.export_text(), (config.output / "theorem1.md").read_text()):
        assert sentence in text
    assert "small_cnn, trained" in (config.output / "theorem1.svg").read_text()
    assert not list(config.output.rglob("checkpoint*"))
    monkeypatch.setattr(train, "train_epoch", None)  # nothing is left to do
    run_theorem(config, QUIET)
    results["runs"] = results["runs"][:1]
    assert findings(results) == [sentence]
    alone = tmp_path / "alone"
    alone.mkdir()
    write_theorem(alone, results)
    assert (alone / "theorem1.md").is_file()
    assert not (alone / "theorem1.svg").exists()


def test_seeds_can_be_added_and_other_options_are_refused(finished, monkeypatch):
    config, results = finished
    done = []
    monkeypatch.setattr(theorem, "_run", lambda c, model, seed, *_: done.append((model, seed)))
    with pytest.raises(OptionError, match=r"lr=0\.1, not 0\.2"):
        run_theorem(options(config.output, lr=0.2), QUIET)
    monkeypatch.setattr(theorem, "environment", lambda _: {})
    assert run_theorem(config, QUIET) == json.loads(json.dumps(results))
    assert not done
    with pytest.raises(TypeError):  # what stands in for the run gives no result
        run_theorem(options(config.output, seeds=(5,)), QUIET)
    assert done == [("mlp", 5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ()}, "models="),
        ({"models": ("mlp", "mlp")}, "models="),
        ({"sources": 2}, "sources=2"),
        ({"probe": 0}, "probe=0"),
        ({"steps": 2}, "steps=2"),
        ({"decades": 0.0}, "decades=0.0"),
        ({"decades": math.nan}, "decades=nan"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"epochs": 0}, "epochs=0"),
        ({"seeds": ()}, "seeds="),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(OptionError, match=message):
        TheoremCheck(**change)


def test_bad_options_are_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(theorem, "train_run", None)
    with pytest.raises(DataError, match="sources=500 is more than the 180 images"):
        run_theorem(options(tmp_path / "a", sources=500), QUIET)
    with pytest.raises(DataError, match="probe=500 is more than the 359 images"):
        run_theorem(options(tmp_path / "b", probe=500), QUIET)
    with pytest.raises(OptionError, match="resnet18"):
        run_theorem(options(tmp_path / "c", models=("mlp", "resnet18"), width=None), QUIET)
    with pytest.raises(OptionError, match="Did you mean 'small_cnn'"):
        run_theorem(options(tmp_path / "d", models=("mlp", "smal_cnn")), QUIET)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_options(size):
    TheoremCheck(**SIZES[size])


def test_command_line(tmp_path, capsys):
    folder = tmp_path / "out"
    words = [
        "run",
        "theorem1",
        "--size=digits",
        "--train-size=200",
        "--epochs",
        "1",
        "--probe",
        "3",
    ]
    words += [
        "--sources=4",
        "--probe=3",
        "--models",
        "mlp",
        "--seeds",
        "3",
        "4",
        "--device",
        "cpu",
        "--output",
        str(folder),
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "Slopes within 0.1 in every seed" in " ".join(printed.split())
    results = json.loads((folder / "theorem1.json").read_text())
    assert [(run["model"], run["seed"]) for run in results["runs"]] == [("mlp", 3), ("mlp", 4)]
    assert results["config"]["width"] == SIZES["digits"]["width"]
    text = (folder / "theorem1.md").read_text()
    (folder / "theorem1.md").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "theorem1.md").read_text() == text
    written = ["run", "theorem1", "--config", str(folder / "config.yaml")]
    assert main(written) == 0
    assert "2 finished runs found; 0 to go" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "theorem1", "--keep", "0.5"], "Unknown option: --keep"),
        (["run", "theorem1", "--size", "tiny"], 'Invalid value "tiny" for --size'),
        (["run", "theorem1", "--sources", "1"], "sources=1"),
        (["bench", "refresh", "theorem1"], "a comparison's"),
    ],
)
def test_mistakes_on_the_command_line(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err
