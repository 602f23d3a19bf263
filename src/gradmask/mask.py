"""The gradient mask, attached to an optimizer (equation 10)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from gradmask.collect import Collector
from gradmask.distributed import (
    Groups,
    check_same,
    data_groups,
    reshard,
    shard_groups,
    unwrapped,
    warn_if_alone,
)
from gradmask.errors import (
    OptionError,
    check_choice,
    check_keep,
    check_max_samples,
)
from gradmask.fisher.adapter import Unpack, check_unpack
from gradmask.fisher.diagonal import fisher_diagonal
from gradmask.fisher.likelihood import Loss, check_likelihood
from gradmask.fisher.losses import standard_loss
from gradmask.mask_files import masks_sha256, read_state, save_masks
from gradmask.mask_state import check_masks, check_shapes, check_state, of_plain_model, placed
from gradmask.mask_warnings import warn_of_unused, warn_of_use, without_log
from gradmask.parameters import trainable_parameters
from gradmask.seeding import derive_seed, seeded_generator
from gradmask.selection import check_selection, kept_counts, make_masks
from gradmask.steps import MaskedSteps

SCOPES = ("gradient", "update")
# The mask from so many samples shares 92 to 95 % with that from all (docs/performance.md).
MAX_SAMPLES = 4000
_NOTHING: dict[str, Any] = {"seen": 0, "weight": 0.0, "sums": {}}  # of what is collected
_OPTIONS = ("keep", "scope", "strategy", "kind", "max_samples", "seed")
_LATER = {"which": "highest", "per": "network"}  # not in the states of earlier versions


class FisherMask:
    """Mask the gradients of the parameters with the least Fisher information.

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
        strategy: `fisher`, or a control of the same share: `random`, `random_matched` (the share
            of every tensor as in the Fisher mask) or `inverse` (the least information).
        which: Keep the `highest` information, or the `lowest`.
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

    Raises:
        OptionError: If an option is out of range or unknown.
        ModelError: If the model has no trainable parameters, or cannot be measured in shards.
    """

    def __init__(
        self,
        model: nn.Module,
        keep: float = 0.25,
        *,
        scope: str = "gradient",
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
    ) -> None:
        check_keep(keep)
        check_choice("refresh", refresh, ("pass", "online"))
        check_choice("scope", scope, SCOPES)
        check_selection(strategy, which, per)
        check_likelihood(kind, standard_loss(loss))
        check_max_samples(max_samples)
        check_unpack(unpack)
        trainable_parameters(model, loss)  # refuses a model that has none
        self._wrapped, self._group = model, group
        warn_if_alone(data_groups(model, group))  # refuses shards that cannot be measured
        self.model, self.scope, self.strategy = unwrapped(model), scope, strategy
        self.which, self.per = which, per
        self.kind, self.loss, self.unpack = kind, loss, unpack
        # NumPy's numbers would neither load without pickle nor seed as Python's do.
        self.keep, self.seed = float(keep), int(seed)
        self.max_samples = None if max_samples is None else int(max_samples)
        self.refreshes = 0
        self._kept: dict[str, int] = {}
        self._warned = False
        self._steps = MaskedSteps(self.model, scope, loss)
        self._collector: Collector | None = None
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
        """The mask of every parameter by name: True where it learns. Empty before a refresh."""
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
        given = every is not None or average is not None or scale is not None
        options: dict[str, Any] = {"average": average, "scale": scale}
        options["every"] = 1 if every is None else every
        if self._collector is None:
            self._collector = Collector(self._wrapped, self.loss, **options)
        elif given:
            self._collector.set(**options)
        return self._collector

    def refresh(self, loader: Iterable[Any] | None = None) -> None:
        """Measure the Fisher diagonal and make the mask of the next epoch.

        Args:
            loader: Iterable of batches (see `fisher_diagonal`); None for what `collect` collected
                in training since the last refresh.

        Raises:
            ModelError: If the model cannot be measured.
            DataError: If the data cannot be used, or the loss is not finite. The mask stays.
            OptimizerError: If weights were moved where the mask could not hold them. It stays.
            DistributedError: If that happened on another rank.
            OptionError: If the ranks' options differ, or the mask is fixed.
        """
        self._check_measured()
        same = {"seed": self.seed, "refreshes": self.refreshes, "keep": self.keep}
        groups = data_groups(self._wrapped, self._group)
        check_same(same, groups)
        self._steps.check(groups)
        if self.strategy == "random":  # needs shapes only
            reshard(self.model)
            self.update({name: p.detach() for name, p in self._trainable().items()})
            return
        if loader is None:
            self._refresh_online(groups)
            return
        unused: set[str] = set()
        seed = derive_seed(self.seed, "fisher", self.refreshes)
        fisher = self._measure(loader, self.max_samples, seed, unused)
        if unused:
            warn_of_unused(fisher, unused)
        self.update(fisher, unused)

    def _refresh_online(self, groups: Groups) -> None:
        if self._collector is None:
            raise OptionError(
                "mask.refresh() needs a loader to measure on, or a mask that collects while it "
                "trains: FisherMask(..., refresh='online'), or mask.collect()."
            )
        self.update(self._collector.diagonal(groups))
        if self._collector.average is None:
            self._collector.clear()

    def check(self, loader: Iterable[Any]) -> None:
        """Measure two samples, so that data, loss or model that do not fit are told at once.

        Mask and count of refreshes stay; random states and the loader as with `refresh`. Nothing
        is measured for `random` and fixed masks, nor on an iterator, which that would use up. On
        many processes all must call it.

        Args:
            loader: What `refresh` will get.

        Raises:
            ModelError: If the model cannot be measured.
            DataError: If the data cannot be used, or the loss is not finite.
            DistributedError: If that happened on another rank.
        """
        if self.strategy in ("random", "fixed") or isinstance(loader, Iterator):
            return
        with without_log():  # that two samples are few is meant
            self._measure(loader, 2, self.seed)

    def _measure(
        self, loader: Any, samples: int | None, seed: int, unused: set[str] | None = None
    ) -> dict[str, Tensor]:
        options: dict[str, Any] = {"kind": self.kind, "loss": self.loss, "group": self._group}
        options |= {"max_samples": samples, "seed": seed, "unused": unused, "unpack": self.unpack}
        return fisher_diagonal(self._wrapped, loader, **options)

    def update(self, fisher: dict[str, Tensor], unused: Collection[str] = ()) -> None:
        """Make the mask from a Fisher diagonal that was measured already.

        Args:
            fisher: `{parameter name: tensor}` for all trainable parameters; the same on all ranks,
                or DTensors for sharded parameters.
            unused: Names on which the loss does not depend in eval mode (`fisher_diagonal` tells
                them). They learn, whatever the others' threshold is.

        Raises:
            StateError: If names or shapes are not those of the model's trainable parameters.
            DataError: If values are NaN, infinite or negative (`random` reads only the shapes).
            OptimizerError: If weights were moved where the mask could not hold them. It stays.
            OptionError: If the mask is fixed.
        """
        self._check_measured()
        check_shapes(fisher, self._trainable(), "Fisher diagonal")
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
        if self._collector is not None:
            state["collected"] = self._collector.state_dict()
        return state

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
        collected = state.get("collected")
        if self._collector is not None or collected is not None:
            (self._collector or self.collect()).load_state_dict(collected or _NOTHING)
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
        numbers, sums = self._collected()
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
        if "collected" in rest:
            rest["collected"]["sums"] = sums
        self.load_state_dict({**rest, "masks": masks})

    def sha256(self) -> str:
        """SHA-256 of the state as digits; with sharded parameters every rank must call."""
        numbers, sums = self._collected()
        return masks_sha256(self._steps.masks, {**self._counted(), **numbers}, sums)

    def _collected(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What was collected in training: numbers, and tensors by name."""
        if self._collector is None:
            return {}, {}
        state = self._collector.state_dict()
        sums = state.pop("sums")
        return {"collected": state}, sums

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
