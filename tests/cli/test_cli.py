import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from reading import read

from gradmask import SCORES, __version__
from gradmask.cli import main
from gradmask.cli.app import app
from gradmask.cli.options import HEADINGS
from gradmask.recipes.audit.options import Audit, Clean, DynamicsAudit
from gradmask.recipes.catalogue import RECIPES
from gradmask.recipes.config import Comparison
from gradmask.recipes.finetune.config import FineTuning
from gradmask.recipes.theorem.config import TheoremCheck
from gradmask.recipes.unlearn.config import Unlearning
from gradmask.study import StudyOptions

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
    assert 'Choose from: "small", "paper", "digits".' in capsys.readouterr().err
    assert main(["run", "demo", "--size"]) == 2
    assert "--size requires an argument" in capsys.readouterr().err


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
        (["run", "demo", "--epoch", "3"], "Did you mean --epochs"),
        (["run", "demo", "--label-nose", "3"], "Did you mean --label-noise"),
        (["run", "demo", "--epochs", "many"], "epochs='many'"),
        (["run", "demo", "--width", "wide"], "width='wide'"),
        (["run", "demo", "--epochs", "1.5"], "epochs='1.5' must be a whole number"),
        (["run", "demo", "--lr", "fast"], "--lr.*fast"),
        (["run", "demo", "--augment", "false"], "'false' is not expected.*--no-name"),
        (["run", "demo", "--size", "small"], "'demo' has one size"),
        (["run", "demo", "--sweep", "lr"], "sweep 'lr' must be written name=value"),
        (["run", "demo", "--sweep", "lr=1", "lr=2"], "sweep has lr twice"),
        (["run", "demo", "--sweep", "wdth=1"], "Unknown option to sweep over, 'wdth'"),
        (["run", "finetun", "--pretrained", "x"], "Did you mean 'finetune'"),
        (["run", "--epochs", "3", "theorem1"], "'theorem1' is not expected here"),
        (["bench", "stop"], "Did you mean 'step'"),
        (["bench", "refresh", "dem"], "Did you mean 'demo'"),
        (["bench", "step", "--rouns", "3"], "Did you mean --rounds"),
        (["audit", "x", "--fals-alarms", "0.1"], "Did you mean --false-alarms"),
        (["audit", "x", "--by", "dynamcs"], 'Did you mean "dynamics"'),
        (["audit", "x", "--probe", "9"], "--probe is an option of --by influence"),
        (["audit", "clean", "x", "--jbs", "2"], "Did you mean --jobs"),
        (["study", "a:b", "--sedes", "0"], "Did you mean --seeds"),
        (["study"], "needs a training function"),
        (["report", "x", "--outpt", "y"], "Did you mean --output"),
        (["cache", "--cler"], "Did you mean --clear"),
        (["--versoin"], "Did you mean '--version'"),
        (["run", "demo", "--optimizer", "sdg"], 'Did you mean "sgd"'),
        (["run", "demo", "--keep", "0"], r"keep=0.0 must be in \(0, 1\]"),
        (["run", "demo", "--arms", "none", "fishes"], "Did you mean 'fisher'"),
        (["run", "demo", "--config", "no-such.yaml"], r"'no-such\.yaml'.*No such file"),
        (["run", "demo", "--config=no-such.yaml"], r"'no-such\.yaml'.*No such file"),
        (["run", "demo", "--momentum", "-1"], "momentum=-1.0 must be"),
        (["run", "demo", "stray"], "stray"),
        (["report", "no-such-folder"], r"No results\.json"),
    ],
)
def test_mistakes_are_one_clear_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert not list(tmp_path.iterdir())
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
        ("epochs: 1.5\n", "epochs=1.5 is not of the type int"),
        ("optimizer: sdg\n", r"mine\.yaml optimizer 'sdg'\. Did you mean 'sgd'"),
        ("lr: .nan\n", "lr=nan is not of the type float"),
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


