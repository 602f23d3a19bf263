import math
from statistics import mean

import pytest
from made_up import made_up
from scipy import stats

from gradmask.errors import OptionError
from gradmask.study.metrics import check_metrics, chosen_epoch, direction, metrics_of
from gradmask.study.statistics import (
    Difference,
    available,
    best_runs,
    compare_arms,
    corrected,
    paired_difference,
    summarise,
    summary_table,
    values,
)
from gradmask.study.verdicts import conclusions, correction, unasked, verdicts


def row(accuracy, loss=1.0, val=None, train_loss=0.5, **more):
    val = accuracy if val is None else val
    measured = {"test_accuracy": accuracy, "test_loss": loss, "train_loss": train_loss}
    return {"epoch": 1, "val_accuracy": val, "val_loss": loss, **measured, **more}


def results(**arms):
    """`arm=[(accuracy, loss) of seed 0, 1, ...]`."""
    runs = [
        {"arm": arm, "seed": seed, "epochs": [row(accuracy, loss)]}
        for arm, pairs in arms.items()
        for seed, (accuracy, loss) in enumerate(pairs)
    ]
    return {"runs": runs, "config": {"arms": list(arms), "seeds": [0, 1, 2]}}


def test_mean_and_standard_deviation():
    summary = summarise([1.0, 2.0, 6.0])
    assert (summary.mean, summary.n) == (3.0, 3)
    assert summary.std == pytest.approx(math.sqrt(7))
    assert summarise([2.0]).std is None


def test_paired_difference_is_the_t_interval():
    ours, theirs = [3.1, 2.0, 4.5, 3.3], [1.0, 1.5, 2.0, 2.5]
    found = paired_difference(dict(enumerate(ours)), dict(enumerate(theirs)))
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.mean == pytest.approx(sum(ours) / 4 - sum(theirs) / 4)
    assert found.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert found.shown == (found.p < 0.05)


