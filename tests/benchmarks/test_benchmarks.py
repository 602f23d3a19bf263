import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gradmask import fisher_diagonal
from gradmask.benchmarks import fisher, forms, influence, peers, workloads
from gradmask.benchmarks.fisher import bench_fisher
from gradmask.benchmarks.influence import bench_influence, difference
from gradmask.benchmarks.layers import bench_layers
from gradmask.benchmarks.mask import bench_step, bench_threshold
from gradmask.benchmarks.peers import loop, vmap
from gradmask.benchmarks.refresh import bench_refresh, overlap, overlap_curve, overlap_table
from gradmask.benchmarks.timing import interleave, ratio
from gradmask.cli import main
from gradmask.errors import OptionError
from gradmask.recipes.compare import run_comparison
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.batches import Batches
from gradmask.study.progress import Progress


def test_every_task_once_a_round_in_turn():
    calls = []
    tasks = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleave(tasks, 3)
    assert calls == list("abc" + "abc" + "bca" + "cab")
    assert {name: len(found) for name, found in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratio_is_taken_within_the_rounds():
    assert ratio({"ours": [1.0, 30.0, 2.0], "theirs": [1.0, 10.0, 1.0]}, "ours", "theirs") == 2.0


@pytest.mark.parametrize("name", ["small_cnn", "mlp", "resnet18", "encoder"])
def test_workloads_and_peers(name):
    model, inputs, targets = workloads.make(name, 2)
    assert len(inputs) == len(targets) == 2
    assert not model.training
    again, same, _ = workloads.make(name, 2)
    assert torch.equal(same, inputs)
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_own_peers_are_right():
    model, inputs, targets = workloads.make("small_cnn", 5)
    found = [peer(model, inputs, targets)() for peer in (loop, vmap)]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-9)


def cells(table, column):
    return [cell.removesuffix(" *") for cell in table.columns[column].cells]


@pytest.mark.slow
def test_fisher():
    table = bench_fisher("small_cnn", batch_size=16, batches=1, rounds=1, peers=False)
    ours = ["plain forward + backward", "gradmask", "gradmask.gradient_moments"]
    assert cells(table, 0) == ours
    assert all(float(cell) > 0 for column in (1, 2) for cell in cells(table, column))
    assert "overlap" not in table.title


def test_fisher_in_other_precision(monkeypatch):
    monkeypatch.setattr(fisher, "peak_megabytes", lambda *arguments: 1.0)
    seen = []

    def watched(model, data, **options):
        seen.append(torch.is_autocast_enabled("cpu"))
        return fisher_diagonal(model, data, **options)

    monkeypatch.setattr(fisher, "fisher_diagonal", watched)
    table = bench_fisher("mlp", batch_size=8, batches=1, rounds=1, precision="bf16", peers=False)
    assert seen == [True] * 5 + [False]  # checked or not: to warm up, timed; two masks
    assert 0.5 < float(table.title.split("overlap ")[1].split(",")[0]) <= 1.0


def test_precision_without_tf32():
    assert torch.backends.cudnn.allow_tf32  # PyTorch's own setting
    task = peers.in_precision(lambda: torch.backends.cudnn.allow_tf32, "cpu", "float32")
    assert task() is False
    assert torch.backends.cudnn.allow_tf32


def test_influence(monkeypatch):
    monkeypatch.setattr(influence, "peak_megabytes", lambda *arguments: 1.0)
    sizes = {"sources": 5, "probe": 4, "step_sources": 3, "step_probe": 4, "batch_size": 6}
    table = bench_influence("small_cnn", rounds=1, **sizes)
    assert cells(table, 0) == [*forms.FORMS, "", "quadratic, sampled"]
    assert cells(table, 1)[:4] == ["5 x 4", "5", "3 x 4", "3 x 4"]
    assert all(float(cell) > 0 for cell in cells(table, 3))
    assert all(cells(table, column)[:4] == ["1"] * 4 for column in (5, 6))


@pytest.mark.parametrize("task", forms.MEMORY)
def test_influence_whose_memory_is_measured(task):
    values = forms.MEMORY[task](*workloads.make("small_cnn", 6))()
    assert values.shape == (3,)
    assert (values > 0).all()


def test_difference_of_values():
    found, expected = torch.tensor([1.1, 2.4, 3.0]), torch.tensor([1.0, 2.0, 4.0])
    assert difference(found, expected) == "error 20 %, rank correlation 1.00"
    assert difference(-expected, expected) == "error 200 %, rank correlation -1.00"


def test_layers():
    table = bench_layers("small_cnn", batch_size=2, rounds=1)
    assert cells(table, 0) == ["3 to 32, 3x3", "32 to 64, 3x3", "64 to 128, 3x3"]
    assert cells(table, 1) == ["32x32", "16x16", "8x8"]
    assert all(float(cell) > 0 for column in (2, 4, 5, 6) for cell in cells(table, column))
    chosen = [sum(" *" in list(c.cells)[row] for c in table.columns) for row in range(3)]
    assert chosen == [1, 1, 1]


def test_step():
    table = bench_step("small_cnn", batch_size=2, rounds=1)
    assert len(table.rows) == 6
    assert all(float(cell) > 0 for column in (1, 2, 3) for cell in cells(table, column))


