"""Fisher diagonal and masks over processes: DistributedDataParallel and fully_shard."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from gradmask import FisherMask, fisher_diagonal, gradient_norms, influence
from gradmask.errors import DataError, DistributedError, GradmaskWarning, ModelError, OptionError
from gradmask.fisher.sharded import ShardSums

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not dist.is_available(), reason="needs torch.distributed"
)

STRATEGIES = ("fisher", "random", "inverse", "random_matched")
# Samples of every rank, in batches of 4: uneven, with a batch of one.
SIZES = {1: [13], 2: [9, 4], 4: [5, 2, 5, 1]}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


class Net(nn.Module):
    """Convolutions, a layer used twice, tied weights, a frozen one, attention, tiny parameters."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, stride=2, padding=1, bias=False)
        self.grouped = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3)
        self.norm = nn.GroupNorm(2, 6)
        self.twice = nn.Linear(6, 6)
        self.block = Block()
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.head.weight

    def forward(self, x):
        x = F.relu(self.norm(self.grouped(self.conv(x).relu_())))
        x = x.flatten(2).mT  # positions
        x = self.twice(F.relu(self.twice(x)))
        x = self.block(x)
        x = self.frozen(x.mean(1)) * self.scale
        return self.head(self.tied(x))[:, :5]


def net():
    torch.manual_seed(1)
    return Net().double()


def samples(count=13):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (count,), generator=generator)


def batches(x, y, size=4):
    return list(zip(x.split(size), y.split(size), strict=True))


def mine(rank, world, data=None):
    x, y = data or samples()
    start = sum(SIZES[world][:rank])
    part = slice(start, start + SIZES[world][rank])
    return x[part], y[part]


def shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    fully_shard([model.conv, model.grouped], mesh=mesh)
    fully_shard(model.block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wrap(way, world):
    model = net()
    if way == "ddp":
        return DistributedDataParallel(model)
    mesh = {"fsdp": (world,), "hsdp": (2, world // 2)}[way]
    return shard(model, init_device_mesh("cpu", mesh, mesh_dim_names=("a", "b")[: len(mesh)]))


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same(found, expected, rtol=1e-10):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(whole(found[name]), tensor, rtol=rtol, atol=1e-18, msg=name)


def parameters(model):
    inner = getattr(model, "module", model)
    return {n: whole(p.detach()) for n, p in inner.named_parameters()}


def mean_loss(model, x, y, total, world):
    """This rank's share of the mean over all samples; engines take the mean over the ranks."""
    return F.cross_entropy(model(x), y, reduction="sum") / total * world


def train(model, mask, world, data, steps=20):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    mask.attach(optimizer)
    x, y = data
    for step in range(steps):
        if step in (3, 11):
            mask.refresh(batches(x, y))
        optimizer.zero_grad()
        mean_loss(model, x, y, 13, world).backward()
        optimizer.step()


def check(rank, world, way):
    data = mine(rank, world)
    x, y = samples()
    single = net()
    for kind in ("empirical", "exact"):
        model = wrap(way, world)
        before = parameters(model)
        found = fisher_diagonal(model, batches(*data), kind=kind)
        assert_same(found, fisher_diagonal(single, [(x, y)], kind=kind, group=alone()))
        assert_same(parameters(model), before, 0)
        assert all(p.grad is None for p in model.parameters())
    for number, strategy in enumerate(STRATEGIES):
        scope = ("gradient", "update")[number % 2]
        options = {"keep": 0.4, "strategy": strategy, "scope": scope, "max_samples": None}
        ours, theirs = wrap(way, world), net()
        masks = FisherMask(ours, **options), FisherMask(theirs, group=alone(), **options)
        train(ours, masks[0], world, data)
        train(theirs, masks[1], 1, (x, y))
        for name, mask in masks[1].masks.items():
            assert torch.equal(whole(masks[0].masks[name]), mask), (strategy, name)
        assert masks[0].kept_fractions == masks[1].kept_fractions
        assert masks[0].kept_fraction == masks[1].kept_fraction
        assert_same(parameters(ours), parameters(theirs), 1e-8)


def alone():
    """A group of this rank only, for the comparison in one process."""
    if not hasattr(alone, "groups"):
        alone.groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
    return alone.groups[dist.get_rank()]


@pytest.mark.parametrize(
    ("way", "world"),
    [
        ("ddp", 2),
        pytest.param("ddp", 4, marks=pytest.mark.slow),
        ("fsdp", 2),
        pytest.param("fsdp", 4, marks=pytest.mark.slow),
        pytest.param("hsdp", 4, marks=pytest.mark.slow),
    ],
)
def test_same_as_in_one_process(way, world, tmp_path):
    run_processes(check, world, tmp_path, way)


def check_parts(rank, world):
    """No rank ever has a whole copy of anything but the layers of one unit."""
    model = wrap("fsdp", world)
    data = batches(*mine(rank, world))
    largest = 0
    original = ShardSums.__missing__

    def watched(sums, name):
        nonlocal largest
        tensor = original(sums, name)
        largest = max(largest, sum(t.numel() for t in sums.values()))
        return tensor

    ShardSums.__missing__ = watched
    mask = FisherMask(model, keep=0.3, max_samples=None)
    mask.refresh(data)
    ShardSums.__missing__ = original
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    biggest = max(p.numel() for p in model.parameters())
    assert biggest <= largest < total / 2
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert mask.masks[name].to_local().shape == p.to_local().shape
            assert mask.state_dict()["masks"][name].placements == p.placements

    import torch.distributed.checkpoint as dcp

    state = mask.state_dict()
    folder = os.environ["CHECKPOINT"]
    dcp.save({"masks": state["masks"]}, checkpoint_id=folder, no_dist=False)
    other = FisherMask(wrap("fsdp", world), keep=0.3, max_samples=None)
    saved = {"masks": {n: torch.zeros_like(m) for n, m in state["masks"].items()}}
    dcp.load(saved, checkpoint_id=folder)
    other.load_state_dict(state | saved)
    assert other.kept_fraction == mask.kept_fraction
    assert_same(other.masks, {n: whole(m) for n, m in mask.masks.items()}, 0)
    # A mask that was saved by one process, into shards.
    single = FisherMask(net(), keep=0.3, max_samples=None, group=alone())
    single.refresh(batches(*samples()))
    other.load_state_dict(single.state_dict())
    assert_same(other.masks, single.masks, 0)


def test_no_whole_copies(tmp_path, monkeypatch):
    monkeypatch.setenv("CHECKPOINT", str(tmp_path / "dcp"))
    run_processes(check_parts, 2, tmp_path)


class Opaque(nn.Module):
    """Has a parameter that no rule speaks for."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    def forward(self, x):
        return torch.einsum("nchw,cd->ndhw", x, self.weight.tanh()).mean((2, 3))


def check_errors(rank, world):
    x, y = mine(rank, world)
    for way in ("ddp", "fsdp"):
        model = wrap(way, world)
        mask = FisherMask(model, keep=0.3, max_samples=None)
        mask.refresh(batches(x, y))
        before = {n: whole(m) for n, m in mask.masks.items()}
        # What fails on one rank fails on all, before any waits for another.
        bad = x.clone()
        if rank == 1:
            bad[-1, 0, 0, 0] = float("nan")
        with pytest.raises(DataError if rank == 1 else DistributedError, match=r"loss|Rank 1 of 2"):
            mask.refresh(batches(bad, y))

        def broken(x=x, y=y):
            yield x[:2], y[:2]
            if rank == 0:
                raise OSError("disk")
            yield x[2:4], y[2:4]

        with pytest.raises(OSError if rank == 0 else DistributedError, match=r"disk|Rank 0 of 2"):
            fisher_diagonal(model, broken())
        assert_same(mask.masks, before, 0)
        with pytest.raises(OptionError, match="different seed"):
            FisherMask(model, seed=rank).refresh(batches(x, y))
    # A rank without samples: nothing to add, or nothing to run.
    found = fisher_diagonal(wrap("ddp", world), batches(x, y) if rank == 0 else [])
    assert_same(found, fisher_diagonal(net(), batches(*mine(0, world)), group=alone()))
    with pytest.raises(DataError if rank == 1 else DistributedError, match=r"needs some|Rank 1"):
        fisher_diagonal(wrap("fsdp", world), batches(x, y) if rank == 0 else [])
    with pytest.raises(DataError, match="no samples"):
        fisher_diagonal(wrap("ddp", world), [])
    with pytest.raises(OptionError, match="leave it out"):
        FisherMask(wrap("fsdp", world), group=dist.group.WORLD)
    with pytest.warns(GradmaskWarning, match="2 processes"):
        FisherMask(net())

    from torch.distributed.fsdp import fully_shard

    with pytest.raises(ModelError, match="'weight' is sharded, and no rule"):
        fisher_diagonal(fully_shard(Opaque()), batches(torch.randn(4, 3, 2, 2).double(), y[:4] % 3))
    part = net()
    fully_shard(part.block)
    with pytest.raises(ModelError, match="is not sharded"):
        FisherMask(part)
    # Influence is measured by each process, on whole parameters.
    options = {"step": 0.01, "method": "quadratic"}
    found = influence(wrap("ddp", world), (x[:2], y[:2]), x[2:4], **options)
    assert torch.equal(found, influence(net(), (x[:2], y[:2]), x[2:4], **options))
    norms = gradient_norms(wrap("ddp", world), (x[:2], y[:2]))
    assert torch.equal(norms, gradient_norms(net(), (x[:2], y[:2])))
    with pytest.raises(ModelError, match="influence takes whole parameters"):
        influence(wrap("fsdp", world), (x[:2], y[:2]), x[2:4], **options)
    # Parts of max_samples, one from each rank; each draws its own.
    drawn = []

    model = wrap("ddp", world)
    model.module.conv.register_forward_pre_hook(lambda _, args: drawn.append(len(args[0])))
    fisher_diagonal(model, batches(x, y, 1), max_samples=5, verify=False)
    assert sum(drawn) == 3 - rank


def test_errors(tmp_path):
    run_processes(check_errors, 2, tmp_path)


def check_death(rank, world, way):
    model = wrap(way, world)
    mask = FisherMask(model, keep=0.3)
    data = batches(*mine(rank, world))
    mask.refresh(data)
    if rank == 1:
        os._exit(3)
    mask.refresh(data)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_rank_that_dies_is_an_error_on_the_others(way, tmp_path):
    failures = run_processes(check_death, 2, tmp_path, way, expected=[1, 3], limit=60)
    assert len(failures) == 1
    assert "rank 0" in failures[0]
