"""An exponential average of what is measured, over the refreshes of a mask."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from gradmask.distributed import Groups, local, shard_like, sum_over
from gradmask.errors import OptionError, StateError
from gradmask.mask_state import placed
from gradmask.scores import Measurements

# Averaged moments; the power with which each grows where gradients squared do.
AVERAGED = {"mean": 0.5, "square": 1.0, "protected": 1.0}

Averages = dict[str, dict[str, Tensor]]  # by what they are of, then by parameter name


class RunningAverage:
    """Â_t = [(1 − β) A_t + β (1 − β^(t−1)) c_t Â_(t−1)] / (1 − β^t), of moments A_t at refresh t.

    c_t brings the mean of E[g²] at earlier refreshes to that of this one: information falls over
    training by orders of magnitude, and old refreshes would outweigh new ones. Each parameter has a
    count t of its own, so that one thawed or replaced later begins with what is measured then.

    Args:
        beta: β, in [0, 1).

    Raises:
        OptionError: If it is not.
    """

    def __init__(self, beta: float) -> None:
        if not isinstance(beta, Real) or not 0 <= float(beta) < 1:
            raise OptionError(
                f"average={beta!r} must be in [0, 1): the weight of earlier refreshes, such as 0.5."
            )
        self.beta: float = float(beta)
        self.averages: Averages = {}
        self.refreshes: dict[str, dict[str, int]] = {}  # likewise

    def add(
        self, measured: Measurements, groups: Groups
    ) -> tuple[RunningAverage, dict[str, Mapping[str, Tensor]]]:
        """Add what a refresh measured; this average itself stays as it is.

        Args:
            measured: By what it is, `{parameter name: tensor}`.
            groups: Ranks over which the parameters are sharded.

        Returns:
            The new average, and what was measured with its moments averaged.
        """
        new, found = RunningAverage(self.beta), dict(measured)
        for what in [what for what in measured if what in AVERAGED]:
            values = measured[what]
            old = {
                name: average
                for name, average in self.averages.get(what, {}).items()
                if name in values and local(values[name]).shape == local(average).shape
            }
            squares = "protected" if what == "protected" else "square"
            now = _mean(measured[squares], old, groups)
            before = _mean(self.averages.get(squares, {}), old, groups)
            scale = (now / before) ** AVERAGED[what] if now > 0 and before > 0 else 1.0
            counts = {name: self.refreshes[what][name] + 1 if name in old else 1 for name in values}
            new.refreshes[what] = counts
            new.averages[what] = {
                name: self._mix(value, old[name], scale, counts[name]) if name in old else value
                for name, value in values.items()
            }
            found[what] = new.averages[what]
        return new, found

    def _mix(self, value: Tensor, old: Tensor, scale: float, count: int) -> Tensor:
        weight = (1 - self.beta) / (1 - self.beta**count)
        now = local(value)
        earlier = local(old).to(now.device, now.dtype)
        scale = min((1 - weight) * scale, torch.finfo(now.dtype).max)
        return shard_like(now * weight + earlier * scale, value)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors by `what/name`."""
        return {
            "beta": self.beta,
            "refreshes": {what: dict(counts) for what, counts in self.refreshes.items()},
            "sums": {
                f"{what}/{name}": value
                for what, averages in self.averages.items()
                for name, value in averages.items()
            },
        }

    def load_state_dict(self, state: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        """Go on from what `state_dict` returned.

        Args:
            state: The state, of the same β.
            parameters: The model's trainable parameters by name, where the averages belong.

        Raises:
            StateError: If it is of another, or damaged; nothing is changed then.
        """
        sound = isinstance(state, dict) and isinstance(state.get("sums"), dict)
        if not sound or not isinstance(state.get("refreshes"), dict):
            raise StateError("The state's average over refreshes is missing or damaged.")
        if state.get("beta") != self.beta:
            raise StateError(
                f"The state was saved with average={state.get('beta')}, and this mask has "
                f"average={self.beta}: build it with the same options."
            )
        averages: Averages = {}
        refreshes: dict[str, dict[str, int]] = {}
        for key, value in state["sums"].items():
            what, _, name = str(key).partition("/")
            counts = state["refreshes"].get(what)
            count = counts.get(name) if isinstance(counts, dict) else None
            shape = getattr(parameters.get(name), "shape", None)
            known = what in AVERAGED and isinstance(value, Tensor) and value.shape == shape
            if not known or type(count) is not int or count < 1 or not _possible(value, what):
                raise StateError(
                    "The state's average over refreshes is damaged, or of another model."
                )
            averages.setdefault(what, {})[name] = placed(value, parameters[name])
            refreshes.setdefault(what, {})[name] = count
        self.averages, self.refreshes = averages, refreshes


def _possible(value: Tensor, what: str) -> bool:
    """Whether the numbers can be an average: finite, and those of squares not negative."""
    numbers = local(value)
    return bool(numbers.isfinite().all()) and (what == "mean" or not bool((numbers < 0).any()))


def _mean(squares: Mapping[str, Tensor], names: Collection[str], groups: Groups) -> float:
    """Mean of all entries of the tensors that are named, over all shards; 0 of none."""
    parts = [local(squares[name]) for name in names if name in squares]
    # Exact, so that the order of a file's entries does not matter.
    own = math.fsum(float(t.double().sum()) for t in parts), sum(t.numel() for t in parts)
    numbers = torch.tensor(own, dtype=torch.float64, device="cpu")
    total, entries = sum_over(numbers, groups).tolist()
    return float(total / entries) if entries else 0.0
