"""What a study refuses or warns of, and what it keeps then."""

import contextlib
import math
from functools import partial

import numpy as np
import pytest
import torch
from training_functions import report_nothing, train

from gradmask.errors import GradmaskWarning, OptionError, StateError, TrialError
from gradmask.study import Trial, compare
from gradmask.study.folder import read_results
from gradmask.study.spec import Spec


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


def test_saving_before_the_report_is_noticed(tmp_path):
    trial, model = Trial(Spec("none", 0), tmp_path), torch.nn.Linear(1, 1)
    with pytest.warns(GradmaskWarning, match="Save after the report"):
        trial.save(model=model)
    trial.save(model=model, epoch=0)
    trial.report(epoch=0, val_loss=1.0)
    trial.save(model=model)
    with pytest.warns(GradmaskWarning, match="would train what is saved here twice"):
        trial.save(model=model)


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
