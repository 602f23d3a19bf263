import contextlib
import json
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import training_functions
import yaml
from training_functions import EPOCHS, diverge, own_arm, report_nothing, train

from gradmask.errors import GradmaskWarning, OptionError, StateError, TrialError
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ["none", "fischer"]}, "Unknown arm 'fischer'. Did you mean 'fisher'"),
        ({"arms": ["fisher:kep=0.5"]}, "Did you mean 'keep'"),
        ({"arms": ["fisher:keep=2"]}, r"keep=2.0 must be in \(0, 1\]"),
        ({"arms": ["slow:scope=update"]}, "scope has no meaning for slow training"),
        ({"arms": ["fixed"]}, "needs the file of the mask"),
        ({"arms": ["none", "none"]}, "different values"),
        ({"seeds": []}, "one or more different values"),
        ({"jobs": 0}, "jobs=0 must be at least 1"),
        ({"judge": ["elegance"]}, "Whether more of 'elegance' is better"),
        ({"judge": ["test_accuracy@first"]}, "Unknown epoch"),
        ({"metrics": {"elegance": "up"}}, "Unknown direction"),
        ({"sweep": {"lr": 0.1}}, "must be a list of values"),
        ({"sweep": {"lr": []}}, "one or more different values"),
        ({"keeps": 3}, "keeps"),
        ({"train": "no.such:thing"}, "cannot be imported"),
        ({"train": "training_functions:nothing"}, "cannot be imported"),
        ({"train": "training_functions"}, "must be written module:function"),
        ({"train": "training_functions:EPOCHS"}, "is no function"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(options, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        compare(**{"train": train, "arms": ["none"], "output": tmp_path / "out"} | options)
    assert not (tmp_path / "out").exists()


def test_options_that_nobody_reads_are_named(tmp_path):
    with pytest.raises(OptionError, match=r"'wd' of the run no mask, wd 0.1, seed 0 was never"):
        compare(train, ["none:wd=0.1"], [0], tmp_path / "arm")
    with pytest.raises(OptionError, match="'wd' of the run"):
        compare(train, ["none"], [0], tmp_path / "sweep", sweep={"wd": [0.1]})


def test_metrics_that_nobody_reports_are_named_after_the_first_run(tmp_path):
    with pytest.raises(OptionError, match=r"'val_f1' is not among .*: kept, test_accuracy, test"):
        compare(train, ["none"], [0], tmp_path, choose="val_f1", threads=1)


def test_reporting_nothing_and_nonsense(tmp_path):
    with pytest.raises(OptionError, match="reported nothing: call"):
        compare(report_nothing, ["none"], [0], tmp_path)
    trial = Trial(Spec("none", 0), tmp_path)
    trial.report(epoch=1, val_accuracy=np.float32(0.5), test_loss=torch.tensor(1))
    assert trial.rows == [{"epoch": 1, "val_accuracy": 0.5, "test_loss": 1.0}]
    for row, message in (
        ({"epoch": 1}, "epoch 1 was reported before"),
        ({"epoch": -1}, "number from 0"),
        ({"epoch": math.nan}, "number from 0"),
        ({"epoch": 2, "name": "x"}, "name='x'"),
        ({"epoch": 2, "vector": torch.ones(2)}, "give a number"),
    ):
        with pytest.raises(OptionError, match=message):
            trial.report(**row)


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


def test_saving_before_the_report_is_noticed(tmp_path):
    trial, model = Trial(Spec("none", 0), tmp_path), torch.nn.Linear(1, 1)
    with pytest.warns(GradmaskWarning, match="Save after the report"):
        trial.save(model=model)
    trial.save(model=model, epoch=0)
    trial.report(epoch=0, val_loss=1.0)
    trial.save(model=model)
    with pytest.warns(GradmaskWarning, match="would train what is saved here twice"):
        trial.save(model=model)


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


def test_an_arm_without_effect_is_an_error(tmp_path):
    def forgetting(trial):
        trial.report(epoch=0, val_accuracy=0.5)

    def never_refreshing(trial):
        model = torch.nn.Linear(2, 2)
        trial.mask(model, torch.optim.SGD(model.parameters(), 0.1))
        trial.report(epoch=0, val_accuracy=0.5)

    for function, arm, message in (
        (forgetting, "slow", "never asked for the arm's mask"),
        (never_refreshing, "fisher", "the mask was never made"),
        (never_refreshing, "slow_matched", "the mask was never made"),
    ):
        with pytest.raises(OptionError, match=message):
            compare(function, ["none", arm], [0], tmp_path / f"{function.__name__}-{arm}")
    with pytest.raises(OptionError, match="'sam' is one of `gradmask run`"):
        compare(train, ["none", "sam"], [0], tmp_path / "sam")


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


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(0)])
def test_a_run_that_fails_is_named_and_the_others_are_kept(error, tmp_path):
    def failing(trial):
        if trial.seed == 1 and error is not None:
            raise error
        trial.report(epoch=0, val_accuracy=0.5)

    arms = ["none", "early"]
    with pytest.raises(TrialError, match="2 of 6 runs failed") as found:
        compare(failing, arms, range(3), tmp_path)
    assert f"no mask, seed 1: {type(error).__name__}: {error}" in str(found.value)
    assert "early stopping, seed 1: its run without a mask failed" in str(found.value)
    assert sorted(run["seed"] for run in read_results(tmp_path)["runs"]) == [0, 0, 2, 2]
    assert "raise error" in (tmp_path / "runs" / "none-seed1" / "error.txt").read_text()
    error = None
    assert len(compare(failing, arms, range(3), tmp_path)["runs"]) == 6
    assert not list(tmp_path.rglob("error.txt"))


