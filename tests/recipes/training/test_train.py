import json

import pytest
import torch
from torch import nn

from gradmask.errors import DataError, OptionError
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.batches import Batches
from gradmask.recipes.data.images import load_images
from gradmask.recipes.data.transforms import channel_statistics, normalize
from gradmask.recipes.training import components
from gradmask.recipes.training.components import resolve_device
from gradmask.recipes.training.evaluation import evaluate
from gradmask.recipes.training.run import train_run
from gradmask.seeding import derive_seed, seeded_generator

CLOCKS = ("seconds", "refresh_seconds", "evaluation_seconds")


def run(directory, options, arm="fisher", seed=0, **changes):
    config = Comparison(**(options | changes))
    return train_run(config, load_images(config, seed), arm, seed, directory)


def measured(result):
    """The epochs without the times they took."""
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in result["epochs"]]


@pytest.mark.parametrize("arm", ["none", "fisher", "random", "random_matched", "inverse"])
def test_a_seed_fixes_the_run(arm, options, tmp_path):
    first = run(tmp_path / "1", options, arm)
    torch.rand(7)  # the caller's random state has no part in it
    assert measured(run(tmp_path / "2", options, arm)) == measured(first)
    assert measured(run(tmp_path / "3", options, arm, seed=1)) != measured(first)


def test_arms_of_a_seed_differ_by_the_mask_alone(options, tmp_path):
    arms = ("none", "fisher", "random", "random_matched", "inverse")
    results = {arm: run(tmp_path / arm, options, arm)["epochs"] for arm in arms}
    for arm in arms:  # the first epoch is unmasked, and the same for all
        assert results[arm][0]["train_loss"] == results["none"][0]["train_loss"]
        assert results[arm][0]["test_loss"] == results["none"][0]["test_loss"]
        assert results[arm][0]["kept"] == 1.0
    assert len({results[arm][2]["train_loss"] for arm in arms}) == len(arms)


@pytest.mark.parametrize("scope", ["gradient", "update"])
def test_a_mask_that_keeps_everything_is_no_mask(scope, options, tmp_path):
    kept = run(tmp_path / "1", options, "fisher", keep=1.0, scope=scope)["epochs"]
    free = run(tmp_path / "2", options, "none")["epochs"]
    assert [row["test_loss"] for row in kept] == [row["test_loss"] for row in free]


def test_shares_kept_are_those_of_the_epoch(options, tmp_path):
    for arm in ("fisher", "random", "random_matched", "inverse"):
        rows = run(tmp_path / arm, options, arm, keep=0.3)["epochs"]
        assert rows[0]["kept"] == 1.0
        assert [row["kept"] for row in rows[1:]] == pytest.approx([0.3, 0.3], abs=0.01)
        assert all(len(row["kept_per_parameter"]) == 6 for row in rows)
        assert ["refresh_seconds" in row for row in rows] == [True, True, False]


def test_measurements_are_written_as_it_goes(options, tmp_path):
    (tmp_path / "events.out.tfevents.1.stale").write_text("of an interrupted run")
    seen = []
    config = Comparison(**options)

    def look(row):
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        seen.append([json.loads(line) for line in lines])
        assert seen[-1][-1] == row

    result = train_run(config, load_images(config, 0), "fisher", 0, tmp_path, look)
    assert [len(lines) for lines in seen] == [1, 2, 3]
    assert seen[-1] == result["epochs"]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_wrong_labels_are_learnt_by_heart(options, tmp_path):
    rows = run(tmp_path / "1", options, "none", epochs=60, width=64)["epochs"]
    assert rows[0]["memorised"] < 0.3
    assert rows[-1]["memorised"] > 0.8
    assert "memorised" not in run(tmp_path / "2", options, "none", label_noise=0.0)["epochs"][0]


