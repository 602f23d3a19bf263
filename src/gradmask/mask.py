"""The gradient mask, attached to an optimizer (equation 10)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from gradmask.distributed import check_same, data_groups, reshard, shard_groups
from gradmask.errors import OptionError, check_choice, check_keep
from gradmask.fisher.adapter import Unpack
from gradmask.fisher.likelihood import Loss
from gradmask.mask_files import masks_sha256, read_state, save_masks
from gradmask.mask_source import ScoreSource
from gradmask.mask_state import check_masks, check_shapes, check_state, of_plain_model, placed
from gradmask.mask_warnings import warn_of_unused, warn_of_use
from gradmask.parameters import trainable_parameters
from gradmask.seeding import seeded_generator
from gradmask.selection import check_selection, kept_counts, make_masks
from gradmask.steps import MaskedSteps

SCOPES = ("gradient", "update")
# The mask from so many samples shares 92 to 95 % with that from all (docs/performance.md).
MAX_SAMPLES = 4000
_OPTIONS = ("keep", "scope", "strategy", "kind", "max_samples", "seed")
# Not in the states of earlier versions.
_LATER = {"which": "highest", "per": "network", "score": "fisher"}


class FisherMask(ScoreSource):
    """Mask the gradients of the parameters with the least Fisher information, or another score.

    θ ← θ − α (g ⊙ M), M_j = 1 where a_jj ≥ k, else 0 (equation 10 of L. Jiang, "Gradient mask and
    neural network generalization"). Until the first `refresh` nothing is masked.

    On many processes give the model wrapped, in `DistributedDataParallel` or after `fully_shard`:
    every rank refreshes with its own part of the data, and all have the same mask, sharded as the
    parameters are.

    Example:
        ```python
        mask = gradmask.FisherMask(model, keep=0.25)
        mask.attach(optimizer)
        for epoch in range(epochs):
            train_one_epoch(...)
            mask.refresh(loader)
        ```

    Args:
        model: The model that is trained.
        keep: Share of all trainable parameters together that still learn, in (0, 1].
        scope: `gradient` zeroes masked gradients: momentum and weight decay of the optimizer still
            move a masked weight. `update` also puts masked weights back after the step.
        score: What entries are chosen by: `fisher`, or another of `gradmask.SCORES` (listed by
            `gradmask scores`), to which `register_score` adds.
        strategy: `fisher`, which is by the score, or a control of the same share: `random`,
            `random_matched` (the share of every tensor as by the score) or `inverse` (the lowest).
        which: Keep the entries with the `highest` score, or the `lowest`.
        per: One threshold for the whole `network`, or one for each `tensor`.
        kind: Labels of the Fisher information: `empirical`, `sampled` or `exact`.
        loss: Negative log-likelihood: `cross_entropy`, `bernoulli`, `mse` or a callable; the
            trainable parameters of a module are masked as well, as `loss.<name>`. Default:
            `cross_entropy`, or with batches that are mappings the model's own loss.
        max_samples: Size of the random part of the data a refresh measures on; None for all of it.
        seed: Seed of random parts, drawn labels and random masks; each refresh draws afresh.
        group: Ranks that train the model together (default: those it is wrapped for).
        unpack: From a batch of the loader to `(inputs, targets)` (see `fisher_diagonal`).
        refresh: `pass`: `refresh(loader)` measures in a pass of its own, in eval mode. `online`:
            training's own backward passes are measured (`collect`) from `attach` to `detach`, and
            `refresh()` makes the mask of what was collected.
        every: With `online`: collect one of so many batches.
        average: β of an exponential average of what is measured, over refreshes; each refresh
            counts for its information's proportions, not its size (`RunningAverage`).

    Raises:
        OptionError: If an option is out of range or unknown, or does not fit the score.
        ModelError: If the model has no trainable parameters, or cannot be measured in shards.
    """

    def __init__(
        self,
        model: nn.Module,
        keep: float = 0.25,
        *,
        scope: str = "gradient",
        score: str = "fisher",
        strategy: str = "fisher",
        which: str = "highest",
        per: str = "network",
        kind: str = "empirical",
        loss: Loss | None = None,
        max_samples: int | None = MAX_SAMPLES,
        seed: int = 0,
        group: ProcessGroup | None = None,
        unpack: Unpack | None = None,
        refresh: str = "pass",
        every: int = 10,
        average: float | None = None,
    ) -> None:
        check_keep(keep)
        check_choice("refresh", refresh, ("pass", "online"))
        check_choice("scope", scope, SCOPES)
        check_selection(strategy, which, per)
        options: dict[str, Any] = {"kind": kind, "loss": loss, "max_samples": max_samples}
        options |= {"seed": seed, "group": group, "unpack": unpack, "average": average}
        super().__init__(model, score, **options)
        self.scope, self.strategy, self.which, self.per = scope, strategy, which, per
        self.keep = float(keep)  # NumPy's numbers would not load without pickle
        self.refreshes = 0
        self._kept: dict[str, int] = {}
        self._warned = False
        self._steps = MaskedSteps(self.model, scope, loss)
        self._online = self.collect(every=every) if refresh == "online" else None

    @classmethod
    def from_masks(
        cls,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        *,
        scope: str = "gradient",
        group: ProcessGroup | None = None,
    ) -> FisherMask:
        """A fixed mask, measured elsewhere: `refresh` and `update` raise an error.

        Every trainable parameter needs a mask, so that none learns or stands still by mistake:
        give one of ones or zeros, or freeze it. `masks_from_indices` fills in what a list of
        entries that learn leaves out.

        Args:
            model: The model that is trained.
            masks: `{parameter name: bool tensor}`, True where it learns.
            scope: As of any mask: with `update` not even weight decay moves a masked weight.
            group: Ranks that train the model together (default: those it is wrapped for).

        Returns:
            The mask, in force from the first step after `attach`.

        Raises:
            OptionError: If the scope is unknown.
            StateError: If a name, shape or type does not fit the model's trainable parameters.
        """
        mask = cls(model, scope=scope, group=group)
        check_masks(masks := of_plain_model(masks), mask._trainable())
        mask.strategy = "fixed"
        mask.load_state_dict(mask.state_dict() | {"masks": dict(masks)})
        mask.keep = mask.kept_fraction
        return mask

    @property
    def masks(self) -> dict[str, Tensor]:
        """The mask of every parameter by name, True where it learns. Empty before a refresh."""
        self._steps.used = True  # by hand, perhaps
        return self._steps.masks

    @masks.setter
    def masks(self, masks: dict[str, Tensor]) -> None:
        self._steps.masks = masks

    def attach(self, optimizer: Optimizer) -> FisherMask:
        """Mask every following step of an optimizer, through its own step hooks.

        Of one that wraps others (Accelerate's, Lightning's, SAM, Lookahead) all are hooked that
        hold parameters of the model. The mask keeps no optimizer alive. A copy (`copy.deepcopy`,
        `pickle`) of mask, model and optimizer together is attached as they are.

        From here on a refresh notices weights that were moved where the mask could not hold them.

        Args:
            optimizer: Any `torch.optim` optimizer over parameters of the model, except L-BFGS, and
                with `scope="update"` those that rewrite weights outside their step.

        Returns:
            The mask itself.

        Raises:
            OptimizerError: If it is no optimizer, is one that cannot be masked, has none of the
                model's parameters, or has the mask already. Nothing is attached then.
        """
        self._steps.attach(optimizer)
        if self._online is not None:
            self._online.start()
        return self

    def detach(self) -> None:
        """Take the mask off every optimizer it is attached to, and stop collecting."""
        self._steps.detach()
        if self._online is not None:
            self._online.stop()

    def refresh(
        self, loader: Iterable[Any] | None = None, *, protect: Iterable[Any] | None = None
    ) -> None:
        """Measure the Fisher diagonal, or the score's data, and make the mask of the next epoch.

        Args:
            loader: Iterable of batches (see `fisher_diagonal`); None for what `collect` collected
                in training since the last refresh, and for scores of the weights alone.
            protect: Batches of the data whose skills must stay. A score of two data sets (`ratio`)
                compares `loader` with them. Any other is measured on them in place of `loader`, and
                what they need least learns: `which="lowest"`.

        Raises:
            ModelError: If the model cannot be measured.
            DataError: If the data cannot be used, or the loss is not finite. The mask stays.
            OptimizerError: If weights were moved where the mask could not hold them. It stays.
            DistributedError: If that happened on another rank.
            OptionError: If the ranks' options differ, the mask is fixed, or data are missing.
        """
        self._check_measured()
        loader, protect = self._read(loader, protect)
        same = {"seed": self.seed, "refreshes": self.refreshes, "keep": self.keep}
        groups = data_groups(self._wrapped, self._group)
        check_same(same, groups)
        self._steps.check(groups)
        if self.strategy == "random":  # needs shapes only
            reshard(self.model)
            self.update({name: p.detach() for name, p in self._trainable().items()})
            return
        unused: set[str] = set()
        values, average = self._scores(loader, protect, self.refreshes, groups, unused)
        if unused:
            warn_of_unused(values, unused)
        self.update(values, unused)
        self._average = average

    def check(self, loader: Iterable[Any], *, protect: Iterable[Any] | None = None) -> None:
        """Measure two samples, so that data, loss or model that do not fit are told at once.

        Mask and count of refreshes stay; random states and the loader as with `refresh`. Nothing
        is measured for `random` and fixed masks, nor on an iterator, which that would use up. On
        many processes all must call it.

        Args:
            loader: What `refresh` will get.
            protect: Likewise.

        Raises:
            ModelError: If the model cannot be measured.
            DataError: If the data cannot be used, or the loss is not finite.
            DistributedError: If that happened on another rank.
            OptionError: If data are missing, or without use.
        """
        data, protect = self._read(loader, protect)
        if self.reads_data:
            self._check_data(data, protect)

    def update(self, fisher: dict[str, Tensor], unused: Collection[str] = ()) -> None:
        """Make the mask from a Fisher diagonal, or scores, that were measured already.

        Args:
            fisher: `{parameter name: tensor}` for all trainable parameters; the same on all ranks,
                or DTensors for sharded parameters. Of another score what `parameter_scores` gives.
                It does not enter an average over refreshes.
            unused: Names on which the loss does not depend in eval mode (`fisher_diagonal` tells
                them). They learn, whatever the others' threshold is.

        Raises:
            StateError: If names or shapes are not those of the model's trainable parameters.
            DataError: If values are NaN, infinite or negative (`random` reads only the shapes).
            OptimizerError: If weights were moved where the mask could not hold them. It stays.
            OptionError: If the mask is fixed.
        """
        self._check_measured()
        measured = "Fisher diagonal" if self.score == "fisher" else f"score {self.score!r}"
        check_shapes(fisher, self._trainable(), measured)
        self._steps.check(shard_groups(self.model.parameters()))
        generator = seeded_generator(self.seed, "mask", self.refreshes)
        used = {name: f for name, f in fisher.items() if name not in unused}
        if not self._warned:
            self._warned = warn_of_use(self._steps, used, self.keep)
        options: dict[str, Any] = {"strategy": self.strategy, "which": self.which, "per": self.per}
        masks = make_masks(used, self.keep, generator=generator, **options)
        masks |= {name: torch.ones_like(fisher[name], dtype=torch.bool) for name in unused}
        self.masks = {name: masks[name] for name in fisher}
        self._kept = kept_counts(self._steps.masks)
        self._steps.masks_made()
        self.refreshes += 1

    def apply_(self) -> None:
        """Mask the gradients in place now, for example before clipping; twice does no harm."""
        self._steps.apply()

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """Mask the gradients and clip what is left, in place: `apply_` and clipping in one pass.

        In place of `torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)` before
        `optimizer.step()`, which then need not mask again.

        Args:
            max_norm: The largest norm of all gradients together.
            norm_type: Which norm; 2 is the quick one.
            error_if_nonfinite: Raise an error if the norm is NaN or infinite.

        Returns:
            The norm of the masked gradients before clipping.

        Raises:
            RuntimeError: If the norm is not finite, and must be.
        """
        return self._steps.clip(max_norm, norm_type, finite=error_if_nonfinite)

    @property
    def reads_data(self) -> bool:
        """Whether a refresh reads data; random and fixed masks, and scores of weights, do not."""
        return self.strategy not in ("random", "fixed") and self._score.reads_data

    @property
    def kept_fraction(self) -> float:
        """Share of all trainable parameters that learn now, as realised (1 before a refresh)."""
        if not self._steps.masks:
            return 1.0
        return sum(self._kept.values()) / sum(m.numel() for m in self._steps.masks.values())

    @property
    def kept_fractions(self) -> dict[str, float]:
        """The same share for every parameter by name."""
        if not self._steps.masks:
            return dict.fromkeys(self._trainable(), 1.0)
        # A parameter without entries has nothing masked.
        return {
            n: self._kept[n] / m.numel() if m.numel() else 1.0 for n, m in self._steps.masks.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Options, refresh count and masks; plain values and tensors that load without pickle.

        Masks of sharded parameters are DTensors, for `torch.distributed.checkpoint`.
        """
        masks = {name: mask.clone() for name, mask in self.masks.items()}
        state = {**self._counted(), "masks": masks}
        return state | self._measured_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; nothing changes unless all of it fits.

        Args:
            state: What `state_dict` returned, from a mask with the same options. Whole masks are
                cut to the shards that the parameters are in.

        Raises:
            StateError: If the state is of another version, other options or another model.
        """
        earlier = {**_LATER, **state} if isinstance(state, dict) else state
        check_state(earlier, {**_LATER, **self._options()})
        masks = of_plain_model(state["masks"])
        if masks:
            check_shapes(masks, self._trainable(), "state")
        self._load_measured(state)
        self._steps.read_parameters()
        parameters = self._steps.parameters
        self.masks = {name: placed(mask, parameters[name]) for name, mask in masks.items()}
        self._kept = kept_counts(self._steps.masks)
        self.refreshes = state["refreshes"]
        self._steps.masks_loaded()

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file, whole or not at all.

        With sharded parameters every rank must call, and rank 0 writes.

        Args:
            path: The file; its folder must exist. `gradmask.load_masks` reads its masks alone.

        Raises:
            ImportError: If safetensors is not installed.
        """
        numbers, sums = self._numbers_and_sums()
        save_masks(path, self.masks, {**self._counted(), **numbers}, sums)

    def load(self, path: str | Path) -> None:
        """Go on from a file that `save` wrote; nothing changes unless all of it fits.

        Args:
            path: The file, of a mask with the same options.

        Raises:
            StateError: If the file is damaged or another one, or the state does not fit.
            ImportError: If safetensors is not installed.
        """
        masks, rest, sums = read_state(path)
        self._give_sums(rest, sums)
        self.load_state_dict({**rest, "masks": masks})

    def sha256(self) -> str:
        """SHA-256 of the state as digits; with sharded parameters every rank must call."""
        numbers, sums = self._numbers_and_sums()
        return masks_sha256(self._steps.masks, {**self._counted(), **numbers}, sums)

    def _read(self, loader: Any, protect: Any) -> tuple[Any, Any]:
        """The data that are measured, and those that a score of two data sets compares with."""
        if self.strategy == "random":  # which data do not change
            return loader, None
        if protect is None or self._score.compares:
            return loader, protect
        if self.which == "highest" and self.strategy != "inverse":
            raise OptionError(
                "which='highest' would move what the protected data need most: build "
                "FisherMask(which='lowest'), or score='ratio'."
            )
        if not self._score.reads_data:
            raise OptionError(f"score={self.score!r} reads no data that could be protected.")
        return protect, None

    def _check_measured(self) -> None:
        if self.strategy == "fixed":
            raise OptionError(
                "This mask is fixed (FisherMask.from_masks): to have it measured, build "
                "FisherMask(model, keep) and attach that one."
            )

    def _counted(self) -> dict[str, Any]:
        return {"version": 1, **self._options(), "refreshes": self.refreshes}

    def _trainable(self) -> dict[str, nn.Parameter]:
        return trainable_parameters(self.model, self.loss)

    def _options(self) -> dict[str, Any]:
        later = {name: getattr(self, name) for name in _LATER}
        changed = {name: value for name, value in later.items() if value != _LATER[name]}
        return {name: getattr(self, name) for name in _OPTIONS} | changed
