"""Which run of a study is meant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gradmask.study.arms import read_arm
from gradmask.study.results import Row, values_of


@dataclass(frozen=True)
class Spec:
    """What tells a run from the others of its study.

    Attributes:
        arm: Name of the arm.
        seed: The seed.
        values: Values of a sweep.
    """

    arm: str
    seed: int
    values: Mapping[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.arm, self.seed, str(self.values)))

    @classmethod
    def of(cls, run: Row) -> Spec:
        """That of one of the runs of `results.json`."""
        return cls(run["arm"], run["seed"], values_of(run))

    @property
    def title(self) -> str:
        """The run in words."""
        values = [f"{name} {value}" for name, value in self.values.items()]
        return ", ".join([read_arm(self.arm).title, *values, f"seed {self.seed}"])

    def as_row(self) -> Row:
        """The run as `results.json` names it."""
        values = {"values": dict(self.values)} if self.values else {}
        return {"arm": self.arm, "seed": self.seed, **values}
