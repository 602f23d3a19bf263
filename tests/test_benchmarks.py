import pytest
import torch

from gradmask.benchmarks import workloads
from gradmask.benchmarks.fisher import bench_fisher
from gradmask.benchmarks.peers import loop, vmap
from gradmask.benchmarks.timing import interleave, ratio
from gradmask.cli import main
from gradmask.errors import OptionError


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


def test_table():
    table = bench_fisher("small_cnn", batch_size=4, batches=1, rounds=1, peers=False)
    assert list(table.columns[0].cells) == ["plain forward + backward", "gradmask"]
    assert all(float(cell) > 0 for column in table.columns[1:4] for cell in column.cells)


def test_command(capsys):
    assert main(["bench", "fisher", "--model", "restnet18"]) == 2
    assert "Did you mean 'resnet18'" in capsys.readouterr().err
    with pytest.raises(OptionError):
        workloads.make("restnet18")
