"""The gradient mask, attached to an optimizer (equation 10)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from gradmask.distributed import (
    check_same,
    data_groups,
    local,
    reshard,
    shard_like,
    unwrapped,
    warn_if_alone,
)
from gradmask.errors import OptimizerError, check_choice, check_keep, check_max_samples
from gradmask.fisher.diagonal import fisher_diagonal
from gradmask.fisher.likelihood import Loss, check_likelihood
from gradmask.kernels import keep_where
from gradmask.mask_state import check_shapes, check_state, placed
from gradmask.parameters import trainable_parameters
from gradmask.seeding import derive_seed, seeded_generator
from gradmask.selection import STRATEGIES, kept_counts, make_masks

SCOPES = ("gradient", "update")
# The mask from so many samples shares 92 to 95 % with that from all (docs/performance.md).
MAX_SAMPLES = 4000
_OPTIONS = ("keep", "scope", "strategy", "kind", "max_samples", "seed")


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
        kind: Labels of the Fisher information: `empirical`, `sampled` or `exact`.
        loss: Negative log-likelihood: `cross_entropy`, `bernoulli` or a callable.
        max_samples: Size of the random part of the data a refresh measures on; None for all of it.
        seed: Seed of random parts, drawn labels and random masks; each refresh draws afresh.
        group: Ranks that train the model together (default: those it is wrapped for).

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
        kind: str = "empirical",
        loss: Loss = "cross_entropy",
        max_samples: int | None = MAX_SAMPLES,
        seed: int = 0,
        group: ProcessGroup | None = None,
    ) -> None:
        check_keep(keep)
        check_choice("scope", scope, SCOPES)
        check_choice("strategy", strategy, STRATEGIES)
        check_likelihood(kind, loss)
        check_max_samples(max_samples)
        trainable_parameters(model)  # refuses a model that has none
        self._wrapped, self._group = model, group
        warn_if_alone(data_groups(model, group))  # refuses shards that cannot be measured
        self.model, self.scope, self.strategy = unwrapped(model), scope, strategy
        self.kind, self.loss = kind, loss
        # NumPy's numbers would neither load without pickle nor seed as Python's do.
        self.keep, self.seed = float(keep), int(seed)
        self.max_samples = None if max_samples is None else int(max_samples)
        self.refreshes = 0
        self.masks: dict[str, Tensor] = {}
        self._kept: dict[str, int] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._names: dict[int, str] = {}
        self._read_parameters()
        self._optimizers: list[Optimizer] = []
        self._handles: list[Any] = []
        self._before: dict[int, list[dict[str, Tensor]]] = {}

    def _read_parameters(self) -> None:
        """Look them up anew; frozen ones too, which may thaw while their mask is in force."""
        reshard(self.model)
        self._parameters = dict(self.model.named_parameters())
        self._names = {id(p): name for name, p in self._parameters.items()}

    def attach(self, optimizer: Optimizer) -> FisherMask:
        """Mask every following step of an optimizer, through its own step hooks.

        Args:
            optimizer: Any `torch.optim` optimizer over parameters of the model, except L-BFGS.

        Returns:
            The mask itself.

        Raises:
            OptimizerError: If it is no optimizer, is L-BFGS, has none of the model's parameters, or
                has the mask already.
        """
        if not isinstance(optimizer, Optimizer):
            raise OptimizerError(
                f"attach() got a {type(optimizer).__name__}: give it a torch.optim optimizer."
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise OptimizerError(
                "L-BFGS builds its step from gradients at several points, which no mask fits: "
                "use another optimizer, such as SGD or AdamW."
            )
        self._read_parameters()
        if not any(
            id(p) in self._names for group in optimizer.param_groups for p in group["params"]
        ):
            raise OptimizerError(
                "The optimizer holds none of the model's parameters: build it from this model's "
                "parameters(), after moving or wrapping the model."
            )
        if optimizer in self._optimizers:
            raise OptimizerError("The mask is attached to this optimizer already.")
        self._optimizers.append(optimizer)
        self._handles.append(optimizer.register_step_pre_hook(self._pre_step))
        if self.scope == "update":
            self._handles.append(optimizer.register_step_post_hook(self._post_step))
        return self

    def detach(self) -> None:
        """Take the mask off every optimizer it is attached to."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._optimizers.clear()
        self._before.clear()

    def refresh(self, loader: Iterable[Any]) -> None:
        """Measure the Fisher diagonal and make the mask of the next epoch.

        Args:
            loader: Iterable of `(inputs, targets)` batches (see `fisher_diagonal`).

        Raises:
            ModelError: If the model cannot be measured.
            DataError: If the data cannot be used, or the loss is not finite. The mask stays.
            DistributedError: If that happened on another rank.
            OptionError: If the ranks' options differ.
        """
        same = {"seed": self.seed, "refreshes": self.refreshes, "keep": self.keep}
        check_same(same, data_groups(self._wrapped, self._group))
        if self.strategy == "random":  # needs shapes only
            reshard(self.model)
            self.update({name: p.detach() for name, p in trainable_parameters(self.model).items()})
            return
        options: dict[str, Any] = {"kind": self.kind, "loss": self.loss, "group": self._group}
        options["seed"] = derive_seed(self.seed, "fisher", self.refreshes)
        self.update(fisher_diagonal(self._wrapped, loader, max_samples=self.max_samples, **options))

    def update(self, fisher: dict[str, Tensor]) -> None:
        """Make the mask from a Fisher diagonal that was measured already.

        Args:
            fisher: `{parameter name: tensor}` for all trainable parameters; the same on all ranks,
                or DTensors for sharded parameters.

        Raises:
            StateError: If names or shapes are not those of the model's trainable parameters.
            DataError: If values are NaN, infinite or negative (`random` reads only the shapes).
        """
        check_shapes(fisher, trainable_parameters(self.model), "Fisher diagonal")
        generator = seeded_generator(self.seed, "mask", self.refreshes)
        self.masks = make_masks(fisher, self.keep, strategy=self.strategy, generator=generator)
        self._kept = kept_counts(self.masks)
        self._read_parameters()
        self.refreshes += 1

    @torch.no_grad()
    def apply_(self) -> None:
        """Mask the gradients in place now, for example before clipping; twice does no harm."""
        self._apply(self._parameters)

    def _apply(self, parameters: dict[str, nn.Parameter]) -> None:
        gradients, masks = [], []
        for name, parameter in parameters.items():
            if name in self.masks and parameter.grad is not None:
                if parameter.grad.is_sparse:
                    raise OptimizerError(
                        f"Parameter {name!r} has a sparse gradient: use sparse=False in its layer."
                    )
                gradients.append(local(parameter.grad))
                masks.append(self._mask(name, parameter))
        keep_where(gradients, masks)

    def _mask(self, name: str, parameter: nn.Parameter) -> Tensor:
        mask, own = local(self.masks[name]), local(parameter)
        # The model may have been moved. In the parameter's own layout both are read in order.
        if mask.device != own.device or mask.stride() != own.stride():
            mask = torch.empty_like(own, dtype=torch.bool, requires_grad=False).copy_(mask)
            self.masks[name] = shard_like(mask, parameter)
        return mask

    def _of(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """The optimizer's parameters that belong to the model, groups added later included."""
        return {
            self._names[id(p)]: p
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) in self._names
        }

    @torch.no_grad()
    def _pre_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        parameters = self._of(optimizer)
        if self.scope == "update":
            # A stack: the `step` of a subclass may call that of its parent, which runs hooks too.
            self._before.setdefault(id(optimizer), []).append(
                {n: local(p.detach()).clone() for n, p in parameters.items() if n in self.masks}
            )
        self._apply(parameters)

        # A closure computes the gradients inside the step: mask them as it returns too.
        def masked(closure: Callable[[], Any]) -> Callable[[], Any]:
            def call() -> Any:
                value = closure()
                with torch.no_grad():
                    self._apply(parameters)
                return value

            return call

        wrap = lambda a: masked(a) if callable(a) and a is not optimizer else a  # noqa: E731
        return tuple(wrap(a) for a in args), {k: wrap(a) for k, a in kwargs.items()}

    @torch.no_grad()
    def _post_step(self, optimizer: Optimizer, *_: Any) -> None:
        parameters = self._of(optimizer)
        stack = self._before.get(id(optimizer))
        before = stack.pop() if stack else {}
        held = [local(parameters[name].detach()) for name in before]
        masks = [self._mask(name, parameters[name]) for name in before]
        keep_where(held, masks, list(before.values()))

    @property
    def kept_fraction(self) -> float:
        """Share of all trainable parameters that learn now, as realised (1 before a refresh)."""
        if not self.masks:
            return 1.0
        return sum(self._kept.values()) / sum(m.numel() for m in self.masks.values())

    @property
    def kept_fractions(self) -> dict[str, float]:
        """The same share for every parameter by name."""
        if not self.masks:
            return dict.fromkeys(trainable_parameters(self.model), 1.0)
        # A parameter without entries has nothing masked.
        return {n: self._kept[n] / m.numel() if m.numel() else 1.0 for n, m in self.masks.items()}

    def state_dict(self) -> dict[str, Any]:
        """Options, refresh count and masks; plain values and tensors that load without pickle.

        Masks of sharded parameters are DTensors, for `torch.distributed.checkpoint`.
        """
        masks = {name: mask.clone() for name, mask in self.masks.items()}
        return {"version": 1, **self._options(), "refreshes": self.refreshes, "masks": masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; nothing changes unless all of it fits.

        Args:
            state: What `state_dict` returned, from a mask with the same options. Whole masks are
                cut to the shards that the parameters are in.

        Raises:
            StateError: If the state is of another version, other options or another model.
        """
        check_state(state, self._options())
        masks = state["masks"]
        if masks:
            check_shapes(masks, trainable_parameters(self.model), "state")
        self._read_parameters()
        self.masks = {name: placed(mask, self._parameters[name]) for name, mask in masks.items()}
        self._kept = kept_counts(self.masks)
        self.refreshes = state["refreshes"]

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OPTIONS}
