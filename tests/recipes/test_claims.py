"""The paper's claims, on runs made up so that the answer is known."""

import csv
import io

import numpy as np
import pytest

from gradmask.recipes.claims import (
    FALLS,
    LOWER,
    LOWER_PER_NORM,
    LOWER_SUM,
    SLOWER_FALL,
    SLOWER_RISE,
    SMALLER_RISE,
    conclusion,
    decay,
    findings,
    overfitting_rise,
    overfitting_slope,
)
from gradmask.study.report.tables import to_csv

EPOCHS = 20
WIGGLE = (0.0, 0.02, -0.02)  # seeds differ a little, or there would be no interval


def run(arm, seed, rate, *, level=1.0, rise=0.1, norm_rate=0.0):
    """Influence rises to epoch 4 and falls by `rate` from there; test loss rises after epoch 6."""
    epochs = np.arange(EPOCHS + 1)
    wiggle = 1 + WIGGLE[seed]
    own = 1 + WIGGLE[seed] * (2 if "random" in arm else 1)  # or seeds differ by the same number
    influence = level * own * np.exp(-rate * wiggle * np.abs(epochs - 4))
    norms = wiggle * np.exp(-norm_rate * epochs)
    losses = [2 - 0.1 * e if e <= 6 else 1.4 + rise * wiggle * (e - 6) for e in epochs[1:]]
    records = [
        {
            "epoch": float(e),
            "influence/quadratic/mean": float(influence[e]),
            "influence/squared_norm/mean": float(norms[e]),
            "seconds": 1.0,
        }
        for e in epochs
    ]
    rows = [{"epoch": e, "test_loss": loss} for e, loss in enumerate(losses, start=1)]
    return {"arm": arm, "seed": seed, "epochs": rows, "influence": records}


def results(seeds=(0, 1, 2), **arms):
    runs = [run(arm, seed, **options) for arm, options in arms.items() for seed in seeds]
    return {"runs": runs, "config": {}}


def outcomes(found, claim):
    return [finding.outcome for finding in found if finding.claim == claim]


def test_slopes():
    losses = np.array([3.0, 2.0, 1.0, 1.5, 2.0, 2.5])
    assert overfitting_slope(losses) == pytest.approx(0.5)
    assert overfitting_rise(losses) == 1.5
    assert overfitting_rise(losses[:3]) == 0.0
    assert np.isnan(overfitting_slope(losses[:3]))
    assert np.isnan(overfitting_slope(losses[:4]))  # one point more is no trend
    epochs = np.array([0.0, 2.0, 4.0, 6.0])
    influence = np.array([100.0, 1.0, np.exp(-1), np.exp(-2)])
    assert decay(epochs, influence, 2.0) == pytest.approx(-0.5)
    assert decay(epochs, np.zeros(4), 0.0) == pytest.approx(0)  # underflow is no error


def test_influence_that_falls():
    found = findings(results(none={"rate": 0.3}))
    assert outcomes(found, FALLS) == [1]
    assert "highest at epoch 4, 3.32 times as high as at the start" in found[0].sentence
    # From 3 epochs before the peak to 16 after it.
    assert "against epoch 1, at the end it is 0.0202 times as high" in found[0].sentence
    rising = findings(results(none={"rate": -0.3}))
    assert outcomes(rising, FALLS) == [-1]
    flat = findings(results(none={"rate": 0.0}))
    assert outcomes(flat, FALLS) == [0]


@pytest.mark.parametrize(
    ("random", "lower", "per_norm"),
    [
        ({"rate": 0.3, "level": 0.5}, 1, 1),
        ({"rate": 0.3, "level": 2.0}, -1, -1),
        ({"rate": 0.3, "level": 0.5, "norm_rate": 0.3}, 1, -1),  # lower by its gradients only
    ],
)
def test_equation_8(random, lower, per_norm):
    arms = {"none": {"rate": 0.3}, "none:labels=random": random}
    found = findings(results(**arms))
    assert outcomes(found, LOWER) == [lower]
    assert outcomes(found, LOWER_SUM) == [lower]
    assert outcomes(found, LOWER_PER_NORM) == [per_norm]
    level = random["level"]
    sentence = next(f.sentence for f in found if f.claim == LOWER)
    assert f"its geometric mean over training is, against no mask, {level:.3g} times" in sentence