def test_training_is_a_plain_loop(options, tmp_path, monkeypatch):
    """One epoch written out: training mode, uneven batches, the mean over images."""
    layers = lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(0.5))  # noqa: E731
    monkeypatch.setattr(components, "build_model", layers)
    changes = {"epochs": 2, "optimizer": "sgd", "schedule": "constant", "batch_size": 100}
    config = Comparison(**(options | changes))
    data = load_images(config, 0)
    rows = train_run(config, data, "none", 0, tmp_path)["epochs"]
    model = components.new_model(config, data, 0)
    optimizer, _ = components.new_optimizer(config, model, 4)
    mean, std = channel_statistics(data.train_images)
    order = seeded_generator(0, "order")
    torch.manual_seed(derive_seed(0, "dropout"))
    for row in rows:
        indices, total = torch.randperm(135, generator=order), 0.0
        model.train()
        for batch in (indices[:68], indices[68:]):
            logits = model(normalize(data.train_images[batch], mean, std))
            losses = nn.functional.cross_entropy(logits, data.train_labels[batch], reduction="none")
            total += losses.sum().item()
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
        assert row["train_loss"] == pytest.approx(total / 135, rel=1e-5)
        model.eval()
        logits = model(normalize(data.test_images, mean, std))
        expected = nn.functional.cross_entropy(logits, data.test_labels).item()
        assert row["test_loss"] == pytest.approx(expected, rel=1e-5)


def test_augmentation_is_fixed_by_the_seed(options, tmp_path):
    runs = [run(tmp_path / str(i), options, "none", augment=True) for i in range(2)]
    assert measured(runs[0]) == measured(runs[1])
    assert measured(runs[0]) != measured(run(tmp_path / "2", options, "none"))


def test_divergence_is_named(options, tmp_path):
    with pytest.raises(DataError, match=r"arm 'none', seed 0 is (nan|inf).*lower lr"):
        run(tmp_path, options, "none", lr=1e30, schedule="constant")
    assert (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_optimizers_and_schedules(optimizer, schedule, options, tmp_path):
    changes = {"optimizer": optimizer, "schedule": schedule, "lr": 0.01, "batch_size": 67}
    rows = run(tmp_path, options, **changes)["epochs"]  # 135 images: 3 steps of 45
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    rates = [row["lr"] for row in rows]
    if schedule == "constant":
        assert rates == [0.01] * 3
    if schedule == "cosine":
        assert rates == pytest.approx([0.01, 0.0075, 0.0025])


def test_evaluation_weighs_every_image_alike():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.Dropout(0.5))
    images = torch.randint(0, 256, (7, 1, 2, 2), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    batches = Batches(images, labels, lambda x: x.float() / 255, size=3)
    assert [len(y) for _, y in batches] == [3, 3, 1]
    found = evaluate(model, batches, 3)
    logits = model(images.float() / 255)
    assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    right = (logits.argmax(1) == labels).float()
    assert found.accuracy == pytest.approx(right.mean().item())
    each = [right[labels == label].mean().item() for label in range(3)]
    assert found.per_class == pytest.approx(each)


def test_device():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cqu", "cuda:99"):
        with pytest.raises(OptionError, match="device="):
            resolve_device(name)


def test_a_monitor_follows_a_run_and_changes_nothing(options, tmp_path):
    small = {"monitor_sources": 6, "monitor_probe": 8, "monitor": ("quadratic", "kl")}
    plain = run(tmp_path / "1", options)
    found = run(tmp_path / "2", options, **small)
    assert measured(found) == measured(plain)
    assert "influence" not in plain
    assert [record["epoch"] for record in found["influence"]] == [0, 1, 2, 3]
    often = run(tmp_path / "3", options, **small, monitor_every=3)["influence"]
    assert [record["step"] for record in often] == [0, 3, 6, 9, 12, 15]
    assert often[-1]["epoch"] == 3
    assert often[-1]["influence/kl/mean"] == found["influence"][-1]["influence/kl/mean"]
    lines = [json.loads(line) for line in (tmp_path / "3" / "metrics.jsonl").open()]
    assert [line for line in lines if "influence/kl/mean" in line] == often
    assert len(lines) == len(often) + 3
