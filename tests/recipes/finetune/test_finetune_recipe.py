"""The recipe `finetune`, on digits, and its fronts on made-up numbers."""

import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from gradmask.cli import main
from gradmask.errors import GradmaskError, OptionError, TrialError
from gradmask.recipes.catalogue import find_recipe
from gradmask.recipes.finetune.config import ARMS, FineTuning
from gradmask.recipes.finetune.fronts import SHARES, fronts, print_fronts
from gradmask.recipes.finetune.run import OWN, run_finetuning, with_lora
from gradmask.recipes.finetune.tasks import TwoHeads, load_tasks
from gradmask.study.arms import parse_arm
from gradmask.study.progress import Progress

SMALL = {"data": "digits", "model": "small_cnn", "width": 4, "old_classes": 6, "per_class": 4}
SMALL |= {"epochs": 3, "updates": 5, "old_samples": 60, "threads": 1}
OTHERS = ["frozen", "l2sp:penalty=1", "ewc:penalty=1", "old_lowest:keep=0.3"]
OTHERS += ["lowest_each_epoch:keep=0.3", "fisher:score=ratio:keep=0.3", "slow:keep=0.3"]


def run(folder, **options):
    config = FineTuning(**{**SMALL, "output": folder, **options})
    return run_finetuning(config, Progress(Console(file=StringIO())))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune") / "out"
    return run(folder, arms=("none", "probe", *OTHERS), seeds=(0, 1), rates=(0.001, 0.03))


def rows(results, arm):
    return [r["epochs"][-1] for r in results["runs"] if r["arm"] == arm]


def test_every_arm_is_measured_on_old_and_new_classes(results):
    assert {r["arm"] for r in results["runs"]} == {"none", "probe", *OTHERS}
    for run_ in results["runs"]:
        row = run_["epochs"][-1]
        for name in ("val_old", "val_new", "test_old", "test_new"):
            assert 0 <= row[f"{name}_accuracy"] <= 1
    assert all(row["test_kept"] == row["val_kept"] == 1 for row in rows(results, "probe"))
    probe = [row["test_new_accuracy"] for row in rows(results, "probe")]
    assert probe != [row["test_new_accuracy"] for row in rows(results, "none")]
    printed = StringIO()
    print_fronts(results, Console(file=printed, width=120))
    assert "probe" in printed.getvalue()
    assert "The best front is that of" in " ".join(printed.getvalue().split())


def test_a_report_has_the_fronts(results, tmp_path_factory, capsys):
    folder = next(tmp_path_factory.getbasetemp().glob("finetune*")) / "out"
    assert main(["report", str(folder)]) == 0
    assert "Fronts over learning rates" in capsys.readouterr().out
    figure = (folder / "figures" / "fronts.svg").read_text()
    assert all(front.name in figure for front in fronts(results)[0])


def test_network_of_another_study(results, tmp_path_factory, tmp_path):
    path = next(tmp_path_factory.getbasetemp().glob("finetune*")) / "out/networks/pretrained.pt"
    found = run(tmp_path / "out", pretrained=path, arms=("none",), seeds=(0,), rates=(0.03,))
    (expected,) = (
        r["epochs"]
        for r in results["runs"]
        if (r["arm"], r["seed"], r["values"]["lr"]) == ("none", 0, 0.03)
    )
    assert found["runs"][0]["epochs"] == expected
    assert not list((tmp_path / "out/networks").glob("pretrained*"))
    with pytest.raises(GradmaskError, match="of another network"):
        run(tmp_path / "other", pretrained=path, width=8, seeds=(0,))
    assert not (tmp_path / "other").exists()
    changed = tmp_path / "changed.pt"
    torch.save({k: v + 1 for k, v in torch.load(path).items()}, changed)
    with pytest.raises(GradmaskError, match="pretrained"):
        run(tmp_path / "out", pretrained=changed, arms=("none",), seeds=(0, 1), rates=(0.03,))


def test_a_network_that_diverges_before_the_runs(tmp_path):
    with pytest.raises(TrialError, match=r"network that runs begin with diverges.*lower lr"):
        run(tmp_path / "out", lr=1e6, arms=("none",), seeds=(1,), rates=(0.01,))


