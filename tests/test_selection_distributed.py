"""The threshold of entries that are spread over processes."""

import sys

import pytest
import torch
import torch.distributed as dist
from processes import run_processes

from gradmask import global_threshold, make_masks
from gradmask.errors import DataError, OptionError

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not dist.is_available(), reason="needs torch.distributed"
)


def diagonal(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(1000, generator=generator, dtype=torch.float64).pow(9).to(dtype)


def shards(values, world):
    """Uneven parts; one of four ranks has nothing."""
    return values.split({2: [830, 170], 4: [500, 170, 330, 0]}[world])


def check_rank(rank, world):
    group = dist.group.WORLD
    for dtype in (torch.float32, torch.float64):
        values = diagonal(dtype)
        mine = {"a": shards(values, world)[rank][::2], "b": shards(values, world)[rank][1::2]}
        for keep in (0.001, 0.25, 0.6, 1.0):
            threshold = global_threshold(mine, keep, group)
            assert torch.equal(threshold, global_threshold({"a": values}, keep))
            masks = make_masks(mine, keep, group=group)
            assert all(torch.equal(masks[n], mine[n] >= threshold) for n in mine)
    # A rank in float32 beside others in float64.
    values = diagonal(torch.float64)
    mine = shards(values, world)[rank]
    rounded = torch.cat(
        [p.float().double() if r == 0 else p for r, p in enumerate(shards(values, world))]
    )
    mine = mine.float() if rank == 0 else mine
    threshold = global_threshold({"a": mine}, 0.3, group)
    assert torch.equal(threshold, global_threshold({"a": rounded}, 0.3))
    # What one rank holds is refused on all, so that none waits for another.
    bad = torch.tensor([float("nan")]) if rank == 1 else torch.ones(3)
    with pytest.raises(DataError, match="NaN"):
        global_threshold({"a": bad}, 0.5, group)
    with pytest.raises(OptionError, match="leave group out"):
        make_masks(
            {"a": torch.ones(3)},
            0.5,
            strategy="inverse",
            generator=torch.Generator(),
            group=group,
        )


@pytest.mark.parametrize("world", [2, 4])
def test_same_on_every_rank_as_in_one_process(world, tmp_path):
    assert sum(len(p) for p in shards(diagonal(), world)) == 1000
    run_processes(check_rank, world, tmp_path)