def test_pairs_are_by_seed():
    found = paired_difference({0: 1.0, 1: 5.0, 2: 9.0}, {2: 8.0, 0: 1.0, 7: 3.0})
    assert (found.mean, found.n) == (0.5, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    alone = paired_difference({0: 1.0}, {0: 3.0})
    assert (alone.mean, alone.low, alone.shown) == (-2.0, None, False)


def test_correction_is_holms():
    ps = [0.01, 0.04, 0.03, 0.005, None]
    found = corrected([Difference(1.0, 0.5, 1.5, 4, p) for p in ps])
    # The example of R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm").
    assert [d.corrected for d in found[:4]] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert found[4].corrected is None
    assert [d.shown for d in found] == [True, False, False, True, True]


def test_least_effect_is_found_in_four_of_five_studies():
    """Against simulation: n pairs of that true effect, tested at the corrected level."""
    spread, n, tests = 2.0, 6, 4
    half = float(stats.t.ppf(0.975, n - 1)) * spread / math.sqrt(n)
    first, *_ = corrected([Difference(0.0, -half, half, n, 0.5)] * tests)
    draws = stats.norm.rvs(first.detectable, spread, size=(4000, n), random_state=0)
    power = (stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05 / tests).mean()
    assert 0.75 < power < 0.85


def test_epoch_is_chosen_without_the_test_set():
    rows = [
        row(0.9, val=0.5) | {"epoch": 1},
        row(0.1, val=0.7, loss=2.0) | {"epoch": 2},
        row(0.2, val=0.7, loss=1.0) | {"epoch": 3},
        row(0.3, val=0.7, loss=1.0) | {"epoch": 4},
    ]
    found = {"runs": [{"arm": "none", "seed": 0, "epochs": rows}], "config": {}}
    metrics = metrics_of(found)
    assert chosen_epoch(rows, metrics.chooser)["epoch"] == 3
    by_name = {metric.name: metric for metric in metrics.shown}
    assert by_name["test_accuracy@chosen"].of(rows) == 0.2
    assert by_name["test_accuracy@best"].of(rows) == 0.9
    assert by_name["test_accuracy@last"].of(rows) == 0.3
    rows[0]["test_accuracy"] = math.nan
    assert by_name["test_accuracy@best"].of(rows) == 0.3


def test_metrics_that_are_measured_now_and_then():
    found = made_up(every=3, epochs=8)
    rows = found["runs"][0]["epochs"]
    assert [r["epoch"] for r in rows if "test_accuracy" in r] == [0, 3, 6, 7]
    by_name = {metric.name: metric for metric in metrics_of(found).shown}
    chosen = by_name["test_accuracy@chosen"].of(rows)
    measured = [r for r in rows if "test_accuracy" in r]
    assert chosen == max(measured, key=lambda r: r["val_accuracy"])["test_accuracy"]
    assert by_name["test_accuracy@last"].of(rows) == rows[7]["test_accuracy"]


@pytest.mark.parametrize(
    ("name", "higher"),
    [("test_bleu", True), ("val.loss", False), ("TopAcc", None), ("new_error", False)],
)
def test_direction_of_a_metric(name, higher):
    assert direction(name) is higher
    assert direction(name, {name: "higher"}) is True


def test_metrics_that_are_judged_by_name():
    found = made_up(judge=["test_loss", "test_accuracy@best"])
    assert [m.name for m in metrics_of(found).judged] == ["test_loss@chosen", "test_accuracy@best"]
    assert [m.name for m in metrics_of(made_up()).judged] == [
        "test_accuracy@chosen",
        "test_loss@last",
    ]
    with pytest.raises(OptionError, match="Whether more of 'speed' is better"):
        check_metrics(None, ["speed@last"], {})


def test_only_what_every_run_has():
    plain = results(none=[(0.5, 1.0), (0.6, 1.0)])
    plain["runs"][0]["epochs"][0]["memorised"] = 0.25
    assert "memorised" not in [metric.key for metric in available(plain)]
    plain["runs"][1]["epochs"][0]["memorised"] = 0.75
    assert summary_table(plain)["none"]["memorised@last"]["mean"] == 0.5
    assert metrics_of({"runs": [], "config": {}}).shown == ()


def test_a_sweep_is_judged_at_values_that_other_seeds_chose():
    found = made_up(arms=("none",), seeds=3, sweep=(0.001, 0.01, 0.1))
    scores = {(0, 0.1): 0.9, (1, 0.01): 0.6, (2, 0.01): 0.6}  # by seed and value; others 0.5
    for run in found["runs"]:
        for one in run["epochs"]:
            one["val_accuracy"] = scores.get((run["seed"], run["values"]["lr"]), 0.5)
    chosen = {seed: run["values"]["lr"] for seed, run in best_runs(found, "none").items()}
    # By the mean of all seeds 0.1 would be chosen, which only seed 0 is for.
    assert chosen == {0: 0.01, 1: 0.1, 2: 0.1}
    metric = next(m for m in metrics_of(found).shown if m.name == "test_loss@last")
    run = next(r for r in found["runs"] if r["seed"] == 0 and r["values"]["lr"] == 0.01)
    assert values(found, "none", metric)[0] == run["epochs"][-1]["test_loss"]


def test_a_run_that_diverged_chooses_nothing():
    found = made_up(arms=("none",), seeds=3, sweep=(0.01, 0.1))
    for run in found["runs"]:
        if run["values"]["lr"] == 0.01:
            run["epochs"][-1]["train_loss"] = math.nan
    assert {run["values"]["lr"] for run in best_runs(found, "none").values()} == {0.1}


BASE = [(0.50, 1.00), (0.52, 1.02), (0.48, 0.98)]


def shifted(accuracy, loss, spread=0.001):
    """Better or worse than BASE by nearly the same in each seed."""
    wiggle = (0.0, spread, -spread)
    return [(a + accuracy + w, b + loss + w) for (a, b), w in zip(BASE, wiggle, strict=True)]


@pytest.mark.parametrize(
    ("arms", "conclusion"),
    [
        ({"fisher": shifted(0, 0)}, "not shown to change test accuracy"),
        ({"fisher": shifted(0.1, -0.1)}, "improves test accuracy over no mask; no control"),
        ({"fisher": shifted(-0.1, 0.1)}, "makes test accuracy worse than no mask does"),
        (
            {"fisher": shifted(0.1, -0.1), "random": BASE, "inverse": BASE},
            "improves test loss over no mask and over every control",
        ),
        (
            {"fisher": shifted(0.1, -0.1), "random": shifted(0.1, -0.1), "inverse": BASE},
            "not shown to do better than the random mask",
        ),
        (
            {"fisher": shifted(0.1, -0.1), "inverse": shifted(0.2, -0.2, 0.002)},
            "improves test loss over no mask, but less than the inverse mask",
        ),
        (
            {"fisher": shifted(0.1, -0.1), "slow": shifted(0.2, -0.2, 0.002)},
            "improves test accuracy over no mask, but less than slow training",
        ),
    ],
)
def test_conclusion(arms, conclusion):
    assert conclusion in conclusions(results(none=BASE, **arms))[-1]


@pytest.mark.parametrize(
    ("control", "conclusion"),
    [
        (shifted(0, 0, 0.002), "in test accuracy it is better than the random mask"),
        (
            shifted(0.1, -0.1, 0.002),
            "in test accuracy it is not shown to do better than the random mask",
        ),
        (shifted(0.2, -0.2, 0.002), "in test accuracy it is worse than the random mask"),
    ],
)
def test_conclusion_without_an_arm_without_a_mask(control, conclusion):
    assert conclusion in conclusions(results(fisher=shifted(0.1, -0.1), random=control))[0]


def test_answers_say_which_way():
    accuracy, loss = verdicts(results(none=BASE, fisher=shifted(0.1, 0.1)))
    assert (accuracy.question, accuracy.answer) == ("better than no mask?", "yes")
    assert (loss.question, loss.answer) == ("better than no mask?", "no, worse")
    assert accuracy.difference.mean == pytest.approx(0.1)


def test_every_kind_of_control_answers_its_question():
    found = verdicts(made_up())
    asked = list(dict.fromkeys(v.question for v in found))
    assert asked == [
        "better than no mask?",
        "better than training as slow?",
        "better than a random mask of the same size in every tensor?",
        "better than stopping early?",
    ]
    assert unasked(made_up()) == []
    assert unasked(made_up(arms=("none", "fisher"))) == [
        "better than training as slow?",
        "better than a random mask of the same size?",
        "better than stopping early?",
    ]


def test_nothing_is_shown_by_one_seed_or_one_arm():
    one = results(none=BASE[:1], fisher=[(0.9, 0.1)])
    assert verdicts(one)[0].answer == "not shown: one seed"
    assert "not shown to change test accuracy" in conclusions(one)[-1]
    assert "Nothing to conclude" in conclusions(results(none=BASE))[0]
    metric = available(results(none=BASE))[0]
    assert compare_arms(results(none=BASE), "fisher", "none", metric) is None


def test_other_seeds_are_not_compared_and_cost_the_others_nothing():
    both = results(none=BASE, fisher=shifted(0.1, 0.1), random=BASE[:2])
    against = {v.control: v for v in verdicts(both) if v.metric.key == "test_accuracy"}
    assert against["random"].answer == "not compared: not the same seeds"
    assert against["random"].missing == (2,)
    alone = verdicts(results(none=BASE, fisher=shifted(0.1, 0.1)))[0]
    assert against["none"].difference == alone.difference
    assert "all 2 comparisons" in correction(both)


def test_every_fisher_mask_has_its_own_conclusion():
    arms = {
        "fisher:keep=0.7": shifted(0.1, -0.1),
        "fisher:keep=0.2": shifted(-0.1, 0.1),
        "random:keep=0.2": BASE,
    }
    found = results(none=BASE, **arms)
    assert len(verdicts(found)) == 2 * (1 + 2)
    first, second = conclusions(found)
    assert first.startswith("Conclusion on the Fisher mask, keep 0.7 in this run: it improves")
    assert second.startswith("Conclusion on the Fisher mask, keep 0.2 in this run: it makes")


def test_table_of_means():
    found = made_up(seeds=3)
    summary = summary_table(found)["fisher:keep=0.25"]["test_loss@last"]
    last = [r["epochs"][-1]["test_loss"] for r in found["runs"] if r["arm"] == "fisher:keep=0.25"]
    assert summary["mean"] == pytest.approx(mean(last))
    assert summary["n"] == 3
