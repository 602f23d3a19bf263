"""What is kept of each sample's visits: a few numbers, however many they are."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmask.audit.visits import Visits

BLOCKS = 8
_HALF = torch.finfo(torch.float16).max

# 82 bytes a sample: dtype and columns.
_STATE = {
    # Visits, forgetting events, number of the last visit that was wrong (from 1), and the class
    # that leads the vote of the most probable other ones.
    "counts": (torch.int32, 4),
    "sums": (torch.float32, 2),  # of the loss and the share of wrong predictions
    "probability": (torch.float64, 2),  # and its square: the variance is a small difference
    "votes": (torch.float32, 2),  # what the leader leads by, and the sum of its probabilities
    "last_loss": (torch.float16, 1),
    # Sums of the margins in blocks of equally many visits. When the last one is full, blocks are
    # joined two by two: so the first half of the visits can be told from the second one, however
    # many they will be.
    "margins": (torch.float32, BLOCKS),
}


def new_state(rows: int, device: torch.device) -> dict[str, Tensor]:
    """The state of samples without visits; a last row more takes what belongs to none.

    Args:
        rows: Samples, or labels.
        device: Where to keep it.
    """
    state = {
        name: torch.zeros(rows + 1, columns, dtype=_kept_as(dtype, device), device=device)
        for name, (dtype, columns) in _STATE.items()
    }
    state["counts"][:, 3] = -1
    return state


def moved(state: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The state on another device, never the same memory.

    Args:
        state: The state.
        device: The device.
    """
    return {
        name: value.to(device, _kept_as(_STATE[name][0], device), copy=True)
        for name, value in state.items()
    }


def _kept_as(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 and device.type == "mps" else dtype


def add_visits(state: dict[str, Tensor], batches: list[Visits]) -> None:
    """Add visits, those of one sample in their order, without waiting for a GPU.

    Several batches on a CPU are added at once, and one after another where a sample is in more than
    one of them, which is the same to the bit.

    Args:
        state: The state, which is changed.
        batches: The visits of each batch; those of negative rows count for nothing.
    """
    if len(batches) > 1 and state["counts"].device.type == "cpu":
        together = Visits(*(torch.cat(columns) for columns in zip(*batches, strict=True)))
        if _unique(together.rows):
            batches = [together]
    for visits in batches:
        if len(visits.rows):
            _add_batch(state, visits)


def _unique(rows: Tensor) -> bool:
    """Whether no sample has two visits."""
    ordered = rows.sort().values
    return not bool(((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)).any())


def _add_batch(state: dict[str, Tensor], visits: Visits) -> None:
    counts, trash = state["counts"], len(state["counts"]) - 1
    order = visits.rows.argsort(stable=True)  # a sample may be in a batch more than once
    rows, other, values = (column.index_select(0, order) for column in visits)
    rows = rows.masked_fill(rows < 0, trash)
    first = torch.ones_like(rows, dtype=torch.bool)
    last = torch.ones_like(first)
    torch.ne(rows[1:], rows[:-1], out=first[1:])
    last[:-1] = first[1:]
    place = torch.arange(len(rows), device=rows.device)
    before, _, last_wrong, candidate = counts.index_select(0, rows).unbind(1)
    number = (before + 1) + (place - (place * first).cummax(0).values)  # of this visit, from 1
    missed = values[:, 1] > 0.5
    was_right = torch.where(first, last_wrong != before, ~missed.roll(1))
    one = torch.ones_like(before)
    counts[:, :2].index_add_(0, rows, torch.stack([one, one * (was_right & missed)], 1))
    counts[:, 2].scatter_reduce_(0, rows, (number * missed).int(), "amax")
    state["sums"].index_add_(0, rows, values[:, :2])
    wide = values[:, 3].to(state["probability"].dtype)
    state["probability"].index_add_(0, rows, torch.stack([wide, wide.square()], 1))
    after = counts[:, 0].index_select(0, rows)
    _add_margins(state["margins"], rows, first, values[:, 2], before, after, number)
    rows = torch.where(last, rows, trash)
    state["last_loss"].index_copy_(0, rows, values[:, :1].clamp_max(_HALF).half())
    # Of a sample that is in a batch more than once, the last one votes.
    rows = rows.masked_fill(other < 0, trash)
    _vote(state, rows, candidate, other.int(), values[:, 4])


def margin_halves(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sums of the margins over the first half of the visits and over the second one.

    The block in the middle is shared out in proportion.

    Args:
        state: The state.
    """
    visits = state["counts"][:, :1]
    width = 2 ** _shift(visits)
    begin = torch.arange(BLOCKS, device=visits.device) * width
    length = (visits - begin).clamp_min(0).minimum(width)
    early = ((visits / 2 - begin) / length.clamp_min(1)).clamp(0, 1)
    margins = state["margins"].double()
    return (margins * early).sum(1), (margins * (1 - early)).sum(1)


def _shift(visits: Tensor) -> Tensor:
    """log₂ of the visits in a block: the least that lets all blocks hold so many."""
    return torch.frexp(((visits - 1).clamp_min(0) // BLOCKS).float()).exponent


def _add_margins(
    blocks: Tensor,
    rows: Tensor,
    first: Tensor,
    margin: Tensor,
    before: Tensor,
    after: Tensor,
    number: Tensor,
) -> None:
    """Join the blocks of samples that have got too many visits for them, then add the new ones."""
    shift = _shift(after)
    joined = shift - _shift(before)
    if joined.device.type != "cpu" or joined.any():
        block = torch.arange(BLOCKS, device=rows.device)
        into = (block >> joined[:, None])[:, :, None] == block
        found = torch.where(into, blocks[rows][:, :, None], 0).sum(1)
        blocks.index_copy_(0, torch.where(first, rows, len(blocks) - 1), found)
    # The counts of the row that belongs to no sample may overflow.
    places = rows * BLOCKS + ((number - 1) >> shift).clamp(0, BLOCKS - 1)
    blocks.view(-1).index_add_(0, places, margin)


def _vote(
    state: dict[str, Tensor], rows: Tensor, candidate: Tensor, other: Tensor, support: Tensor
) -> None:
    """Majority vote in constant memory (Boyer and Moore), weighted by probability."""
    votes, supports = state["votes"].index_select(0, rows).unbind(1)
    agrees = candidate == other
    votes = votes + torch.where(agrees, support, -support)
    replaced = votes < 0
    supports = torch.where(replaced, support, supports + support * agrees)
    state["counts"][:, 3].index_copy_(0, rows, torch.where(replaced, other, candidate))
    state["votes"].index_copy_(0, rows, torch.stack([votes.abs(), supports], 1))
