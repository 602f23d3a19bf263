"""Scores by which a mask chooses entries: formula, what each needs, its cost, and its source."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from gradmask.distributed import local, shard_like
from gradmask.errors import DataError, OptionError, check_choice
from gradmask.selection import PER, WHICH

NEEDS = ("mean", "square", "weight", "protected", "random")


@dataclass(frozen=True)
class Measured:
    """What was measured of one parameter; tensors of its shape, means over samples.

    A score gets what it named in `needs`; asking for anything else is an error.

    Attributes:
        name: The parameter's name.
        tensors: By what they are.
    """

    name: str
    tensors: Mapping[str, Tensor]

    @property
    def mean(self) -> Tensor:
        """ḡ = E[g], the mean gradient."""
        return self._get("mean")

    @property
    def square(self) -> Tensor:
        """E[g²], the diagonal of the Fisher information."""
        return self._get("square")

    @property
    def weight(self) -> Tensor:
        """The parameter itself, w."""
        return self._get("weight")

    @property
    def protected(self) -> Tensor:
        """E[g²] on the data that are to be protected."""
        return self._get("protected")

    @property
    def random(self) -> Tensor:
        """A number for each entry, drawn evenly from [0, 1)."""
        return self._get("random")

    def _get(self, what: str) -> Tensor:
        if what not in self.tensors:
            raise OptionError(
                f"The score reads {what!r}, and has not named it: "
                f"register_score(..., needs=[{what!r}, ...])."
            )
        return self.tensors[what]


Measurements = Mapping[str, Mapping[str, Tensor]]  # by what it is, then by parameter name
ScoreFunction = Callable[[Measured], Tensor]
F = TypeVar("F", bound=ScoreFunction)


@dataclass(frozen=True)
class Score:
    """A number for each entry of the parameters, never negative.

    Attributes:
        name: As `FisherMask(score=...)` takes it.
        formula: In signs: g is one sample's gradient, ḡ its mean over samples, w the weight.
        needs: What it is made of (`NEEDS`).
        which: The end that was kept where it was published: `highest` or `lowest`.
        per: What it was published over: the whole `network`, or each `tensor`.
        cost: Beside training, relative to a pass (forward and backward) over the data it is
            measured on.
        source: Who published it.
        function: Makes it of one parameter.
    """

    name: str
    formula: str
    needs: frozenset[str]
    which: str
    per: str
    cost: str
    source: str
    function: ScoreFunction

    @property
    def reads_data(self) -> bool:
        """Whether it is measured on data, and not on the weights alone."""
        return bool(self.needs & {"mean", "square"})

    @property
    def compares(self) -> bool:
        """Whether it is of two data sets."""
        return "protected" in self.needs


SCORES: dict[str, Score] = {}
_NOTHING = 2.0**-500  # in place of a denominator of 0


def register_score(
    name: str,
    *,
    formula: str,
    needs: Collection[str],
    which: str = "highest",
    per: str = "network",
    cost: str = "",
    source: str = "",
) -> Callable[[F], F]:
    """Add a score to those that `FisherMask`, arms and `gradmask scores` know.

    Example:
        ```python
        @gradmask.register_score("noise", formula="E[g²] − ḡ²", needs=["mean", "square"])
        def noise(measured):
            return measured.square - measured.mean.square()
        ```

    Args:
        name: Its name, which a score has not yet.
        formula: In signs or words.
        needs: What the function reads: `mean`, `square`, `weight`, `protected`, `random`.
        which: The end that is usually kept.
        per: What it is usually ranked over.
        cost: Relative to a pass over the data.
        source: Who published it.

    Returns:
        A decorator of a function that takes `Measured`, of one parameter, and returns a tensor of
        its shape without negative values.

    Raises:
        OptionError: If the name is taken, or something else is unknown.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise OptionError(f"A score's name is a word like 'my_score', not {name!r}.")
    if name in SCORES:
        raise OptionError(f"There is a score {name!r} already: give another name.")
    if isinstance(needs, str) or not isinstance(needs, Collection) or not needs:
        raise OptionError(f"needs={needs!r} must be a list of {', '.join(NEEDS)}.")
    for need in needs:
        check_choice("need", need, NEEDS)
    if "protected" in needs and not {"mean", "square"} & set(needs):
        raise OptionError(
            "A score of the protected data alone is one of a single data set: name 'square', and "
            "protect by FisherMask(which='lowest').refresh(protect=loader)."
        )
    check_choice("which", which, WHICH)
    check_choice("per", per, PER)

    def register(function: F) -> F:
        SCORES[name] = Score(name, formula, frozenset(needs), which, per, cost, source, function)
        return function

    return register