def test_old_and_new_classes_are_apart():
    tasks = load_tasks(FineTuning(**SMALL), 1)
    assert tasks.train.labels.bincount(minlength=10).tolist() == [0] * 6 + [4] * 4
    assert int(tasks.kept.labels.max()) < 6
    assert len(tasks.kept.labels) == 60
    for name, batches in tasks.parts.items():
        assert (batches.labels < 6).all() if name.endswith("old") else (batches.labels >= 6).all()
    again = load_tasks(FineTuning(**SMALL), 2)
    assert not torch.equal(again.train.images, tasks.train.images)
    assert torch.equal(again.parts["test_old"].images, tasks.parts["test_old"].images)


def test_loss_is_among_the_classes_of_a_samples_own_task():
    tasks = load_tasks(FineTuning(**SMALL), 0)
    logits = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 5, 6, 9, 2])
    expected = sum(
        F.cross_entropy(z[:6] if y < 6 else z[6:], y if y < 6 else y - 6)
        for z, y in zip(logits, targets, strict=True)
    )
    found = tasks.loss(logits, targets)
    torch.testing.assert_close(found, expected)
    (slopes,) = torch.autograd.grad(found, logits)
    assert not slopes[0, 6:].any()
    assert not slopes[2, :6].any()


def test_old_head_stays_as_it_was():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 6))
    x = torch.randn(2, 3)
    expected = network(x)
    model = TwoHeads(network, 2)
    assert torch.equal(model(x)[:, :6], expected)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        *("old.weight", "old.bias")
    }
    with pytest.raises(OptionError, match="linear layer"):
        TwoHeads(nn.Sequential(nn.Conv2d(1, 1, 1)), 2)


def test_lora_begins_as_the_network():
    pytest.importorskip("peft")
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 6))
    model, x = TwoHeads(network, 2).eval(), torch.randn(2, 1, 4, 4)
    expected = model(x)
    adapted = with_lora(model, 2)
    torch.testing.assert_close(adapted(x), expected)
    learning = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert all("lora" in name or ".new." in name for name in learning)
    assert any("lora" in name for name in learning)
    assert any(".new." in name for name in learning)


def made_up(points):
    """Results of arms with points (kept, new) by rate, the same for every seed but a shift."""
    runs = [
        {
            "arm": arm,
            "seed": seed,
            "values": {"lr": rate},
            "seconds": 1.0,
            "epochs": [
                {
                    "epoch": 1,
                    "val_kept": kept,
                    "test_kept": kept,
                    "val_new_accuracy": new,
                    "test_new_accuracy": new + seed / 100,
                }
            ],
        }
        for arm, found in points.items()
        for rate, (kept, new) in enumerate(found)
        for seed in (0, 1, 2)
    ]
    return {"runs": runs, "config": {"metrics": {}}}


def test_area_is_the_mean_over_shares():
    points = {
        "probe": [(1.0, 0.4)],
        "none": [(0.96, 0.5), (0.9, 0.7), (0.5, 0.9)],
        "fisher:keep=0.5": [(0.97, 0.6)],
        "fisher:keep=0.1": [(0.91, 0.65), (0.9, 0.1)],
    }
    found, best = fronts(made_up(points))
    assert best == "none"
    by_name = {front.name: front for front in found}
    none = [0.7 if s <= 0.9 else 0.5 if s <= 0.96 else 0.4 for s in SHARES]
    fisher = [0.65 if s <= 0.91 else 0.6 if s <= 0.97 else 0.4 for s in SHARES]
    assert by_name["none"].area.mean == pytest.approx(sum(none) / len(none) + 0.01)
    assert by_name["fisher"].area.mean == pytest.approx(sum(fisher) / len(fisher) + 0.01)
    assert by_name["none"].new.mean == pytest.approx(0.51)
    assert by_name["fisher"].new.mean == pytest.approx(0.61)
    assert by_name["fisher"].kept.mean == pytest.approx(0.97)
    assert by_name["probe"].area.mean == pytest.approx(0.41)
    assert by_name["fisher"].against.mean == pytest.approx((sum(fisher) - sum(none)) / len(SHARES))
    assert found[0].name == "fisher"