def test_numbers_that_would_ruin_a_folder(tmp_path):
    trial = Trial(Spec("none", 0), tmp_path)
    with pytest.raises(OptionError, match="another name"):
        trial.report(epoch=0, weights=0.5)
    with pytest.raises(OptionError, match="too large"):
        trial.report(epoch=0, number=10**400)
    for value in (np.float64(1), {"a": [np.zeros(2)]}, tmp_path):
        with pytest.raises(OptionError, match=r"trial.save.*cannot be kept, as no pickle"):
            trial.save(value=value)
    trial.report(epoch=0, test_ppl=math.inf, val_loss=1.0)
    trial.save(count=3)
    again = Trial(Spec("none", 0), tmp_path)
    assert again.resume() == 1
    assert again.saved == {"count": 3}
    with pytest.raises(StateError, match="holds no 'mask'"):
        Trial(Spec("none", 0), tmp_path).resume(mask=torch.nn.Linear(1, 1))

    def overflowing(trial):
        ppl = math.inf if trial.seed == 1 else 2.0
        trial.report(epoch=0, val_loss=1.0, test_ppl=ppl)

    assert len(compare(overflowing, ["none"], range(3), tmp_path / "ppl")["runs"]) == 3


def test_a_loss_that_is_not_finite_cannot_be_passed_over(tmp_path):
    def careless(trial):
        for epoch in range(3):
            with contextlib.suppress(Exception):
                trial.report(epoch=epoch, val_loss=math.nan if epoch == 1 else 1.0)

    (run,) = compare(careless, ["none"], [0], tmp_path)["runs"]
    assert run["diverged"]["epoch"] == 1


def test_code_that_changed_is_noticed_each_time(tmp_path):
    def weighted(trial, w):
        trial.report(epoch=0, val_loss=float(w))

    compare(partial(weighted, w=1), ["none"], [0], tmp_path)
    for seeds in (2, 3):
        with pytest.warns(GradmaskWarning, match="its arguments have changed"):
            compare(partial(weighted, w=2), ["none"], range(seeds), tmp_path)


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
