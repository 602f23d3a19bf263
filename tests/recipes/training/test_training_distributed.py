"""Training by several processes: equal to one, resumed bit for bit, errors and no waiting."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from rich.console import Console

from gradmask.errors import DistributedError, GradmaskWarning, OptionError, StateError
from gradmask.recipes.compare import run_comparison
from gradmask.recipes.config import Comparison
from gradmask.recipes.data import batches as batches_module
from gradmask.recipes.data.images import load_images
from gradmask.recipes.training import run as training
from gradmask.recipes.training.checkpoint import SHARDS
from gradmask.recipes.training.state import new_state
from gradmask.recipes.training.weights import saved_epochs, weights_path
from gradmask.study.budget import EpochsSpent
from gradmask.study.progress import Progress

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not dist.is_available(), reason="needs torch.distributed"
)

# 135 images in five batches of 27: uneven for two processes and for four.
CONFIG = Comparison(
    data="digits",
    train_size=150,
    model="mlp",
    width=16,
    arms=("fisher", "sam"),
    seeds=(0,),
    epochs=4,
    batch_size=30,
    lr=0.05,
    schedule="cosine",
    save_every=4,
    device="cpu",
)


def compare(config):
    return run_comparison(config, Progress(Console(file=StringIO())))


def final(config, arm="fisher"):
    """Weights at the end, and the measurements without times."""
    directory = config.output / "runs" / f"{arm}-seed0"
    assert saved_epochs(directory)[-1] == config.epochs
    weights = torch.load(weights_path(directory, config.epochs), weights_only=True)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return weights, [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def train(rank, world, *configs):
    for config in configs:
        compare(config)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    config = replace(CONFIG, output=tmp_path_factory.mktemp("single") / "out")
    compare(config)
    return {arm: final(config, arm) for arm in config.arms}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_as_in_one_process(world, single, tmp_path):
    configs = [
        replace(CONFIG, output=tmp_path / "ddp"),
        replace(CONFIG, output=tmp_path / "fsdp", engine="fsdp", arms=("fisher",)),
    ]
    run_processes(train, world, tmp_path, *configs)
    for config in configs:
        for arm in config.arms:
            (weights, rows), theirs = final(config, arm), single[arm]
            for name, expected in theirs[0].items():  # after 20 steps
                torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-5)
            for row, expected in zip(rows, theirs[1], strict=True):
                assert row.pop("kept_per_parameter", 1) == expected.get("kept_per_parameter", 1)
                row.pop("weights", None)  # a sum of their bits
                each = row.pop("test_accuracy_per_class")
                assert each == pytest.approx(expected["test_accuracy_per_class"], abs=0.03)
                assert row == pytest.approx({name: expected[name] for name in row}, rel=1e-3)
        results = json.loads((config.output / "results.json").read_text())
        assert len(results["runs"]) == len(config.arms)
        assert not list(config.output.rglob("*checkpoint*"))


def watch_buffers(rank, world, config):
    """Every process evaluates, and measures its part of the Fisher information, in one network."""
    original = training.evaluate
    seen = []

    def watched(model, batches):
        statistics = torch.cat([b.flatten().double() for b in model.buffers()])
        everywhere = [torch.empty_like(statistics) for _ in range(world)]
        dist.all_gather(everywhere, statistics)
        seen.append(all(torch.equal(other, statistics) for other in everywhere))
        return original(model, batches)

    training.evaluate = watched
    compare(config)
    assert len(seen) == 4
    assert all(seen)


@pytest.mark.slow
def test_running_statistics_are_the_same_everywhere(tmp_path):
    config = replace(CONFIG, model="small_cnn", width=4, arms=("fisher",), epochs=2)
    run_processes(watch_buffers, 2, tmp_path, replace(config, output=tmp_path / "out"))


def interrupted(rank, world, config, steps):
    """Stop after a budget of epochs, or at a step in the middle of one."""
    original = batches_module.augment_batch
    count = 0

    def counted(*args):
        nonlocal count
        count += 1
        if count > steps:
            raise KeyboardInterrupt
        return original(*args)

    batches_module.augment_batch = counted
    with pytest.raises((KeyboardInterrupt, EpochsSpent)):
        compare(config)
    batches_module.augment_batch = original


def go_on(rank, world, config):
    """Interrupt runs: in an epoch; in an epoch with a damaged checkpoint; after a budget."""
    compare(replace(config, output=config.output / "whole"))
    for name, steps, options in (
        ("step", 13, {}),
        ("damage", 13, {}),
        ("budget", 99, {"stop_after": 2}),
    ):
        ours = replace(config, output=config.output / name)
        interrupted(rank, world, replace(ours, **options), steps)
        dist.barrier()
        if rank == 0 and name == "damage":
            spoil(ours.output / "runs" / "fisher-seed0" / names(config)[0])
        dist.barrier()
        if rank == 0 and name == "damage":
            with pytest.warns(GradmaskWarning, match="going on from the checkpoint before"):
                compare(ours)
        else:
            compare(ours)

    check_kind_of_optimizer(config)


def check_kind_of_optimizer(config):
    """It stays as this device has it, whatever the checkpoint says."""
    first, second = (
        new_state(config, load_images(config, 0), "fisher", 0, [], 10) for _ in range(2)
    )
    second.optimizer.param_groups[0]["fused"] = True
    shards = first.shards() if first.in_shards else None
    second.load_state_dict(first.state_dict(), shards)
    assert second.optimizer.param_groups[0]["fused"] is True


def names(config):
    return SHARDS if config.engine == "fsdp" else ("checkpoint.pt", "checkpoint.previous.pt")


def spoil(path):
    """Cut a checkpoint short: of one in shards, the largest file."""
    if path.is_dir():
        path = max(path.glob("*.distcp"), key=lambda p: p.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_with_the_same_bits(engine, tmp_path):
    config = replace(CONFIG, arms=("fisher",), engine=engine, optimizer="adamw", lr=0.01)
    # With running statistics, of which every process has its own.
    config = replace(config, model="small_cnn", width=4, checkpoint_every=2, output=tmp_path)
    run_processes(go_on, 2, tmp_path, config)
    expected, expected_rows = final(replace(config, output=tmp_path / "whole"))
    for name in ("step", "damage", "budget"):
        weights, rows = final(replace(config, output=tmp_path / name))
        assert rows == expected_rows
        assert all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("engine", "before", "after"),
    [
        pytest.param("ddp", 2, 1, marks=pytest.mark.slow),
        pytest.param("fsdp", 2, 3, marks=pytest.mark.slow),
    ],
)
def test_the_number_of_processes_may_change(engine, before, after, single, tmp_path):
    config = replace(CONFIG, arms=("fisher",), engine=engine, checkpoint_every=2)
    config = replace(config, output=tmp_path / "out")
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    run_processes(interrupted, before, tmp_path / "before", config, 13)
    if after == 1:
        compare(config)
    else:
        run_processes(train, after, tmp_path / "after", config)
    (weights, rows), expected = final(config), single["fisher"]
    for name, tensor in expected[0].items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-5)
    for row, other in zip(rows, expected[1], strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)


def refuse(rank, world, config):
    directory = config.output / "runs" / "fisher-seed0"
    interrupted(rank, world, config, 13)
    dist.barrier()
    other = replace(config, engine="ddp" if config.engine == "fsdp" else "fsdp")
    with pytest.raises(StateError, match=f"was written with engine={config.engine}"):
        compare(other)
    if rank == 0:
        for name in names(config):
            spoil(directory / name)
    dist.barrier()
    error = StateError if rank == 0 or config.engine == "fsdp" else DistributedError
    with pytest.raises(error, match=r"no other is sound|Rank 0 of 2 failed"):
        compare(config)
    with pytest.raises(OptionError if rank == 0 else DistributedError, match=r"lr=0.05|Rank 0"):
        compare(replace(config, lr=0.1))
    with pytest.raises(OptionError, match="cannot be shared by 2 processes"):
        compare(replace(config, batch_size=1, output=config.output / "x"))
    if config.engine == "fsdp":
        for options, name in (({"arms": ("sam",)}, "SAM"), ({"monitor": ("kl",)}, "monitor")):
            with pytest.raises(OptionError, match=f"{name} needs whole"):
                compare(replace(config, output=config.output / "x", **options))


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_what_cannot_be_gone_on_from(engine, tmp_path):
    config = replace(
        CONFIG, arms=("fisher",), engine=engine, checkpoint_every=2, output=tmp_path / "out"
    )
    run_processes(refuse, 2, tmp_path, config)


def die(rank, world, config):
    original = batches_module.augment_batch
    count = 0

    def counted(*args):
        nonlocal count
        count += 1
        if rank == 1 and count == 7:
            os._exit(3)
        return original(*args)

    batches_module.augment_batch = counted
    compare(config)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_others(engine, tmp_path):
    config = replace(CONFIG, arms=("fisher",), engine=engine, output=tmp_path / "out")
    failures = run_processes(die, 2, tmp_path, config, expected=[1, 3], limit=90)
    assert len(failures) == 1


@pytest.mark.slow
def test_torchrun(single, tmp_path):
    words = "run compare --data digits --train_size 150 --model mlp --width 16 --arms fisher"
    words += " --seeds 0 --epochs 4 --batch_size 30 --lr 0.05 --schedule cosine --save_every 4"
    words += f" --device cpu --output {tmp_path / 'out'}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for stop in (["--stop_after", "3"], []):
        command = [*launch, "-m", "gradmask.cli", *words.split(), *stop]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Stopped after 3 epochs") == len(stop) // 2
    assert done.stdout.count("Report:") == 1
    weights, _ = final(replace(CONFIG, output=tmp_path / "out"))
    for name, expected in single["fisher"][0].items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-5)
    assert len(json.loads(Path(tmp_path / "out" / "results.json").read_text())["runs"]) == 1