def test_a_seed_is_not_judged_at_what_it_chose_itself():
    results = made_up({"none": [(0.96, 0.5), (0.96, 0.4)], "probe": [(1.0, 0.1)]})
    for run_ in results["runs"]:  # seed 0 alone would choose the second rate
        if run_["seed"] == 0 and run_["values"]["lr"] == 1:
            run_["epochs"][0] |= {"val_new_accuracy": 0.9, "test_new_accuracy": 0.9}
    found, _ = fronts(results)
    (none,) = (front for front in found if front.name == "none")
    # Seed 0 is judged at 0.5, which the others choose; they at 0.4, since seed 0 chooses for them.
    assert none.new.mean == pytest.approx((0.5 + 0.41 + 0.42) / 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"old_classes": 9}, "fewer than two new classes"),
        ({"per_class": 0}, "per_class"),
        ({"per_class": 5000}, "per_class=5000"),
        ({"rates": ()}, "rates"),
        ({"rates": (-1.0,)}, "rates"),
        ({"pretrained": Path("nowhere.pt")}, "is no file"),
        ({"device": "nowhere"}, "device"),
        *(
            ({"arms": ("probe", arm)}, words)
            for arm, words in (
                ("frozen:penalty=3", "is written 'frozen'"),
                ("probe:scope=update", "is written 'probe'"),
                ("ewc", "is written 'ewc:penalty=...'"),
                ("ewc:penalty=-1", "penalty must be"),
                ("l2sp:penalty=much", "penalty must be"),
                ("lora", "is written 'lora:rank=...'"),
                ("lora:rank=0", "rank must be"),
                ("lora:rank=1.5", "rank must be"),
                ("old_lowest:keep=2", "keep"),
                ("old_lowest:penalty=1", "'penalty' has no meaning"),
                ("lowest_each_epoch:scope=nothing", "scope"),
                ("fisher:method=relabel", "'method' has no meaning"),
                ("mymodule:train", "is a function"),
                ("lowest", "Unknown arm"),
            )
        ),
    ],
)
def test_options_that_cannot_work(options, words, tmp_path):
    with pytest.raises(Exception, match=words):
        run(tmp_path / "out", **options, seeds=(0,))
    assert not (tmp_path / "out").exists()


def test_peft_is_asked_for_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"Arm 'lora' needs peft: pip install 'gradmask\[peft\]'"):
        run(tmp_path / "out", arms=("none", "lora:rank=2"))
    assert not (tmp_path / "out").exists()


def test_options_of_masks_of_the_recipes_own(tmp_path):
    arms = ("old_lowest:keep=0.3", "old_lowest:keep=0.3:scope=update:per=tensor")
    plain, changed = run(tmp_path / "out", arms=arms, seeds=(0,), rates=(0.03,))["runs"]
    assert plain["epochs"][-1] != changed["epochs"][-1]


def test_a_network_that_diverges_in_a_run(tmp_path):
    found = run(tmp_path / "out", arms=("none", "probe"), seeds=(0,), rates=(1e20,))["runs"]
    assert {r["arm"] for r in found if "diverged" in r} == {"none"}


@pytest.mark.parametrize("value", [b"nothing", float("nan"), 3])
def test_weights_that_are_none(value, results, tmp_path_factory, tmp_path):
    whole = next(tmp_path_factory.getbasetemp().glob("finetune*")) / "out/networks/pretrained.pt"
    path = tmp_path / "weights.pt"
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        torch.save(
            {
                k: torch.full_like(v, value, dtype=None if value != 3 else torch.int64)
                for k, v in torch.load(whole).items()
                if v.is_floating_point() or value == 3
            },
            path,
        )
    with pytest.raises(GradmaskError, match="give the weights that another study"):
        run(tmp_path / "out", pretrained=path, seeds=(0,))
    assert not (tmp_path / "out").exists()


def test_arms_of_the_recipe():
    assert find_recipe("finetune").config("small").arms == ARMS
    for arm in ARMS:
        parse_arm(arm, own=OWN)
