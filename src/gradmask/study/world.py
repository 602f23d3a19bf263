"""Several processes that train one network together, as `torchrun` starts them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradmask.distributed import Groups, all_ranks_raise, sum_over
from gradmask.errors import OptionError

LIMIT = timedelta(minutes=10)  # a rank that waits for longer ends with an error
Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Attributes:
        rank: Its number, from 0.
        size: How many they are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes files and prints."""
        return self.rank == 0

    @property
    def groups(self) -> Groups:
        """The group of all of them; none if there is one only."""
        group = dist.group.WORLD if self.size > 1 else None
        return () if group is None else (group,)

    def part(self, batch: Tensor) -> Tensor:
        """This process's part of a batch."""
        return batch[self.rank :: self.size]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes."""
        return sum_over(values, self.groups)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, work: Callable[[], Result], doing: str) -> Result:
        """What the main process's work returns, on all of them; its error ends all of them.

        Args:
            work: Done on the main process only.
            doing: What it does, for the message on the others.

        Returns:
            What `work` returned.

        Raises:
            DistributedError: On the other processes, if it failed.
        """
        with all_ranks_raise(self.groups, doing):
            result: list[Any] = [work() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(result, src=0)
        found: Result = result[0]
        return found

    def same_buffers(self, model: nn.Module) -> None:
        """Give all processes the buffers of the main one: running statistics are each its own."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


ALONE = World()


def current_world() -> World:
    """This process among those that have joined."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return World(dist.get_rank(), dist.get_world_size())


def launched() -> int:
    """How many processes a launcher has started, by its variables in the environment.

    Raises:
        OptionError: If they are not those of a launcher: to wait for the others would be in vain.
    """
    count = _number("WORLD_SIZE", 1, 2**20, "1")
    if count > 1:
        _number("RANK", 0, count - 1)
        _number("LOCAL_RANK", 0, count - 1)
        port, address = _number("MASTER_PORT", 0, 2**16 - 1), os.environ.get("MASTER_ADDR", "")
        try:
            socket.getaddrinfo(address or "unknown.invalid", port)
        except (OSError, UnicodeError) as error:
            raise _no_launcher("MASTER_ADDR", address, "the name of a machine") from error
    return count


def _number(name: str, least: int, most: int, default: str | None = None) -> int:
    text = os.environ.get(name, default)
    if text is None or not text.isdecimal() or not least <= int(text) <= most:
        raise _no_launcher(name, text, f"a whole number from {least} to {most}")
    return int(text)


def _no_launcher(name: str, text: str | None, expected: str) -> OptionError:
    return OptionError(
        f"The environment has {name}={text!r}, not {expected}: start several processes with "
        "torchrun, or unset WORLD_SIZE for one."
    )


@contextmanager
def process_group(cuda: bool) -> Iterator[World]:
    """Join the processes that `torchrun` has started; without it there is this one only.

    Args:
        cuda: Train on GPUs, each process on its own.

    Yields:
        This process among them.

    Raises:
        OptionError: If the environment is not that of a launcher.
    """
    if dist.is_initialized() or launched() == 1:
        yield current_world()
        return
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=LIMIT)
    try:
        yield current_world()
    finally:
        dist.destroy_process_group()
