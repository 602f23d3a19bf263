"""Training on many processes: which ranks measure together, and parameters in shards.

Two engines are known: `DistributedDataParallel`, where every rank has all parameters, and
`fully_shard` (FSDP2), where a parameter is a `DTensor` of which every rank has a part.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from gradmask.errors import DistributedError, GradmaskWarning, ModelError, OptionError

# One for each dimension of the mesh: a sum over all ranks is a sum over one after the other.
Groups: TypeAlias = tuple[ProcessGroup, ...]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and `DistributedDataParallel`, which waits for other ranks.

    Raises:
        ModelError: If it is no model.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"Expected the model, an nn.Module, and got a {type(model).__name__}.")
    inner = _compiled(model)
    return _compiled(inner.module) if isinstance(inner, DistributedDataParallel) else inner


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` made or wraps this module."""
    own = getattr(module, "_compiled_call_impl", None)
    return own is not None or hasattr(module, "_orig_mod")


def _compiled(model: nn.Module) -> nn.Module:
    inner: nn.Module = getattr(model, "_orig_mod", model)  # of torch.compile
    return inner


def _replicated(model: nn.Module) -> DistributedDataParallel | None:
    inner = _compiled(model)
    return inner if isinstance(inner, DistributedDataParallel) else None


def with_whole_parameters(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel`, for what this process measures by itself.

    Args:
        model: The model, as it is trained.

    Returns:
        The model to call.

    Raises:
        ModelError: If its parameters are in shards.
    """
    model = unwrapped(model)
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ModelError(
                f"Parameter {name!r} is in shards, and influence takes whole parameters: measure "
                "on a model without fully_shard, loaded from a checkpoint."
            )
    return model


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import, and needed by few
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank has, in the same memory."""
    if not is_sharded(tensor):
        return tensor
    shard: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return shard


def shard_like(shard: Tensor, like: Tensor) -> Tensor:
    """Make this rank's part a part of a DTensor that is spread as `like` is; else return it."""
    if not is_sharded(like):
        return shard
    from torch.distributed.tensor import DTensor

    mesh, placements = _spread(like)
    options: dict[str, Any] = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    return DTensor.from_local(shard, mesh, placements, **options)


def take_shard(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has whole.

    Args:
        full: The same values on every rank.
        like: A tensor of the same shape.

    Returns:
        A view or copy of the part, or `full` itself if `like` is not sharded.
    """
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = _spread(like)
    return local(distribute_tensor(full.to(like.device), mesh, placements, src_data_rank=None))


def sum_to_shard(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of the sum of the tensors that the ranks have, each its own."""
    from torch.distributed.tensor import DTensor, Partial

    mesh, placements = _spread(like)
    parts = DTensor.from_local(full, mesh, [Partial()] * mesh.ndim, run_check=False)
    return local(parts.redistribute(mesh, placements))


def _spread(tensor: Any) -> tuple[Any, Any]:
    return tensor.device_mesh, tensor.placements


def shard_groups(tensors: Iterable[Tensor]) -> Groups:
    """Groups over which the entries of sharded tensors are spread; none if they are not."""
    for tensor in filter(is_sharded, tensors):
        mesh, placements = _spread(tensor)
        return tuple(mesh.get_group(i) for i, kind in enumerate(placements) if kind.is_shard())
    return ()


def data_groups(model: nn.Module, group: ProcessGroup | None = None) -> Groups:
    """Groups of the ranks that train a model together, each on samples of its own.

    Args:
        model: The model, as it is trained.
        group: What the user says.

    Returns:
        The user's group, that of `DistributedDataParallel`, or those of the mesh of `fully_shard`;
        none if the model is trained in this process alone.

    Raises:
        ModelError: If parameters are sharded in a way that cannot be measured.
        OptionError: If a group is given with a sharded model.
    """
    parameters = {name: p for name, p in unwrapped(model).named_parameters() if p.requires_grad}
    sharded = {name: p for name, p in parameters.items() if is_sharded(p)}
    if sharded:
        if group is not None:
            raise OptionError("The model is sharded, and its mesh tells the group: leave it out.")
        return _mesh_groups(parameters, sharded)
    if group is not None:
        return (group,)
    replicated = _replicated(model)
    return () if replicated is None else (replicated.process_group,)


def warn_if_alone(groups: Groups) -> None:
    """Warn if several processes run, and each would make a mask of its own."""
    alone = not groups and dist.is_available() and dist.is_initialized()
    if alone and dist.get_world_size() > 1:
        warnings.warn(
            f"{dist.get_world_size()} processes run, but this model is in neither "
            "DistributedDataParallel nor fully_shard: every process makes a mask of its own. "
            "Give the wrapped model, or group=torch.distributed.group.WORLD.",
            GradmaskWarning,
            stacklevel=3,
        )


def _mesh_groups(parameters: Mapping[str, Tensor], sharded: Mapping[str, Tensor]) -> Groups:
    mesh, _ = _spread(next(iter(sharded.values())))
    for name, parameter in parameters.items():
        if name not in sharded:
            raise ModelError(f"Parameter {name!r} is not sharded, and others are: shard all.")
        own, placements = _spread(parameter)
        if own != mesh or sum(kind.is_shard() for kind in placements) > 1:
            raise ModelError(
                f"Parameter {name!r} has placements {placements} on {own}: use fully_shard with "
                "one mesh for all parameters, of one dimension or (replicate, shard); tensor "
                "parallelism cannot be measured."
            )
    return tuple(mesh.get_group(i) for i in range(mesh.ndim))


def rank_and_world_size(groups: Groups) -> tuple[int, int]:
    """Number of this rank among all ranks of the groups, and how many they are."""
    number = 0
    for group in groups:
        number = number * dist.get_world_size(group) + dist.get_rank(group)
    return number, prod(dist.get_world_size(group) for group in groups)


def sum_over(values: Tensor, groups: Groups) -> Tensor:
    """The sum over all ranks of a tensor on the CPU, or of a large one on its own device."""
    for group in groups:
        on_gpu = dist.get_backend(group) == "nccl" and not values.is_cuda
        moved = values.cuda() if on_gpu else values.clone()
        dist.all_reduce(moved, group=group)
        values = moved.to(values.device)
    return values


@contextmanager
def all_ranks_raise(groups: Groups, activity: str) -> Iterator[None]:
    """Fail on every rank if the work inside fails on one, so that none waits for another.

    Args:
        groups: Groups of the ranks.
        activity: What is done, for the message.

    Raises:
        DistributedError: On the ranks that have not failed, if another has.
    """
    number, count = rank_and_world_size(groups)
    failed = torch.zeros(count, dtype=torch.int32, device="cpu")
    try:
        yield
    except Exception:
        failed[number] = 1
        sum_over(failed, groups)
        raise
    others = sum_over(failed, groups).nonzero().flatten().tolist()
    if others:
        raise DistributedError(
            f"Rank {', '.join(map(str, others))} of {count} failed while {activity}: its own error "
            "says why."
        )


def check_same(values: Mapping[str, float], groups: Groups) -> None:
    """Raise an OptionError unless all ranks have the same values.

    Args:
        values: Options by name.
        groups: Groups of the ranks.
    """
    number, count = rank_and_world_size(groups)
    table = torch.zeros(count, len(values), dtype=torch.float64, device="cpu")
    table[number] = torch.tensor(list(values.values()), dtype=torch.float64, device="cpu")
    table = sum_over(table, groups)
    for name, found in zip(values, table.t(), strict=True):
        if (found != found[0]).any():
            raise OptionError(f"The ranks have different {name}: {found.tolist()}. Give all one.")


def reshard(model: nn.Module) -> None:
    """Let go of whole parameters that a forward pass has left behind."""
    for module in _units(model):
        module.reshard()


def note_whole_parameters(model: nn.Module, names: dict[int, str]) -> list[Any]:
    """Note the whole parameters that stand in for sharded ones during a forward pass.

    Args:
        model: A model, perhaps with `fully_shard`.
        names: `{id of a parameter: name}`, to which the ids of the whole ones are added.

    Returns:
        Handles of the hooks that do it.
    """
    units = _units(model)
    if not units:
        return []
    reshard(model)  # a forward pass without a backward pass leaves the outermost layers whole
    places = [
        (module, key, names[id(p)])
        for module in model.modules()
        for key, p in module._parameters.items()
        if p is not None and id(p) in names
    ]
    if missing := set(names.values()) - {name for *_, name in places}:
        raise ModelError(f"Parameter {min(missing)!r} is whole where its shard was expected.")

    def note(*_: Any) -> None:
        names.update({id(module._parameters[key]): name for module, key, name in places})

    # First in line: before they are let go after the forward pass.
    return [unit.register_forward_hook(note, prepend=True) for unit in units]


def _units(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)  # public from torch 2.6 on
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]