def apply_score(score: Score, measured: Measurements) -> dict[str, Tensor]:
    """The score of every entry.

    Args:
        score: The score.
        measured: What it needs, each `{parameter name: tensor}`, of which DTensors have the same
            shards.

    Returns:
        `{parameter name: tensor of its shape}`, real, in at least float32.

    Raises:
        DataError: If it gives something of another shape.
    """
    first = next(iter(measured.values()))
    found = {}
    for name, like in first.items():
        parts = {what: local(of[name]) for what, of in measured.items() if what in score.needs}
        value = score.function(Measured(name, parts))
        if not isinstance(value, Tensor) or value.shape != local(like).shape or value.is_complex():
            raise DataError(
                f"The score {score.name!r} must give a real tensor of its parameter's shape "
                f"{tuple(like.shape)} for {name!r}."
            )
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        found[name] = shard_like(value, like)
    return found


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """The quotient of numbers that are not negative, always finite: 0 / 0 is 0.

    In float64, where a / 0 is larger than every quotient of float32 numbers, and the larger for a
    larger a: entries with nothing in the denominator are often many, and were they all alike, a
    mask could not choose among them.
    """
    a, b = a.double(), b.double()
    return (a / b.clamp_min(_NOTHING)).clamp(max=torch.finfo(a.dtype).max)


def _register(name: str, formula: str, *needs: str, **about: str) -> Callable[[F], F]:
    return register_score(name, formula=formula, needs=needs, **about)


_PASS, _BOTH = "1.1 to 1.5 passes", "1.2 to 1.7 passes"


@_register(
    "fisher",
    "E[g²]",
    "square",
    cost=_PASS,
    source="Jiang, equation 9; Xu et al., 2021 (Child-Tuning-D); Sung et al., 2021 (FISH)",
)
def _fisher(measured: Measured) -> Tensor:
    return measured.square


@_register(
    "signal_to_noise",
    "ḡ² / (E[g²] - ḡ²)",
    "mean",
    "square",
    cost=_BOTH,
    source="Liu et al., 2020 (GSNR)",
)
def _signal_to_noise(measured: Measured) -> Tensor:
    signal = measured.mean.abs().square()
    # The variance is a small difference of rounded numbers, which is not below their rounding.
    rounding = torch.finfo(signal.dtype).eps * measured.square
    return quotient(signal, (measured.square - signal).maximum(rounding))


@_register("saliency", "|ḡ|", "mean", cost=_BOTH, source="Fan et al., 2024 (SalUn)")
def _saliency(measured: Measured) -> Tensor:
    return measured.mean.abs()


@_register(
    "snip", "|ḡ w|", "mean", "weight", per="tensor", cost=_BOTH, source="Lee et al., 2019 (SNIP)"
)
def _snip(measured: Measured) -> Tensor:
    return (measured.mean * measured.weight).abs()


@_register(
    "fisher_weight",
    "E[g²] w²",
    "square",
    "weight",
    cost=_PASS,
    source="Theis et al., 2018 (Fisher pruning)",
)
def _fisher_weight(measured: Measured) -> Tensor:
    return measured.square * measured.weight.abs().square()


@_register(
    "magnitude", "|w|", "weight", per="tensor", cost="none", source="Han et al., 2015 (pruning)"
)
def _magnitude(measured: Measured) -> Tensor:
    return measured.weight.abs()


@_register(
    "gradient_to_weight",
    "|ḡ| / |w|",
    "mean",
    "weight",
    per="tensor",
    cost=_BOTH,
    source="Kang et al., 2025 (GEM)",
)
def _gradient_to_weight(measured: Measured) -> Tensor:
    return quotient(measured.mean.abs(), measured.weight.abs())


@_register("random", "drawn evenly, afresh at each refresh", "random", cost="none")
def _random(measured: Measured) -> Tensor:
    return measured.random


@_register(
    "ratio",
    "E[g²] / E[g²] on the protected data",
    "square",
    "protected",
    cost="twice " + _PASS,
    source="Foster et al., 2024 (selective synaptic dampening)",
)
def _ratio(measured: Measured) -> Tensor:
    return quotient(measured.square, measured.protected)