def commands(app=app, chain=()):
    """Every command, as the words that name it."""
    yield chain
    for name in app.resolved_commands():
        if not name.startswith("-"):
            yield from commands(app[name], (*chain, name))


def test_help_names_every_option(capsys):
    for words, kind in (
        (["run", "demo"], Comparison),
        (["run", "theorem1"], TheoremCheck),
        (["run", "finetune"], FineTuning),
        (["run", "unlearn"], Unlearning),
        (["study"], StudyOptions),
        (["audit"], DynamicsAudit),
        (["audit"], Audit),
        (["audit", "clean"], Clean),
    ):
        assert main([*words, "--help"]) == 0
        printed = capsys.readouterr().out
        for option in fields(kind):
            assert re.search(rf"--{option.name.replace('_', '-')}\b", printed)


@pytest.mark.parametrize("chain", list(commands()), ids=" ".join)
def test_help_fits_and_has_an_example(chain, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*chain, "--help"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert re.search(r"Examples?:\n  gradmask", printed)


def test_help_has_headings_and_the_defaults_of_the_recipe(capsys):
    assert main(["run", "demo", "--help"]) == 0
    printed = capsys.readouterr().out
    for heading in ("Data", "Model", "Masks", "Comparison", "Training", "Machine", "Output"):
        assert f"─ {heading} ─" in printed
    assert re.search(r"--label-noise.*\n.*default: 0\.4", printed)
    assert "--flip --no-flip" in printed


def test_every_option_of_a_recipe_has_a_heading():
    options = {
        f.name for k in (Comparison, TheoremCheck, FineTuning, Unlearning) for f in fields(k)
    }
    assert options | {f.name for f in fields(StudyOptions)} - {"train"} <= HEADINGS.keys()


def test_help_and_version_need_no_torch():
    code = (
        "import sys\n"
        "from gradmask.cli import main\n"
        "for words in {!r}:\n"
        "    assert main(words) in (0, 2)\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    words = [["--version"], *([*chain, "--help"] for chain in commands())]
    words += [["rum"], ["run", "demo", "--epoch=3"], ["run", "demo", "--keep=0"], ["recipes"]]
    subprocess.run(
        [sys.executable, "-c", code.format(words)], capture_output=True, text=True, check=True
    )


def test_interruption_is_no_traceback(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gradmask.recipes.compare.run_comparison", interrupted)
    assert main(["run", "demo", "--output", str(tmp_path / "out")]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["gradmask", "gradmask.cli"])
def test_module_and_version(module):
    command = [sys.executable, "-m", module, "--version"]
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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--noisy-validation"], {"noisy_validation": True}),
        (["--noisy-validation=true"], {"noisy_validation": True}),
        (["--no-flip"], {"flip": False, "crop": True}),
        (["--flip=false"], {"flip": False}),
        (["--no-nesterov", "--compile"], {"nesterov": False, "compile": True}),
        (["--arms", "none", "fisher:keep=0.5"], {"arms": ("none", "fisher:keep=0.5")}),
        (["--arms=none,slow"], {"arms": ("none", "slow")}),
        (["--arms", '["none", "fixed:file=a,b.pt"]'], {"arms": ("none", "fixed:file=a,b.pt")}),
        (["--seeds", "0", "1", "2"], {"seeds": (0, 1, 2)}),
        (["--seeds", "0,1"], {"seeds": (0, 1)}),
        (["--seeds=[5, 6]"], {"seeds": (5, 6)}),
        (["--seeds", "-3", "2"], {"seeds": (-3, 2)}),
        (["--seeds", "1", "--seeds", "4", "5"], {"seeds": (4, 5)}),
        (["--epochs", "3", "--epochs=4"], {"epochs": 4}),
        (
            ["--sweep", "lr=0.1,0.01", "batch_size=8"],
            {"sweep": {"lr": [0.1, 0.01], "batch_size": [8]}},
        ),
        (["--sweep", "weight-decay=0"], {"sweep": {"weight_decay": [0]}}),
        (["--fisher-samples", "null", "--test_size=9"], {"fisher_samples": None, "test_size": 9}),
        (["--weights", "null", "--validation", "none"], {"weights": None, "validation": None}),
        (["--data", "123", "--output=~/x"], {"data": "123", "output": Path.home() / "x"}),
        (["demo", "--lr", "1e-3"], {"lr": 0.001, "label_noise": 0.4}),
        (["figure1", "--size=digits"], {"data": "digits", "output": Path("runs/figure1-digits")}),
        (["finetune", "--rates", "0.1", "1e-2"], {"rates": (0.1, 0.01)}),
        (["unlearn", "--levels=1,2", "--forget", "random"], {"levels": (1, 2), "forget": "random"}),
        (["theorem1", "--models", "mlp", "--no-augment"], {"models": ("mlp",), "augment": False}),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_words_of_every_kind(words, expected):
    options = read(*words)
    assert {name: getattr(options, name) for name in expected} == expected


def test_mappings_of_a_study(monkeypatch):
    found = []
    monkeypatch.setattr("gradmask.cli.run.run_study", lambda options: found.append(options) or 0)
    words = ["--sweep", "lr=0.1,1", "--options", "width=8", "name=x", "--metrics", "bleu=higher"]
    assert main(["study", "a:b", *words, "--judge=bleu@last"]) == 0
    (options,) = found
    assert (options.train, options.sweep) == ("a:b", {"lr": [0.1, 1]})
    assert options.options == {"width": 8, "name": "x"}
    assert (options.metrics, options.judge) == ({"bleu": "higher"}, ("bleu@last",))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "lr: 1e-3\nepochs: 7\narms: [none, slow]\nsweep: {momentum: [0.0, 0.9]}\n"),
        (
            "a.toml",
            'lr = 1e-3\nepochs = 7\narms = ["none", "slow"]\nsweep = {momentum = [0.0, 0.9]}\n',
        ),
    ],
)
def test_files_lie_between_the_command_line_and_the_size(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    size = read("figure2", "--size", "digits")
    options = read("figure2", "--config", str(tmp_path / name), "--size", "digits", "--epochs", "2")
    assert (size.lr, size.epochs, size.width) == (0.02, 10, 8)
    assert (options.lr, options.epochs, options.width) == (0.001, 2, 8)
    assert (options.arms, options.sweep) == (("none", "slow"), {"momentum": [0.0, 0.9]})
    assert (options.augment, options.schedule) == (False, "constant")  # the recipe's


def test_mistakes_in_a_toml_file(tmp_path, capsys):
    file = tmp_path / "mine.toml"
    for text, message in (
        ("kep = 0.5\n", r"Unknown .*mine\.toml option 'kep'\. Did you mean 'keep'"),
        ("keep = \n", r"mine\.toml' is not valid TOML: .*line 1"),
        ("seeds = 3\n", r"seeds=3 is not of the type tuple"),
        ("", "holds no options"),
    ):
        file.write_text(text)
        assert main(["run", "demo", "--config", str(file)]) == 2
        printed = capsys.readouterr().err
        assert len(printed.strip().splitlines()) == 1
        assert re.search(message, printed)


@pytest.mark.parametrize("recipe", [recipe.name for recipe in RECIPES])
def test_the_options_of_a_recipe_are_printed_and_read_again(recipe, tmp_path, capsys):
    assert main(["run", recipe, "--print-config", "--seeds", "7"]) == 0
    (tmp_path / "a.yaml").write_text(capsys.readouterr().out)
    assert read(recipe, "--config", str(tmp_path / "a.yaml")) == read(recipe, "--seeds", "7")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_recipes_and_options(shell, tmp_path, capsys):
    file = tmp_path / "script"
    assert main(["--install-completion", "--shell", shell, "--output", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    script = file.read_text()
    for word in ("cifar100-small", "label-noise", "no-flip", "adamw", "threshold"):
        assert word in script
