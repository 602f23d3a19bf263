import json
import random
from functools import partial

import numpy as np
import pytest
import torch
import training_functions
import yaml
from training_functions import EPOCHS, diverge, own_arm, train

from gradmask.errors import GradmaskWarning, OptionError, StateError
from gradmask.study import Trial, compare
from gradmask.study.folder import read_results
from gradmask.study.metrics import chosen_epoch, metrics_of, unused
from gradmask.study.spec import Spec
from gradmask.study.statistics import best_runs, value_key
from gradmask.study.verdicts import verdicts

numpy_random = np.random.mtrand  # the state that older code draws from

ARMS = ["none", "fisher:keep=0.25", "slow:keep=0.25", "slow_matched:keep=0.25", "early"]


def timeless(results):
    changing = ("seconds", "source")
    return [{k: v for k, v in run.items() if k not in changing} for run in results["runs"]]


def by_arm(results, seed=0):
    return {run["arm"]: run for run in results["runs"] if run["seed"] == seed}


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    output = tmp_path_factory.mktemp("study") / "out"
    return output, compare(train, ARMS, range(3), output, threads=1)


def test_a_study_in_its_folder(studied):
    output, results = studied
    assert [(run["arm"], run["seed"]) for run in results["runs"]] == [
        (arm, seed) for arm in ARMS for seed in range(3)
    ]
    assert read_results(output) == json.loads(json.dumps(results))
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["train"] == "training_functions:train"
    assert not list(output.rglob("checkpoint*"))
    run = by_arm(results)["fisher:keep=0.25"]
    assert [row["epoch"] for row in run["epochs"]] == list(range(EPOCHS))
    assert run["epochs"][0]["kept"] == 1.0
    assert run["epochs"][-1]["kept"] == pytest.approx(0.25, abs=0.01)
    lines = (output / "runs" / "none-seed0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == by_arm(results)["none"]["epochs"]
    assert {v.question for v in verdicts(results)} >= {
        "better than no mask?",
        "better than training as slow?",
        "better than stopping early?",
    }


def test_early_stopping_is_no_mask_up_to_the_epoch_that_validation_chooses(studied):
    _, results = studied
    chooser = metrics_of(results).chooser
    assert chooser == (("val_accuracy", True), ("val_loss", False))
    for seed in range(3):
        runs = by_arm(results, seed)
        rows = runs["none"]["epochs"]
        best = max(rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
        assert chosen_epoch(rows, chooser) == best
        assert runs["early"]["epochs"] == rows[: rows.index(best) + 1]


def test_early_stopping_by_itself_and_with_patience(tmp_path):
    arms = ["early", "early:patience=1"]
    results = compare(train, arms, [0], tmp_path / "out", threads=1, choose="val_loss")
    rows = compare(train, ["none"], [0], tmp_path / "none", threads=1)["runs"][0]["epochs"]
    losses = [row["val_loss"] for row in rows]
    runs = by_arm(results)
    assert runs["early"]["epochs"] == rows[: losses.index(min(losses)) + 1]
    first_rise = next((i for i in range(1, EPOCHS) if losses[i] >= min(losses[:i])), EPOCHS)
    assert runs["early:patience=1"]["epochs"] == rows[:first_rise]


def test_slow_is_training_at_a_part_of_the_rate(tmp_path):
    results = compare(
        train, ["none", "slow:keep=0.25"], [0], tmp_path, sweep={"lr": [0.5, 0.125]}, threads=1
    )
    runs = {(run["arm"], run["values"]["lr"]): run["epochs"] for run in results["runs"]}
    kept = [{k: v for k, v in row.items() if k != "kept"} for row in runs["slow:keep=0.25", 0.5]]
    assert kept == [{k: v for k, v in r.items() if k != "kept"} for r in runs["none", 0.125]]


def test_arms_of_ones_own(tmp_path):
    arms = {"none": None, "half": own_arm, "half:factor=1": own_arm}
    results = compare(train, arms, [0], tmp_path, threads=1)
    rows = {arm: run["epochs"] for arm, run in by_arm(results).items()}
    assert rows["half:factor=1"] == rows["none"] != rows["half"]
    assert {v.arm for v in verdicts(results)} == {"half", "half:factor=1"}
    named = ["none", "training_functions:own_arm", "training_functions:own_arm:factor=1"]
    again = compare(train, named, [0], tmp_path / "named", threads=1)
    assert list(rows.values()) == [run["epochs"] for run in (again["runs"][i] for i in (0, 1, 2))]
    with pytest.raises(OptionError, match="'factr' of the run half, factr 1, seed 0 was never"):
        compare(train, {"half:factr=1": own_arm}, [0], tmp_path / "unread", threads=1)


def test_arms_of_ones_own_have_names_of_their_own(tmp_path):
    other = partial(own_arm)
    for arms, message in (
        ({"fisher": own_arm}, "'fisher' is a built-in arm"),
        ({"none": None, "slow:keep=0.5": own_arm}, "'slow' is a built-in arm"),
        ({"half": own_arm, "half:factor=1": other}, "'half' has another function"),
    ):
        with pytest.raises(OptionError, match=message):
            compare(train, arms, [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    compare(train, {"half:factor=1": own_arm}, [0], tmp_path / "out", threads=1)


def test_an_interrupted_study_goes_on_to_the_same_bits(studied, tmp_path):
    _, whole = studied
    calls = []

    def interrupted(trial):
        def stop(trial, epoch):
            calls.append((trial.spec.arm, trial.seed, epoch))
            if len(calls) == 9:
                raise KeyboardInterrupt

        train(trial, before_epoch=stop)

    interrupted.__module__, interrupted.__qualname__ = "training_functions", "train"
    with pytest.raises(KeyboardInterrupt):
        compare(interrupted, ARMS, range(3), tmp_path / "out", threads=1)
    assert list((tmp_path / "out").rglob("checkpoint.pt"))
    begun = len(calls)
    file = tmp_path / "out" / "results.json"
    file.write_text(file.read_text().replace('"source": "', '"source": "0'))
    with pytest.warns(GradmaskWarning, match="have changed"):
        results = compare(interrupted, ARMS, range(3), tmp_path / "out", threads=1)
    assert timeless(results) == timeless(whole)
    arm, seed, epoch = calls[begun - 1]
    assert calls[begun] == (arm, seed, epoch)  # not from its beginning


def test_seeds_arms_and_values_can_be_added(tmp_path):
    first = compare(train, ["none"], [0], tmp_path, threads=1, sweep={"lr": [0.1]})
    more = compare(train, ["none", "slow"], [0, 1], tmp_path, threads=1, sweep={"lr": [0.1, 0.2]})
    assert len(more["runs"]) == 8
    assert timeless(first)[0] in timeless(more)
    with pytest.raises(OptionError, match="holds a sweep over lr, not over nothing"):
        compare(train, ["none"], [0], tmp_path)
    with pytest.raises(OptionError, match="different run, with train="):
        compare(diverge, ["none"], [0], tmp_path, sweep={"lr": [0.1]})


def test_values_are_chosen_by_validation_of_the_other_seeds():
    def run(seed, lr, val, test):
        row = {"epoch": 0, "val_accuracy": val, "test_accuracy": test}
        return {"arm": "none", "seed": seed, "values": {"lr": lr}, "seconds": 1, "epochs": [row]}

    runs = [
        *(run(0, 0.1, 0.9, 0.1), run(0, 0.2, 0.1, 0.9)),
        *(run(1, 0.1, 0.2, 0.2), run(1, 0.2, 0.5, 0.8)),
        *(run(2, 0.1, 0.3, 0.3), run(2, 0.2, 0.5, 0.7)),
    ]
    results = {"config": {"arms": ["none"], "seeds": [0, 1, 2]}, "runs": runs}
    chosen = {
        seed: json.loads(value_key(r))["lr"] for seed, r in best_runs(results, "none").items()
    }
    assert chosen == {0: 0.2, 1: 0.1, 2: 0.1}  # by seeds 1 and 2; by 0 and 2; by 0 and 1


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(tmp_path):
    results = compare(diverge, ["none", "early"], range(3), tmp_path)
    gone = [run for run in results["runs"] if "diverged" in run]
    assert [(run["arm"], run["seed"]) for run in gone] == [("none", 1)]  # early was stopped before
    assert gone[0]["diverged"] == {"epoch": 2, "reason": "test_loss is nan"}
    assert len(results["runs"]) == 6
    read_results(tmp_path)


def test_what_a_trial_saves_it_goes_on_with(tmp_path):
    model = torch.nn.Linear(3, 2)
    trial = Trial(Spec("none", 0), tmp_path)
    assert trial.resume(model=model, start=1) == 1
    trial.report(epoch=1, val_loss=1.0)
    torch.manual_seed(5), random.seed(6), numpy_random.seed(7)
    trial.save(model=model, count=3)
    drawn = torch.rand(2), random.random(), numpy_random.rand(2)
    other, again = torch.nn.Linear(3, 2), Trial(Spec("none", 0), tmp_path)
    assert again.resume(model=other) == 2
    assert again.rows == [{"epoch": 1, "val_loss": 1.0}]
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(torch.rand(2), drawn[0])
    assert random.random() == drawn[1]
    assert np.array_equal(numpy_random.rand(2), drawn[2])
    with pytest.raises(StateError, match="another run"):
        Trial(Spec("none", 1), tmp_path).resume()
    with pytest.raises(StateError, match="damaged"):
        Trial(Spec("none", 0), tmp_path).resume(model=torch.nn.Linear(4, 2))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    trial = Trial(Spec("none", 0), tmp_path)
    for epoch in range(2):
        trial.report(epoch=epoch, val_loss=1.0)
        trial.save(epoch=epoch)
    path = tmp_path / "checkpoint.pt"
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 255
    path.write_bytes(contents)
    assert Trial(Spec("none", 0), tmp_path).resume() == 1
    (tmp_path / "checkpoint.previous.pt").write_bytes(b"")
    with pytest.raises(StateError, match="damaged"):
        Trial(Spec("none", 0), tmp_path).resume()


def test_a_seed_fixes_the_run(tmp_path):
    def drawing(trial):
        numbers = torch.rand(()), random.random(), numpy_random.rand()
        trial.report(epoch=0, a_score=numbers[0], b_score=numbers[1], c_score=numbers[2])

    first = compare(drawing, ["none"], range(2), tmp_path / "a")
    torch.rand(3)
    again = compare(drawing, ["none"], range(2), tmp_path / "b")
    assert timeless(first) == timeless(again)
    assert first["runs"][0]["epochs"] != first["runs"][1]["epochs"]


def test_training_functions_are_found_by_name(tmp_path):
    name = "training_functions:diverge"
    results = compare(name, ["none"], [0], tmp_path)
    assert results["config"]["train"] == name
    assert training_functions.EPOCHS


def test_what_a_function_does_to_its_process_ends_with_its_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def meddling(trial):
        assert torch.get_default_dtype() == torch.float32
        (tmp_path / f"elsewhere{trial.seed}").mkdir()
        import os

        os.chdir(tmp_path / f"elsewhere{trial.seed}")
        torch.set_default_dtype(torch.float64)
        trial.report(epoch=0, val_accuracy=0.5)

    results = compare(meddling, ["none"], range(2), "out")
    assert len(results["runs"]) == len(read_results(tmp_path / "out")["runs"]) == 2


def test_names_of_any_letters_and_numbers_of_numpy(tmp_path):
    def reading(trial):
        trial.report(epoch=0, val_loss=len(str(trial.options["model"])))

    sweep = {"model": ["org/bert base", "x" * 300]}
    results = compare(reading, ["none"], np.arange(2), tmp_path / "a", sweep=sweep)
    assert len(results["runs"]) == len(list((tmp_path / "a" / "runs").iterdir())) == 4
    rates = compare(reading, ["none"], [0], tmp_path / "b", sweep={"model": np.logspace(-2, 0, 3)})
    assert rates["config"]["sweep"] == {"model": [0.01, 0.1, 1.0]}
    with pytest.raises(OptionError, match="both set model"):
        compare(reading, ["none:model=1"], [0], tmp_path / "c", sweep=sweep)
    with pytest.raises(OptionError, match="would share a folder"):
        compare(reading, dict.fromkeys(["a", "a:b=1", "a-b=1"], own_arm), [0], tmp_path / "d")


def test_tests_that_are_not_compared_are_named(tmp_path):
    def testing(trial):
        for epoch in range(3):
            last = {"test_accuracy": 0.5, "test_f1": 0.5} if epoch == 2 else {}
            if trial.seed:
                last.pop("test_f1", None)
            trial.report(epoch=epoch, val_accuracy=0.5 - epoch / 10, **last)

    results = compare(testing, ["none", "early"], range(2), tmp_path / "a")
    assert [m.key for m in metrics_of(results).judged] == ["test_accuracy"]
    assert unused(results) == ["test_f1 is not in every run, so it is not compared."]

    def validating(trial):
        trial.report(epoch=0, val_accuracy=0.5)

    (sentence,) = unused(compare(validating, ["none"], [0], tmp_path / "b"))
    assert "what is judged is validation" in sentence
