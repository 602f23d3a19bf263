import math

import pytest
from scipy import stats

from gradmask.study.statistics import (
    METRICS,
    available,
    chosen_epoch,
    compare_arms,
    paired_difference,
    summarise,
    summary_table,
    verdicts,
)


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
    return {"runs": runs}


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
    assert found.shown == (stats.ttest_rel(ours, theirs).pvalue < 0.05)


def test_pairs_are_by_seed():
    found = paired_difference({0: 1.0, 1: 5.0, 2: 9.0}, {2: 8.0, 0: 1.0, 7: 3.0})
    assert (found.mean, found.n) == (0.5, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    alone = paired_difference({0: 1.0}, {0: 3.0})
    assert (alone.mean, alone.low, alone.shown) == (-2.0, None, False)


def test_epoch_is_chosen_without_the_test_set():
    rows = [
        row(0.9, val=0.5) | {"epoch": 1},
        row(0.1, val=0.7, loss=2.0) | {"epoch": 2},
        row(0.2, val=0.7, loss=1.0) | {"epoch": 3},
        row(0.3, val=0.7, loss=1.0) | {"epoch": 4},
    ]
    assert chosen_epoch(rows)["epoch"] == 3
    metrics = {metric.name: metric for metric in METRICS}
    assert metrics["chosen_accuracy"].of(rows) == 0.2
    assert metrics["best_accuracy"].of(rows) == 0.9
    assert metrics["last_accuracy"].of(rows) == 0.3


def test_memorised_only_where_it_was_measured():
    plain = results(none=[(0.5, 1.0)])
    assert "memorised" not in [metric.name for metric in available(plain)]
    plain["runs"][0]["epochs"][0]["memorised"] = 0.25
    assert summary_table(plain)["none"]["memorised"]["mean"] == 0.25


BASE = [(0.50, 1.00), (0.52, 1.02), (0.48, 0.98)]


def shifted(accuracy, loss):
    """Better or worse than BASE by nearly the same in each seed."""
    wiggle = (0.0, 0.001, -0.001)
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
            {"fisher": shifted(0.1, -0.1), "inverse": shifted(0.2, -0.2)},
            "improves test loss over no mask, but less than the inverse mask",
        ),
    ],
)
def test_conclusion(arms, conclusion):
    assert conclusion in verdicts(results(none=BASE, **arms))[-1]


def test_sentences_say_which_way():
    sentences = verdicts(results(none=BASE, fisher=shifted(0.1, 0.1)))
    assert sentences[0].endswith("3 seeds): better.")
    assert "+10.0 points against no mask" in sentences[0]
    assert sentences[1].endswith("3 seeds): worse.")
    assert "+0.100 against no mask" in sentences[1]


def test_nothing_is_shown_by_one_seed_or_one_arm():
    one = verdicts(results(none=BASE[:1], fisher=[(0.9, 0.1)]))
    assert "from one seed" in one[0]
    assert "not shown to change test accuracy" in one[-1]
    assert "Nothing to conclude" in verdicts(results(none=BASE))[0]
    assert compare_arms(results(none=BASE), "fisher", "none", METRICS[0]) is None


def test_every_fisher_mask_has_its_own_conclusion():
    arms = {
        "fisher:keep=0.7": shifted(0.1, -0.1),
        "fisher:keep=0.2": shifted(-0.1, 0.1),
        "random:keep=0.2": BASE,
    }
    *sentences, conclusion = verdicts(results(none=BASE, **arms))
    assert len(sentences) == 2 * (1 + 2)
    first, second = conclusion.split("\n")
    assert first.startswith("Conclusion on the Fisher mask, keep 0.7 in this run: it improves")
    assert second.startswith("Conclusion on the Fisher mask, keep 0.2 in this run: it makes")
