"""What several processes collect together."""

import sys

import pytest
import torch.distributed as dist
from processes import run_processes
from test_collect import batches, close, equal, loss_of, network
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


@pytest.mark.skipif(
    sys.platform == "win32" or not dist.is_available(), reason="needs torch.distributed"
)
def test_processes_give_their_mean(tmp_path):
    run_processes(check_ranks, 2, tmp_path)
