"""Weights that move on one rank stop all, before any of them measures."""

import sys

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from gradmask import FisherMask
from gradmask.errors import DistributedError, OptimizerError

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not dist.is_available(), reason="needs torch.distributed"
)


def wrapped(way, world):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    if way == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (world,)))


def part(tensor):
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()


def check(rank, world, way):
    model = wrapped(way, world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    mask = FisherMask(model, keep=0.4, scope="update").attach(optimizer)
    x = torch.randn(8, 4, dtype=torch.float64)
    y = torch.randint(0, 3, (8,))

    def unread():
        raise AssertionError("the data were read")
        yield

    def train():
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    train()
    for _ in range(2):
        mask.refresh([(x, y)])
        train()
    mask.refresh([(x, y)])
    train()
    weight = dict(mask.model.named_parameters())["0.weight"]
    masks = {name: part(m).clone() for name, m in mask.masks.items()}
    held = (~part(mask.masks["0.weight"])).nonzero()[0].tolist()
    with torch.no_grad():
        before = part(weight)[tuple(held)].item()
        part(weight)[tuple(held)] = before + (1e-12 if rank == 1 else 0.0)
    error = OptimizerError if rank == 1 else DistributedError
    with pytest.raises(error, match="moved between" if rank == 1 else "Rank 1 of 2 failed"):
        mask.refresh(unread())
    assert mask.refreshes == 3
    assert all(torch.equal(part(mask.masks[name]), m) for name, m in masks.items())
    with torch.no_grad():
        part(weight)[tuple(held)] = before
    mask.refresh([(x, y)])
    assert mask.refreshes == 4


@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_all_ranks_stop_together(way, tmp_path):
    run_processes(check, 2, tmp_path, way)
