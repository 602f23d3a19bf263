import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from gradmask import SCORES, __version__
from gradmask.cli import main
from gradmask.recipes.config import Comparison

SMALL = ["--train-size", "100", "--model=mlp", "--width", "8", "--epochs", "2", "--device", "cpu"]


def result(folder):
    return json.loads((folder / "results.json").read_text())


def test_run_and_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # no terminal: the table is printed whole all the same
    folder = tmp_path / "out"
    words = ["run", "demo", *SMALL, "--seeds", "3", "4", "--arms", "none", "fisher"]
    assert main([*words, "--output", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "No mask has not learnt: test accuracy is" in printed
    assert "better than" not in printed  # nothing is judged then
    assert "Is it better?" not in (folder / "report.html").read_text()
    assert str(folder / "report.html") in printed
    assert "no mask, seed 3" in printed
    row = next(line for line in printed.splitlines() if line.startswith("│ no mask"))
    assert len(re.findall(r"± \d", row)) == 6
    runs = [(run["arm"], run["seed"]) for run in result(folder)["runs"]]
    assert runs == [("none", 3), ("none", 4), ("fisher", 3), ("fisher", 4)]
    assert result(folder)["config"]["label_noise"] == 0.4  # the recipe's
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").exists()


@pytest.mark.parametrize("seeds", [["--seeds", "5,6"], ["--seeds=[5, 6]"], ["--seeds", "[5,6]"]])
def test_lists(seeds, tmp_path):
    folder = tmp_path / "out"
    assert main(["run", *SMALL, "--arms=none", *seeds, "--output", str(folder)]) == 0
    assert result(folder)["config"]["seeds"] == [5, 6]


def test_sizes_of_a_recipe(tmp_path, capsys):
    folder = tmp_path / "out"
    words = ["figure1", "--size", "digits", "--epochs", "1", "--seeds=0", "--lr", "0.1"]
    assert main(["run", *words, "--device=cpu", "--output", str(folder)]) == 0
    config = result(folder)["config"]
    assert (config["data"], config["width"], config["lr"]) == ("digits", 8, 0.1)
    assert main(["run", "figure1", "--size=medium"]) == 2
    assert "Unknown size 'medium'. Known: small, paper, digits." in capsys.readouterr().err
    assert main(["run", "demo", "--size"]) == 2
    assert "--size needs a value." in capsys.readouterr().err


def test_arms_with_options(tmp_path):
    folder = tmp_path / "out"
    arms = ["none:labels=random", "fisher:keep=0.7"]
    assert main(["run", *SMALL, "--seeds=0", "--arms", *arms, "--output", str(folder)]) == 0
    assert [run["arm"] for run in result(folder)["runs"]] == arms
    page = (folder / "report.html").read_text()
    assert "no mask, random labels" in page
    assert "Fisher mask, keep 0.7" in page


def test_yaml_file_and_the_command_line_over_it(tmp_path):
    file, folder = tmp_path / "mine.yaml", tmp_path / "out"
    file.write_text("epochs: 1\narms: [none]\nseeds: [2]\nlr: 0.05\n")
    words = [*SMALL[:5], "--config", str(file), "--lr", "0.02", "--output", str(folder)]
    assert main(["run", "compare", *words]) == 0
    config = result(folder)["config"]
    assert (config["epochs"], config["seeds"], config["lr"]) == (1, [2], 0.02)
    # What was written beside the results can be run again, and gives the same.
    again = tmp_path / "again"
    written = str(folder / "config.yaml")
    assert main(["run", "compare", "--config", written, "--output", str(again)]) == 0
    rows = [result(f)["runs"][0]["epochs"][-1]["test_loss"] for f in (folder, again)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rum"], "Did you mean 'run'"),
        (["run", "dem"], "Did you mean 'demo'"),
        (["run", "demo", "--epoch", "3"], "Did you mean 'epochs'"),
        (["run", "demo", "--label-nose", "3"], "Did you mean 'label_noise'"),
        (["run", "demo", "--epochs", "many"], "epochs='many'"),
        (["run", "demo", "--width", "wide"], "width='wide'"),
        (["run", "demo", "--optimizer", "sdg"], "Did you mean 'sgd'"),
        (["run", "demo", "--keep", "0"], r"keep=0.0 must be in \(0, 1\]"),
        (["run", "demo", "--arms", "none", "fishes"], "Did you mean 'fisher'"),
        (["run", "demo", "--config", "no-such.yaml"], r"'no-such\.yaml'.*No such file"),
        (["run", "demo", "--config=no-such.yaml"], r"'no-such\.yaml'.*No such file"),
        (["run", "demo", "--momentum", "-1"], "momentum=-1.0 must be"),
        (["run", "demo", "stray"], "stray"),
        (["report", "no-such-folder"], r"No results\.json"),
    ],
)
def test_mistakes_are_one_clear_line(words, message, capsys):
    assert main(words) == 2
    printed = capsys.readouterr()
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.err.startswith("gradmask: error: ")
    assert re.search(message, printed.err)
    assert printed.out == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kep: 0.5\n", r"Unknown .*mine\.yaml option 'kep'\. Did you mean 'keep'"),
        ("keep: 0.5\nepochs: [1\nlr: 3\n", r"mine\.yaml' is not valid YAML in line 3: "),
        ("keep: \x00\n", r"mine\.yaml' is not valid YAML: it is not plain text"),
        ("", r"mine\.yaml' holds no options"),
        ("- keep\n", r"mine\.yaml' holds no options"),
        ("keep: many\n", "keep='many' is not of the type float"),
        ("lr: .nan\n", "lr=nan must be positive and finite"),
    ],
)
def test_mistakes_in_a_yaml_file(text, message, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert main(["run", "demo", "--config", str(file)]) == 2
    printed = capsys.readouterr().err
    assert len(printed.strip().splitlines()) == 1
    assert re.search(message, printed)


def test_a_study_of_which_runs_fail_shows_the_others(tmp_path, capsys, monkeypatch):
    (tmp_path / "failing_module.py").write_text(
        "def some(trial):\n"
        "    assert trial.seed != 1, 'mine'\n"
        "    trial.report(epoch=0, val_accuracy=0.5)\n"
        "def every(trial):\n"
        "    raise ValueError('mine')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    words = ["--arms", "none", "--seeds", "0", "1", "--output"]
    assert main(["study", "failing_module:some", *words, "some"]) == 1
    printed = capsys.readouterr()
    assert "│ no mask" in printed.out
    assert "1 of 2 runs failed" in printed.err
    assert "no mask, seed 1: AssertionError: mine" in printed.err
    assert main(["study", "failing_module:every", *words, "every"]) == 1
    assert "2 of 2 runs failed" in capsys.readouterr().err
    assert main(["report", "every"]) == 2
    assert "No run in every is finished" in capsys.readouterr().err


def test_recipes_are_listed(capsys):
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    for name in ("compare", "demo", "cifar100-small"):
        assert name in printed


def test_scores_are_listed(capsys):
    assert main(["scores"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for score in SCORES.values():
        assert f"{score.name} {score.formula}" in printed
        assert score.source in printed


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["run", "demo", "--help"])
    printed = capsys.readouterr().out
    for option in fields(Comparison):
        assert f"--{option.name.replace('_', '-')}" in printed


def test_interruption_is_no_traceback(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gradmask.recipes.compare.run_comparison", interrupted)
    assert main(["run", "demo", "--output", str(tmp_path / "out")]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_module_and_version():
    command = [sys.executable, "-m", "gradmask.cli", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"gradmask {__version__}"


def test_warnings_are_one_line_without_code(capsys):
    from gradmask.cli.terminal import show_warning
    from gradmask.errors import GradmaskWarning

    others = []
    show_warning(
        lambda *given: others.append(given), GradmaskWarning("odd"), GradmaskWarning, "f", 1
    )
    assert capsys.readouterr().err == "Warning: odd\n"
    show_warning(lambda *given: others.append(given), UserWarning("x"), UserWarning, "f", 1)
    assert len(others) == 1


def test_a_switch_needs_no_value(tmp_path):
    for words in (["--noisy-validation"], ["--noisy-validation", "true"]):
        folder = tmp_path / str(len(words))
        run = ["run", *SMALL, "--arms=none", "--seeds=0", *words, "--output", str(folder)]
        assert main(run) == 0
        assert result(folder)["config"]["noisy_validation"] is True