def test_a_high_peak_makes_the_arithmetic_mean():
    arms = {"none": {"rate": 0.1}, "none:labels=random": {"rate": 1.0, "level": 10.0}}
    found = findings(results(**arms))
    assert outcomes(found, LOWER) == [1]
    assert outcomes(found, LOWER_SUM) == [-1]


def test_figure_2():
    arms = {
        "none": {"rate": 0.3, "rise": 0.1},
        "fisher:keep=0.7": {"rate": 0.1, "rise": 0.02},
        "fisher:keep=0.2": {"rate": 0.6, "rise": 0.3},
        "random:keep=0.7": {"rate": 0.02, "rise": 0.01},
    }
    found = findings(results(**arms))
    assert outcomes(found, SLOWER_FALL) == [1, -1]
    assert outcomes(found, SLOWER_RISE) == outcomes(found, SMALLER_RISE) == [1, -1]
    control = [f for f in found if "random mask of the same size" in f.claim]
    assert [f.outcome for f in control] == [-1, -1, -1]
    sentence = next(f.sentence for f in found if f.claim == SLOWER_FALL)
    assert "from epoch 4 on its logarithm changes by -0.100 an epoch, with no mask" in sentence
    text = conclusion(found)
    assert (
        "Test loss rises more slowly with a Fisher mask than without (figure 2b): holds in 1, the "
        "opposite is shown in 1 of 2."
    ) in text
    assert "Influence is lower at the end of training" in text


def test_nothing_is_shown_by_one_seed_or_without_a_monitor():
    arms = {"none": {"rate": 0.3}, "fisher": {"rate": 0.1}}
    found = findings(results(seeds=(1,), **arms))
    assert {finding.outcome for finding in found} == {0}
    assert all("from one seed" in finding.sentence for finding in found)
    unmonitored = results(**arms)
    del unmonitored["runs"][0]["influence"]
    assert findings(unmonitored) == []


def test_noise_is_not_shown():
    found = findings(results(**{"none": {"rate": 0.3}, "fisher": {"rate": 0.3}}))
    assert outcomes(found, SLOWER_FALL) == [0]
    assert outcomes(found, SLOWER_RISE) == [0]


def test_csv_holds_every_number():
    made = results(none={"rate": 0.3}, fisher={"rate": 0.1})
    made["runs"][0]["epochs"][1]["kept_per_parameter"] = [0.1, 0.2]
    made["runs"][1]["epochs"][0]["memorised"] = 0.5
    tables = to_csv(made)
    rows = list(csv.DictReader(io.StringIO(tables["influence"])))
    assert len(rows) == 6 * (EPOCHS + 1)
    record = made["runs"][4]["influence"][3]
    row = rows[4 * (EPOCHS + 1) + 3]
    assert (row["arm"], row["seed"]) == ("fisher", "1")
    assert {name: float(row[name]) for name in record} == record
    epochs = list(csv.DictReader(io.StringIO(tables["epochs"])))
    assert len(epochs) == 6 * EPOCHS
    assert epochs[0]["memorised"] == ""
    assert epochs[EPOCHS]["memorised"] == "0.5"
    assert "kept_per_parameter" not in epochs[0]


def test_a_minimum_at_the_end_has_no_slope():
    made = results(**{"none": {"rate": 0.3}, "fisher": {"rate": 0.3, "rise": -0.1}})
    found = [f for f in findings(made) if f.claim == SLOWER_RISE]
    assert [f.outcome for f in found] == [0]
    assert found[0].sentence.endswith("a minimum is at the end.")
