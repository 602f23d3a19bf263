"""What training itself says of each sample, at no pass of its own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gradmask.audit.accumulate import add_visits, margin_halves, moved, new_state
from gradmask.audit.gather import gather_visits
from gradmask.audit.visits import IGNORED, REFUSED, Layout, Visits, measure_visits
from gradmask.errors import DataError, GradmaskWarning, OptionError, StateError

_AT_ONCE = 8  # updates: most of their cost is that of calls


class Dynamics:
    """Follows every training sample by the logits that training has anyway.

    A visit is one look of training at a sample: in the usual loop, one an epoch. With logits z, the
    given label y and p = softmax(z), a visit has the margin m = z_y − max_{k≠y} z_k and the loss
    −log p_y. Of all visits a few sums are kept: 82 bytes a sample, on the device of the logits,
    without a pass and without waiting for the device. `scores` lists what comes of them.

    A sample with several labels (a sequence) counts by their mean, unless `positions` gives each
    label a row of its own. Visits whose logits are not finite, and samples and labels without a
    label (`ignore_index`), count for nothing.

    Example:
        ```python
        dynamics = Dynamics(len(dataset))
        for inputs, targets, ids in loader:     # Indexed(dataset) yields ids as well
            logits = model(inputs)
            dynamics.update(ids, logits, targets)
            ...
        dynamics.scores()["area_under_margin"]
        ```

    On many processes every rank updates with its own samples, and all ranks call `gather` at the
    end of each epoch: then every rank has the sums that one process would have.

    Args:
        samples: Number of training samples; ids are from 0 to `samples` - 1.
        positions: Labels that each sample has at most, to follow each (tokens, or labels of
            `multilabel`); scores then have the shape (samples, positions).
        multilabel: Each class is a label of its own: targets of zeros and ones, of the logits'
            shape (samples, labels).
        class_dim: Dimension of the classes in the logits (default: 1 or the last, by the shapes).
        ignore_index: The label of what has none.
        group: Ranks that train together (default: all, if processes run).

    Raises:
        OptionError: If a number is out of range.
    """

    def __init__(
        self,
        samples: int,
        *,
        positions: int | None = None,
        multilabel: bool = False,
        class_dim: int | None = None,
        ignore_index: int = IGNORED,
        group: ProcessGroup | None = None,
    ) -> None:
        for name, value in {"samples": samples, "positions": positions}.items():
            if value is not None and not (isinstance(value, Integral) and value >= 1):
                raise OptionError(f"{name}={value!r} must be a whole number, at least 1.")
        if class_dim is not None and not isinstance(class_dim, Integral):
            raise OptionError(f"class_dim={class_dim!r} must be a whole number.")
        self.samples, self.group = int(samples), group
        positions = None if positions is None else int(positions)
        self._layout = Layout(self.samples, positions, multilabel, class_dim, ignore_index)
        self._state = new_state(self.samples * (positions or 1), torch.device("cpu"))
        self._waiting: list[Visits] = []  # a few updates, or all until the ranks gather
        self._ranks_of_waiting = 1
        self._left_out = torch.zeros((), dtype=torch.int64, device="cpu")

    def __copy__(self) -> Dynamics:
        """A whole copy: a shallow one would share the sums, and not what waits to be added."""
        return copy.deepcopy(self)

    @torch.no_grad()
    def update(self, ids: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Note one batch, as it was trained.

        Args:
            ids: Numbers of the batch's samples, whole, shape (samples,).
            logits: The model's outputs before the softmax: (samples, classes), (samples, classes,
                ...) or (samples, ..., classes); with one logit a label, the targets' shape.
            targets: The given labels, of shape (samples, ...). Of a causal language model, pass
                `logits[:, :-1]` and `labels[:, 1:]`.

        Raises:
            DataError: If shapes, ids or labels do not fit. (On a GPU, ids and labels are not looked
                at, which would wait for it: those out of range count for nothing.)
        """
        ids = self._check(ids, logits, targets)
        device, ranks = logits.device, self._ranks()
        if self._ranks_of_waiting != ranks and self._ranks_of_waiting == 1:
            self._take_up()
        self._ranks_of_waiting = ranks
        if self._left_out.device != device:
            if ranks == 1:
                self._take_up()
            self._state = moved(self._state, device)
            self._left_out = self._left_out.to(device)
        self._waiting.append(measure_visits(ids, logits, targets, self._layout))
        if len(self._waiting) >= _AT_ONCE and ranks == 1:
            self._take_up()

    def gather(self) -> None:
        """Take up what all ranks have noted: called by all of them, at the end of each epoch.

        Updates are taken up in their order, and each in that of the ranks. Does nothing in one
        process.
        """
        if self._ranks() > 1:
            if self._ranks_of_waiting == 1:  # noted before the ranks met
                self._take_up()
            self._waiting = gather_visits(self._waiting, self._left_out.device, self.group)
            self._take_up()

    def scores(self) -> dict[str, Tensor]:
        """The scores of every sample so far, by the names of `SCORES`.

        Returns:
            Tensors on the CPU of shape (samples,) or (samples, positions), float64; NaN for samples
            that training has not visited, and for halves of a single visit.

        Raises:
            StateError: If ranks have noted what has not been gathered.
        """
        self._take_up("scores()")
        state = {name: value[:-1].cpu() for name, value in self._state.items()}
        visits, forgotten, last_wrong, _ = state["counts"].double().unbind(1)
        n = torch.where(visits > 0, visits, torch.nan)
        loss, wrong = (state["sums"].double() / n[:, None]).unbind(1)
        mean, mean_square = (state["probability"].double() / n[:, None]).unbind(1)
        early, late = margin_halves(state)
        half = torch.where(visits > 1, visits / 2, torch.nan)
        found = {
            "area_under_margin": (early + late) / n,
            "cumulative_loss": loss,
            "mean_probability": mean,
            "wrong_share": wrong,
            "forgetting_events": forgotten + 0 * n,
            "learning_time": last_wrong + 1 + 0 * n,
            "variability": (mean_square - mean.square()).clamp_min(0).sqrt(),
            "early_margin": early / half,
            "late_margin": late / half,
            "last_loss": state["last_loss"][:, 0].double() + 0 * n,
            "visits": visits,
        }
        if outside := int(self._left_out):
            warnings.warn(
                f"{outside} visits had an id outside 0 to {self.samples - 1} or logits that are "
                "not finite, and were left out.",
                GradmaskWarning,
                stacklevel=2,
            )
        return {name: self._shaped(value) for name, value in found.items()}

    def suggestions(self) -> tuple[Tensor, Tensor]:
        """The class that training took each sample for, other than its label.

        It leads a vote in which each visit votes for the most probable other class with that
        class's probability q when the given label is excluded (a majority vote in constant memory:
        Boyer and Moore, 1981).

        Returns:
            The class of each sample (-1 for none: no visit, or a mean of several labels) and the
            mean of its q over all visits, those before it led counted as 0; of `scores`'s shape.

        Raises:
            StateError: If ranks have noted what has not been gathered.
        """
        self._take_up("suggestions()")
        counts, votes = (self._state[name][:-1].cpu() for name in ("counts", "votes"))
        share = votes[:, 1].double() / counts[:, 0].clamp_min(1)
        return self._shaped(counts[:, 3].long()), self._shaped(share)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, from which `load_state_dict` goes on to the bit.

        Raises:
            StateError: If ranks have noted what has not been gathered.
        """
        self._take_up("state_dict()")
        tensors = moved(self._state, self._left_out.device)
        for name, empty in new_state(0, self._left_out.device).items():
            tensors[name][-1:] = empty  # what belongs to no sample says nothing
        return {"version": 1, **self._size(), "left_out": self._left_out.clone(), **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Args:
            state: The state, of as many samples and positions.

        Raises:
            StateError: If it is of others, and nothing is changed then.
        """
        if not isinstance(state, Mapping) or state.get("version") != 1:
            raise StateError("This is not a state of Dynamics, or one of a later version.")
        found = {name: state.get(name) for name in self._size()}
        if found != self._size():
            raise StateError(f"The state is of {found}, and these dynamics are of {self._size()}.")
        wanted = {**self._state, "left_out": self._left_out}
        for name, value in wanted.items():
            kept = state.get(name)
            if not isinstance(kept, Tensor) or kept.shape != value.shape:
                raise StateError(f"The state is damaged: {name!r} is missing or of another shape.")
        self._state = moved({name: state[name] for name in self._state}, self._left_out.device)
        self._left_out = state["left_out"].to(self._left_out, copy=True)
        self._waiting.clear()

    def _check(self, ids: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """The ids as int64, in which no number of a sample is out of range."""
        for name, value in {"ids": ids, "logits": logits, "targets": targets}.items():
            if not isinstance(value, Tensor):
                raise DataError(f"{name} must be a tensor, and is a {type(value).__name__}.")
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        if not whole or ids.dim() != 1:
            raise DataError(
                f"ids of {ids.dtype} and shape {tuple(ids.shape)} must be whole numbers of shape "
                "(samples,): Indexed(dataset) yields them."
            )
        if not (targets.dim() and logits.dim()):
            raise DataError("logits and targets must have a dimension of samples, the first one.")
        ids = ids.long()
        if logits.device.type == "cpu":
            ids = ids.cpu()
        if not len(ids) == len(targets) == len(logits):
            raise DataError(
                f"{len(ids)} ids, {len(logits)} logits and {len(targets)} targets: one of each "
                "for every sample of the batch, samples first."
            )
        if ids.device.type == "cpu" and len(ids):
            lowest, highest = (int(found) for found in ids.aminmax())
            if lowest < 0 or highest >= self.samples:
                raise DataError(
                    f"ids from {lowest} to {highest}, and Dynamics({self.samples}) follows ids "
                    f"from 0 to {self.samples - 1}: give the whole training set's length."
                )
        return ids

    def _size(self) -> dict[str, Any]:
        positions = self._layout.positions
        return {
            "samples": self.samples,
            "positions": positions,
            "multilabel": self._layout.multilabel,
        }

    def _shaped(self, values: Tensor) -> Tensor:
        positions = self._layout.positions
        return values if positions is None else values.reshape(self.samples, positions)

    def _ranks(self) -> int:
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.group)

    @torch.no_grad()
    def _take_up(self, asked: str | None = None) -> None:
        """Add what waits to the state; `asked` is the call for which the ranks must have met."""
        if asked and self._waiting and self._ranks_of_waiting > 1:
            raise StateError(
                f"{asked} after updates of {self._ranks_of_waiting} ranks: call gather() on all "
                "ranks first, at the end of each epoch and before a checkpoint."
            )
        waiting, self._waiting = self._waiting, []  # none twice if this is interrupted
        for begin in range(0, len(waiting), _AT_ONCE):
            batches = waiting[begin : begin + _AT_ONCE]
            self._left_out += sum((visits.rows == REFUSED).sum() for visits in batches)
            add_visits(self._state, batches)
