"""What several processes share of a network: its batches, or its parameters as well."""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def distribute(model: nn.Module, engine: str) -> nn.Module:
    """Prepare a network for training by all processes.

    Args:
        model: The network, on its device, with the same weights in every process.
        engine: `ddp`: every process has all of it. `fsdp`: every process has a part of each
            parameter (`fully_shard`, by the blocks of the network).

    Returns:
        What is called in training: the network in `DistributedDataParallel`, or itself.
    """
    if engine == "ddp":
        device = next(model.parameters()).device
        return DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with parameters that a Sequential runs or a list holds, the inner ones first."""
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.Sequential | nn.ModuleList):
            for child in module.children():
                own = any(p.requires_grad for p in child.parameters())
                if own and not isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict):
                    yield child