def test_threshold():
    table = bench_threshold(entries=30_000, tensors=3, rounds=1)
    assert float(cells(table, 2)[0]) == 1
    assert cells(table, 4) == ["", "yes"]


def test_refresh(options, tmp_path):
    config = Comparison(**options | {"output": tmp_path / "out"})
    results = bench_refresh(config, draws=2)
    saved = json.loads((tmp_path / "out" / "refresh.json").read_text())
    assert saved == results
    assert "After epoch 3" in (tmp_path / "out" / "refresh.svg").read_text()
    assert [m["after_epoch"] for m in results["measurements"]] == [1, 3]
    for measurement in results["measurements"]:
        assert len(measurement["draws"]) == 2
        for points in measurement["draws"]:
            assert points[-1]["overlap"] == {"0.25": 1.0, "0.5": 1.0, "0.75": 1.0}
            assert [p["samples"] for p in points] == sorted({p["samples"] for p in points})
    others = measurement["others"]  # the MLP has no BatchNorm
    assert set(others) >= {"online: every batch", "online: every batch, β = 0.9"}
    assert set(others) >= {"5% each epoch, β = 0.0", "5% each epoch, β = 0.9"}
    assert len(overlap_table(measurement).rows) == len(points) + len(others)


def test_refresh_leaves_folders_of_others_alone(options, tmp_path):
    config = Comparison(**options | {"output": tmp_path / "out", "seeds": (0,), "save_every": 1})
    config = replace(config, arms=("none",))
    run_comparison(config, Progress(Console(quiet=True)))
    files = {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()}
    with pytest.raises(OptionError, match="holds runs of `gradmask run`"):
        bench_refresh(config, draws=1)
    with pytest.raises(OptionError, match="holds a different run, with lr="):
        bench_refresh(replace(config, lr=0.3), draws=1)
    assert {path: path.read_bytes() for path in files} == files
    mine = tmp_path / "mine" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(OptionError, match="holds files, but no run that gradmask made"):
        bench_refresh(replace(config, output=mine.parent), draws=1)
    assert os.listdir(mine.parent) == ["notes.txt"]
    for _ in range(2):  # its own folder is written into again
        bench_refresh(replace(config, output=tmp_path / "again", epochs=1), draws=1)
    assert (tmp_path / "again" / ".gradmask").is_file()


def test_overlap_is_intersection_over_union():
    a = {"x": torch.tensor([True, True, False]), "y": torch.tensor([True])}
    b = {"x": torch.tensor([True, False, True]), "y": torch.tensor([True])}
    assert overlap(a, b) == 2 / 4
    assert overlap(a, a) == 1


def test_parts_of_a_curve_add_up():
    """The last point is the mask of all samples, whatever the parts were."""
    model, inputs, targets = workloads.make("mlp", 600)
    images = Batches(inputs, targets, lambda x: x, 128)
    points = overlap_curve(model, images, 0)
    assert [p["samples"] for p in points] == [250, 500, 600]
    assert all(0.5 < p["overlap"]["0.25"] <= 1 for p in points)
    assert points[0]["overlap"]["0.25"] < points[1]["overlap"]["0.25"] < 1


def own_network():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))


def test_networks_of_the_user(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    model, inputs, targets = workloads.make("test_benchmarks:own_network", 6, shape=(3, 2, 2))
    assert model(inputs).shape == (6, 5)
    assert 0 <= targets.min() <= targets.max() < 5
    assert workloads.make("squeezenet1_1", 1, shape=(3, 64, 64))[1].shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("restnet18", "Did you mean 'resnet18'"),
        ("no.such:network", "cannot be imported"),
        ("torch:nothing", "cannot be imported"),
        ("torch.nn:Identity", "does not return logits"),
    ],
)
def test_networks_that_do_not_work(name, message):
    with pytest.raises(OptionError, match=message):
        workloads.make(name, 2)


@pytest.mark.parametrize("what", ["fisher", "layers", "influence", "step"])
def test_command_refuses_unknown_networks(what, capsys):
    assert main(["bench", what, "--model", "restnet18"]) == 2
    assert "Did you mean 'resnet18'" in capsys.readouterr().err


@pytest.mark.slow
def test_commands(capsys, tmp_path):
    words = ["--model", "mlp", "--batch-size", "2", "--rounds", "1"]
    assert main(["bench", "fisher", *words, "--batches", "1", "--no-peers"]) == 0
    assert main(["bench", "threshold", "--entries", "6000", "--rounds", "1"]) == 0
    recipe = ["demo", "--epochs", "1", "--train-size", "100", "--output", str(tmp_path / "out")]
    assert main(["bench", "refresh", *recipe]) == 0
    network = ["--model", "mlp", "--width", "4", "--rounds", "1"]
    assert main(["bench", "loop", *network, "--steps", "2", "--batch-size", "10"]) == 0
    assert main(["bench", "loading", "--images", "8", "--rounds", "1", "--workers", "0", "1"]) == 0
    printed = capsys.readouterr().out
    found = ("mlp", "float32 entries", "overlap with the mask", "our loop", "gradmask, 1 workers")
    assert all(text in printed for text in found)


@pytest.mark.slow
def test_processes(capsys):
    network = ["--model", "mlp", "--width", "4", "--rounds", "1"]
    assert main(["bench", "processes", *network, "--steps", "4", "--batch-size", "50"]) == 0
    assert "fsdp" in capsys.readouterr().out
