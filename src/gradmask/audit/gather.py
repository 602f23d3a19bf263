"""The visits of all ranks, in one order."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gradmask.audit.visits import Visits


def gather_visits(
    waiting: list[Visits], device: torch.device, group: ProcessGroup | None
) -> list[Visits]:
    """Exchange what the ranks have waiting: called by all of them.

    Args:
        waiting: The visits of this rank's updates, in order.
        device: Where the visits are wanted.
        group: The ranks (default: all).

    Returns:
        The visits of all ranks: of each one's first update in the order of the ranks, then of each
        one's second, and so on.
    """
    moved = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
    lengths = torch.tensor(
        [len(visits.rows) for visits in waiting], dtype=torch.int64, device="cpu"
    )
    parts = [visits.packed().to(moved) for visits in waiting]  # whichever device each came from
    whole = torch.cat(parts) if parts else torch.zeros(0, 7, dtype=torch.float64, device=moved)
    ranks = [
        [Visits.unpacked(part.to(device)) for part in rows.split(counts.tolist())]
        for counts, rows in zip(
            _all_gather(lengths.to(moved), group), _all_gather(whole.to(moved), group), strict=True
        )
    ]
    updates = max(map(len, ranks))
    return [found[i] for i in range(updates) for found in ranks if i < len(found)]


def _all_gather(values: Tensor, group: ProcessGroup | None) -> list[Tensor]:
    """Tensors of all ranks that differ in length only."""
    count = dist.get_world_size(group)
    length = torch.tensor([len(values)], dtype=torch.int64, device=values.device)
    lengths = [torch.zeros_like(length) for _ in range(count)]
    dist.all_gather(lengths, length, group=group)
    sizes = [int(found) for found in lengths]
    padded = values.new_zeros(max(sizes), *values.shape[1:])
    padded[: len(values)] = values
    gathered = [torch.zeros_like(padded) for _ in range(count)]
    dist.all_gather(gathered, padded, group=group)
    return [found[:size] for found, size in zip(gathered, sizes, strict=True)]
