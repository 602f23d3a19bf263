"""Scores on two processes: whole, and in shards."""

import sys

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch import nn

from gradmask import SCORES, FisherMask, gradient_moments
from gradmask.errors import ModelError

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not dist.is_available(), reason="needs torch.distributed"
)
IN_SHARDS = [name for name, score in SCORES.items() if "mean" not in score.needs]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def samples(seed, ranks=1, rank=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (12,), generator=generator)
    return [
        (inputs[rank::ranks][i : i + 3], labels[rank::ranks][i : i + 3])
        for i in range(0, 12 // ranks, 3)
    ]


def arguments(name, ranks=1, rank=0):
    loader, protect = samples(1, ranks, rank), samples(2, ranks, rank)
    score = SCORES[name]
    return (loader if score.reads_data else None), ({"protect": protect} if score.compares else {})


def whole(name):
    """Masks of one process after two refreshes, averaged."""
    mask = FisherMask(network(), 0.3, score=name, average=0.5, max_samples=None)
    loader, options = arguments(name)
    mask.refresh(loader, **options)
    mask.refresh(loader, **options)
    return mask.masks


def check_whole(rank, world, expected, moments):
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(network())
    found = gradient_moments(model, samples(1, world, rank))
    for part, wanted in zip(found, moments, strict=True):
        for name, value in wanted.items():
            torch.testing.assert_close(part[name], value)
    for name, masks in expected.items():
        loader, options = arguments(name, world, rank)
        mask = FisherMask(model, 0.3, score=name, average=0.5, max_samples=None)
        mask.refresh(loader, **options)
        mask.refresh(loader, **options)
        assert all(torch.equal(mask.masks[k], m) for k, m in masks.items()), name


def check_sharded(rank, world, expected, folder):
    from torch.distributed.fsdp import fully_shard

    for name in IN_SHARDS:
        model = network()
        for layer in (model[0], model[2], model):
            fully_shard(layer)
        loader, options = arguments(name, world, rank)
        mask = FisherMask(model, 0.3, score=name, average=0.5, max_samples=None)
        mask.refresh(loader, **options)
        mask.save(folder / f"{name}.safetensors")
        dist.barrier()
        again = FisherMask(model, 0.3, score=name, average=0.5, max_samples=None)
        again.load(folder / f"{name}.safetensors")
        for each in (mask, again):
            each.refresh(loader, **options)
            for key, wanted in expected[name].items():
                assert torch.equal(each.masks[key].full_tensor(), wanted), (name, key)
    model = network()
    fully_shard(model)
    with pytest.raises(ModelError, match="sharded"):
        FisherMask(model, 0.3, score="snip").refresh(samples(1, world, rank))


def test_two_processes_have_the_masks_of_one(tmp_path):
    expected = {name: whole(name) for name in SCORES}
    moments = gradient_moments(network(), samples(1))
    run_processes(check_whole, 2, tmp_path, expected, moments)


def test_masks_in_shards_are_those_of_the_whole(tmp_path):
    expected = {name: whole(name) for name in IN_SHARDS}
    run_processes(check_sharded, 2, tmp_path, expected, tmp_path)
