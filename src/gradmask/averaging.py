"""An exponential average of what is measured, over the refreshes of a mask."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from gradmask.distributed import Groups, local, shard_like, sum_over
from gradmask.errors import OptionError, StateError
from gradmask.mask_state import placed
from gradmask.scores import Measurements

AVERAGED = {"mean": 0.5, "square": 1.0, "protected": 1.0}  # and the power of g²'s scale


class RunningAverage:
    """Â_t = (1 − β) Σ_s β^(t−s) c_s A_s / (1 − β^t), of moments A_s measured at refresh s.

    c_s makes the mean of all entries of E[g²] 1: information falls over training by orders of
    magnitude, and old refreshes would outweigh new ones. Masks do not depend on it.

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
        self.refreshes: int = 0
        self.sums: dict[str, dict[str, Tensor]] = {}

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
        new.refreshes = self.refreshes + 1
        corrected = 1 - self.beta**new.refreshes
        for what in [what for what in measured if what in AVERAGED]:
            values = measured[what]
            scale = _scale(measured["protected" if what == "protected" else "square"], groups)
            old = self.sums.get(what, {})
            new.sums[what] = {
                name: shard_like(
                    local(value).mul((1 - self.beta) * scale ** AVERAGED[what])
                    + (self.beta * local(old[name]) if name in old else 0),
                    value,
                )
                for name, value in values.items()
            }
            found[what] = {
                name: shard_like(local(value) / corrected, value)
                for name, value in new.sums[what].items()
            }
        return new, found

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors by `what/name`."""
        sums = {
            f"{what}/{name}": value for what, of in self.sums.items() for name, value in of.items()
        }
        return {"beta": self.beta, "refreshes": self.refreshes, "sums": sums}

    def load_state_dict(self, state: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        """Go on from what `state_dict` returned.

        Args:
            state: The state, of the same β.
            parameters: The model's trainable parameters by name, where the averages belong.

        Raises:
            StateError: If it is of another, or damaged; nothing is changed then.
        """
        sound = isinstance(state, dict) and isinstance(state.get("sums"), dict)
        if not sound or type(state.get("refreshes")) is not int:
            raise StateError("The state's average over refreshes is missing or damaged.")
        if state.get("beta") != self.beta:
            raise StateError(
                f"The state was saved with average={state.get('beta')}, and this mask has "
                f"average={self.beta}: build it with the same options."
            )
        sums: dict[str, dict[str, Tensor]] = {}
        for key, value in state["sums"].items():
            what, _, name = str(key).partition("/")
            shape = getattr(parameters.get(name), "shape", None)
            if what not in AVERAGED or not isinstance(value, Tensor) or value.shape != shape:
                raise StateError(
                    "The state's average over refreshes is damaged, or of another model."
                )
            sums.setdefault(what, {})[name] = placed(value, parameters[name])
        self.refreshes, self.sums = state["refreshes"], sums


def _scale(squares: Mapping[str, Tensor], groups: Groups) -> float:
    """1 / the mean of all entries; 1 if all are 0."""
    parts = [local(t) for t in squares.values()]
    own = sum(float(t.double().sum()) for t in parts), sum(t.numel() for t in parts)
    numbers = torch.tensor(own, dtype=torch.float64, device="cpu")
    total, entries = sum_over(numbers, groups).tolist()
    return entries / total if total > 0 else 1.0
