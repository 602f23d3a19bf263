"""What several processes collect together."""

import sys
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from collecting import batches, close, equal, loss_of, network
from processes import run_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from gradmask import FisherMask, fisher_diagonal


def check_ranks(rank, world):
    model, data = network(), batches(4)
    mask = FisherMask(DistributedDataParallel(model), keep=0.5)
    wrapped = mask._wrapped
    mine = [(x[: 4 - rank], y[: 4 - rank]) for x, y in data[rank::world]]
    with mask.collect() as collector:
        for batch in mine:
            loss_of(wrapped, batch).backward()
    theirs = [(x[: 4 - r], y[: 4 - r]) for r in range(world) for x, y in data[r::world]]
    alone = [dist.new_group([r]) for r in range(world)][rank]
    truth = fisher_diagonal(network(), theirs, group=alone)
    close(collector.diagonal((dist.group.WORLD,)), truth)
    mask.refresh()
    single = FisherMask(network(), keep=0.5, group=alone)
    single.update(truth)
    assert equal(mask.masks, single.masks)


def sharded(mesh):
    from torch.distributed.fsdp import fully_shard

    model = network()
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_shards(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    model, data = sharded(mesh), batches(4)
    plain = network()
    truth = fisher_diagonal(plain, data, group=[dist.new_group([r]) for r in range(world)][rank])
    mask = FisherMask(model, keep=0.5)
    with mask.collect() as collector:
        for batch in data[rank::world]:
            loss_of(model, batch).backward()
    found = {n: t.full_tensor() for n, t in collector.diagonal((dist.group.WORLD,)).items()}
    close(found, truth)
    model.zero_grad()
    for collects in (False, True):
        with collector if collects else nullcontext():
            loss_of(model, data[rank]).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            q.grad, last = p.grad.full_tensor(), q.grad
            assert not collects or torch.equal(q.grad, last)
        model.zero_grad()
    mask.refresh()
    assert mask.kept_fraction == pytest.approx(0.5, abs=0.05)
    state = mask.state_dict()
    mask.load_state_dict(state)


@pytest.mark.skipif(
    sys.platform == "win32" or not dist.is_available(), reason="needs torch.distributed"
)
@pytest.mark.parametrize("check", [check_ranks, check_shards])
def test_processes_give_their_mean(check, tmp_path):
    run_processes(check, 2, tmp_path)
