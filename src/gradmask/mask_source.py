"""What a mask is made of: measured in a pass of its own, or in training, or averaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gradmask.averaging import RunningAverage
from gradmask.collect import Collector
from gradmask.distributed import Groups, data_groups, shard_groups, unwrapped, warn_if_alone
from gradmask.errors import OptionError, StateError, check_max_samples
from gradmask.fisher.adapter import Unpack, check_unpack
from gradmask.fisher.likelihood import Loss, check_likelihood
from gradmask.fisher.losses import standard_loss
from gradmask.mask_warnings import without_log
from gradmask.parameters import trainable_parameters
from gradmask.scores import Score, apply_score
from gradmask.scoring import check_data, find_score, measure, of_weights
from gradmask.seeding import derive_seed

_NOTHING: dict[str, Any] = {"seen": 0, "weight": 0.0, "sums": {}}  # of what is collected
_AVERAGED = "average over refreshes/"  # before names of tensors in a file


class ScoreSource:
    """Measures a score of every entry of a model, refresh by refresh.

    Args:
        model: The model, wrapped if it is on many processes.
        score: Name of the score.
        kind: Labels of the Fisher information.
        loss: Negative log-likelihood.
        max_samples: Size of the random part of the data that is measured.
        seed: Seed of random parts, drawn labels and random scores.
        group: Ranks that measure together.
        unpack: From a batch to `(inputs, targets)`.
        average: β of an exponential average over refreshes.

    Raises:
        OptionError: If an option is out of range or unknown.
        ModelError: If the model has no trainable parameters, or cannot be measured in shards.
    """

    def __init__(
        self,
        model: nn.Module,
        score: str,
        *,
        kind: str,
        loss: Loss | None,
        max_samples: int | None,
        seed: int,
        group: ProcessGroup | None,
        unpack: Unpack | None,
        average: float | None,
    ) -> None:
        check_likelihood(kind, standard_loss(loss))
        find_score(score, kind)  # refuses one that is unknown
        self._average = None if average is None else RunningAverage(average)
        check_max_samples(max_samples)
        check_unpack(unpack)
        trainable_parameters(model, loss)  # refuses a model that has none
        self._wrapped, self._group = model, group
        warn_if_alone(data_groups(model, group))  # refuses shards that cannot be measured
        self.model, self.score = unwrapped(model), score
        self.kind, self.loss, self.unpack = kind, loss, unpack
        self.seed = int(seed)  # NumPy's numbers do not seed as Python's do
        self.max_samples = None if max_samples is None else int(max_samples)
        self._collector: Collector | None = None

    @property
    def _score(self) -> Score:
        """Looked up by its name: a score of the user's own may be a function that no copy holds."""
        return find_score(self.score, self.kind)

    def collect(
        self, *, every: int | None = None, average: float | None = None, scale: float | None = None
    ) -> Collector:
        """Measure training's own backward passes; `refresh()` then makes the mask of them.

        Example:
            ```python
            for inputs, targets in loader:
                optimizer.zero_grad()
                with mask.collect(every=10):
                    criterion(model(inputs), targets).backward()
                optimizer.step()
            mask.refresh()
            ```

        Args:
            every: Collect one of so many batches (forward passes in train mode); default: each.
            average: β of an exponential average over batches; default: the mean of all batches
                since the last refresh.
            scale: What the loss multiplies each sample's own loss by (see `Collector`).

        Returns:
            A context manager, for one training step or around all of them. Each call returns the
            same one, with these options if there are any.

        Raises:
            OptionError: If an option is out of range, or the mask is of another kind of labels.
            ModelError: If the model cannot be measured while it trains.
        """
        self._check_measured()
        if self.kind != "empirical":
            raise OptionError(
                f"kind={self.kind!r} draws labels of its own, and training has those of the data: "
                "use kind='empirical', or mask.refresh(loader)."
            )
        if "mean" in self._score.needs or self._score.compares or not self._score.reads_data:
            raise OptionError(
                f"score={self.score!r} is not made of the squares that training's own backward "
                "passes give: use mask.refresh(loader)."
            )
        given = every is not None or average is not None or scale is not None
        options: dict[str, Any] = {"average": average, "scale": scale}
        options["every"] = 1 if every is None else every
        if self._collector is None:
            self._collector = Collector(self._wrapped, self.loss, **options)
        elif given:
            self._collector.set(**options)
        return self._collector

    def _scores(
        self, loader: Any, protect: Any, refresh: int, groups: Groups, unused: set[str]
    ) -> tuple[dict[str, Tensor], RunningAverage | None]:
        """The score of every entry, from data or from what was collected.

        Args:
            loader: The data; None for what was collected, or a score of the weights alone.
            protect: The data to protect, or None.
            refresh: Number of the refresh, for its draws.
            groups: Ranks that measure together.
            unused: A set to which unused names are added.

        Returns:
            The score, and the average over refreshes that is to be kept once the mask is made.
        """
        score, seed = self._score, derive_seed(self.seed, "fisher", refresh)
        if loader is None and score.reads_data and not score.compares:
            square = self._collected(groups)
            measured = {"square": square, **of_weights(self.model, score, self.loss, seed)}
        else:
            measured = self._measure(loader, protect, self.max_samples, seed, unused)
        average = self._average
        if average is not None:
            average, measured = average.add(measured, shard_groups(self.model.parameters()))
        return apply_score(score, measured), average

    def _collected(self, groups: Groups) -> dict[str, Tensor]:
        if self._collector is None:
            raise OptionError(
                "mask.refresh() needs a loader to measure on, or a mask that collects while it "
                "trains: FisherMask(..., refresh='online'), or mask.collect()."
            )
        square = self._collector.diagonal(groups)
        if self._collector.average is None:
            self._collector.clear()
        return square

    def _measure(
        self,
        loader: Any,
        protect: Any,
        samples: int | None,
        seed: int,
        unused: set[str] | None = None,
    ) -> dict[str, Mapping[str, Tensor]]:
        options: dict[str, Any] = {"kind": self.kind, "loss": self.loss, "group": self._group}
        options |= {"max_samples": samples, "seed": seed, "unused": unused, "unpack": self.unpack}
        return measure(self._wrapped, self._score, loader, protect, **options)

    def _check_data(self, loader: Any, protect: Any) -> None:
        """Measure two samples, unless an iterator would be used up by that."""
        check_data(self._score, loader, protect)
        read_once = isinstance(loader, Iterator) or isinstance(protect, Iterator)
        if self._score.reads_data and not read_once:
            with without_log():  # that two samples are few is meant
                self._measure(loader, protect, 2, self.seed)

    def _check_measured(self) -> None:
        """Raise an error if nothing may be measured."""

    def _measured_state(self) -> dict[str, Any]:
        """What was collected in training, and the average over refreshes."""
        kept = {"collected": self._collector, "averaged": self._average}
        return {name: part.state_dict() for name, part in kept.items() if part is not None}

    def _load_measured(self, state: Mapping[str, Any]) -> None:
        """Go on from what a state has of them; nothing changes unless all of it fits."""
        average = None
        if self._average is not None:
            average = RunningAverage(self._average.beta)
            parameters = trainable_parameters(self.model, self.loss)
            average.load_state_dict(state.get("averaged"), parameters)
        elif "averaged" in state:
            raise StateError("The state has an average over refreshes: build the mask with it.")
        collected = state.get("collected")
        if self._collector is not None or collected is not None:
            (self._collector or self.collect()).load_state_dict(collected or _NOTHING)
        self._average = average

    def _numbers_and_sums(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The same state for a file: numbers, and tensors by name."""
        numbers: dict[str, Any] = self._measured_state()
        sums: dict[str, Tensor] = {}
        for name, prefix in {"collected": "", "averaged": _AVERAGED}.items():
            if name in numbers:
                sums |= {prefix + key: value for key, value in numbers[name].pop("sums").items()}
        return numbers, sums

    @staticmethod
    def _give_sums(numbers: dict[str, Any], sums: Mapping[str, Tensor]) -> None:
        """Put the tensors of a file back to their numbers."""
        averaged = {key for key in sums if key.startswith(_AVERAGED)}
        parts = {
            "collected": {key: sums[key] for key in sums.keys() - averaged},
            "averaged": {key.removeprefix(_AVERAGED): sums[key] for key in averaged},
        }
        for name, found in parts.items():
            if name in numbers:
                numbers[name]["sums"] = found
