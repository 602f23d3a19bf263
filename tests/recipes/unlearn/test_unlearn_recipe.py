"""The recipe `unlearn`, on digits."""

from io import StringIO

import pytest
import torch
from rich.console import Console

from gradmask.errors import GradmaskError, OptionError
from gradmask.recipes.catalogue import find_recipe
from gradmask.recipes.data.images import load_images
from gradmask.recipes.unlearn.config import ARMS, METHODS, Unlearning
from gradmask.recipes.unlearn.run import _forgotten, _parts, run_unlearning
from gradmask.study.arms import parse_arm
from gradmask.study.progress import Progress

SMALL = {"data": "digits", "model": "small_cnn", "width": 8, "train_size": 300, "epochs": 8}
SMALL |= {"forget_count": 20, "more_epochs": 1, "threads": 1}


def run(folder, **options):
    config = Unlearning(**{**SMALL, "output": folder, **options})
    return run_unlearning(config, Progress(Console(file=StringIO())))


def last(results, arm, level=1):
    (row,) = (r for r in results["runs"] if r["arm"] == arm and r["values"] == {"level": level})
    return row["epochs"][-1]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    arms = (*(f"none:method={m}" for m in METHODS), ARMS[-1], ARMS[5])
    folder = tmp_path_factory.mktemp("unlearn") / "out"
    return run(folder, arms=arms, seeds=(0,), levels=(1, 4)), folder


def test_methods_and_what_is_measured(results):
    found, folder = results
    original = last(found, "none:method=original")
    assert original["test_gap"] > last(found, "none:method=retrain")["test_gap"]
    assert last(found, "none:method=retrain")["forget_accuracy"] == 0  # of a class never seen
    same = last(found, "none:method=original", 4)
    assert same["test_gap"] == original["test_gap"]  # which has no levels
    for row in (r["epochs"][-1] for r in found["runs"]):
        for name in ("forget_accuracy", "retain_accuracy", "test_accuracy", "membership_auroc"):
            assert 0 <= row[name] <= 1
        assert 0 <= row["test_gap"] <= 1
    relabelled = last(found, "none:method=relabel", 4)
    assert relabelled["forget_accuracy"] < original["forget_accuracy"]
    assert {p.name for p in (folder / "networks").glob("*.pt")} == {
        *("reference-seed0.pt", "original-seed0.pt", "retrained-seed0.pt")
    }


def test_gap_is_the_mean_distance_from_the_reference(results):
    found, _ = results
    names = ("forget_accuracy", "retain_accuracy", "test_accuracy", "membership_auroc")
    # Two arms' gaps bound how far they are from each other.
    first, second = last(found, "none:method=original"), last(found, "none:method=finetune", 4)
    between = sum(abs(first[n] - second[n]) for n in names) / 4
    assert abs(first["test_gap"] - second["test_gap"]) <= between + 1e-9
    assert between <= first["test_gap"] + second["test_gap"] + 1e-9


@pytest.mark.parametrize("forget", ["class", "random"])
def test_parts_are_apart(forget):
    config = Unlearning(**SMALL, forget=forget)
    data = load_images(config.training(), 3)
    forgotten = _forgotten(config, data, 3)
    parts = _parts(data, forgotten, config)
    assert len(parts.forget.labels) + len(parts.retain.labels) == len(data.train_labels)
    if forget == "random":
        assert len(parts.forget.labels) == 20
        assert len(parts.unseen.labels) == len(parts.test.labels) == len(data.test_labels)
        return
    (gone,) = parts.forget.labels.unique().tolist()
    assert gone not in [*parts.retain.labels, *parts.test.labels, *parts.val.labels]
    assert set(parts.unseen.labels.tolist()) == {gone}
    assert len(parts.unseen.labels) + len(parts.test.labels) == len(data.test_labels)
    assert not torch.equal(forgotten, _forgotten(config, data, 4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"forget": "all"}, "forget"),
        ({"forget_count": 0}, "forget_count"),
        ({"more_epochs": 0}, "more_epochs"),
        ({"levels": (5,)}, "levels"),
        ({"model": "resnet"}, "resnet"),
        ({"epochs": 0}, "epochs"),
        ({"device": "nowhere"}, "device"),
        ({"arms": ("none", "none:method=forget")}, "method of arm"),
        ({"arms": ("fisher:keep=0.5:method=dampen",)}, "nothing is masked"),
        ({"arms": ("slow:keep=0.5:method=retrain",)}, "nothing is masked"),
        ({"arms": ("none:methods=relabel",)}, "'methods' has no meaning"),
        ({"arms": ("mymodule:train",)}, "is a function"),
    ],
)
def test_options_that_cannot_work(options, words, tmp_path):
    with pytest.raises(OptionError, match=words):
        run(tmp_path / "out", **{"arms": ("none",), "seeds": (0,), **options})
    assert not (tmp_path / "out").exists()


def test_more_images_than_there_are(tmp_path):
    with pytest.raises(OptionError, match="forget_count=1000"):
        run(tmp_path / "out", forget="random", forget_count=1000, seeds=(0,))
    assert not (tmp_path / "out").exists()


def test_a_network_that_diverges_in_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("gradmask.recipes.unlearn.run.RATES", (1e20,) * 4)
    arms = ("none:method=original", "none:method=finetune")
    found = run(tmp_path / "out", arms=arms, seeds=(0,), levels=(1,))["runs"]
    assert [r["arm"] for r in found if "diverged" in r] == ["none:method=finetune"]


def test_a_damaged_network_is_told_with_its_mend(tmp_path):
    options = {"arms": ("none:method=original",), "seeds": (0,)}
    run(tmp_path / "out", **options, levels=(1,))
    path = tmp_path / "out/networks/original-seed0.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(GradmaskError, match=r"original-seed0.pt is damaged .* delete it"):
        run(tmp_path / "out", **options, levels=(1, 2))
    path.unlink()
    assert len(run(tmp_path / "out", **options, levels=(1, 2))["runs"]) == 2


def test_every_mask_has_its_controls():
    arms = [parse_arm(arm) for arm in ARMS]
    saliency = next(a for a in arms if a.own.get("score") == "saliency" and a.is_method)
    controls = {a.strategy for a in arms if a.is_control_of(saliency)}
    assert controls == {"none", "random", "random_matched", "slow"}
    assert find_recipe("unlearn").config("small").arms == ARMS
