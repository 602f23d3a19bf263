"""What a model's training passes give, added up to a Fisher diagonal."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import saved_tensors_hooks

from gradmask.collect.checks import INSTEAD, check_handled, check_mode, check_model
from gradmask.collect.step import Hook, SingleCapture, Step
from gradmask.containers import map_tensors, sample_count, tensors_in
from gradmask.distributed import (
    Groups,
    is_sharded,
    local,
    shard_groups,
    shard_like,
    sum_over,
    unwrapped,
)
from gradmask.errors import DataError, GradmaskWarning, ModelError, OptionError, StateError
from gradmask.fisher.calls import differentiable
from gradmask.fisher.capture import Capture, Ways
from gradmask.fisher.likelihood import Loss
from gradmask.fisher.losses import likelihood_of, standard_loss
from gradmask.fisher.probe import training_ways
from gradmask.fisher.reference import zero_squares
from gradmask.fisher.scale import SCALED, before_casts, logits_of
from gradmask.fisher.sharded import ShardSums
from gradmask.mask_state import placed
from gradmask.parameters import trainable_parameters

_MOST = 64  # shapes of inputs whose ways are remembered


class Collector:
    """Squares of per-sample gradients, added up while a model is trained.

    F = 1/|D| Σ_n (∂ℓ_n/∂θ)² over the samples of the batches that were collected, each at the
    weights that it was trained with, in train mode: dropout is part of it. `.grad` is as autograd
    gives it, to the bit. A loss that is a mean (of samples, of tokens, scaled for mixed precision)
    has c ∂ℓ_n/∂θ for every sample; squares are divided by c².

    A context manager: hooks are on the model from entry to exit, around one training step or all.

    Args:
        model: The model that is trained, as it is wrapped; not compiled and not in shards.
        loss: The negative log-likelihood that training follows, as of the mask.
        options: As of `set`.

    Raises:
        OptionError: If an option is out of range.
        ModelError: If the model cannot be measured while it trains.
    """

    def __init__(self, model: nn.Module, loss: Loss | None = None, **options: Any) -> None:
        self.set(**options)
        check_model(model, loss)
        self.model, self._loss = unwrapped(model), loss
        self.seen = 0
        self._sums: dict[str, Tensor] = {}
        self._weight: Tensor | None = None  # of what is in the sums
        self._unread: Tensor | None = None  # batches whose factor could not be read
        self._warned = False
        self._ways: dict[tuple[tuple[int, ...], ...], Ways] = {}  # by the inputs' shapes
        self._known: set[tuple[str, int]] = set()  # parameters they are of
        self._open: Step | None = None
        self._handles: list[Any] = []
        self._hooks: tuple[Hook, Hook] | None = None
        self._depth, self._busy, self._started_alone = 0, False, False

    def set(
        self, *, every: int = 1, average: float | None = None, scale: float | None = None
    ) -> None:
        """Change what is collected.

        Args:
            every: Collect one of so many forward passes in train mode.
            average: None for the mean since the last `clear`; or β of an exponential average over
                batches, corrected for its start: F ← β F + (1 − β) F_batch.
            scale: c, if it is known; default: read off the gradient of the logits where the loss
                is a cross-entropy (categorical or binary), else 1/N of N samples.

        Raises:
            OptionError: If one is out of range.
        """
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise OptionError(f"every={every!r} must be a whole number of steps, at least 1.")
        if average is not None and not 0 <= average < 1:
            raise OptionError(f"average={average!r} must be in [0, 1): the share that stays.")
        if scale is not None and not scale > 0:
            raise OptionError(f"scale={scale!r} must be positive: loss = scale * sum of samples.")
        self.every, self.average, self.scale = every, average, scale

    def __enter__(self) -> Collector:
        self._depth += 1
        if self._depth == 1:
            self._hook()
        return self

    def __exit__(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._unhook()
            if self._open is not None:
                self._open.started = True  # its backward pass is none of ours
            self._abandon()

    def start(self) -> None:
        """Collect from here on; again does nothing."""
        if not self._started_alone:
            self._started_alone = True
            self.__enter__()

    def stop(self) -> None:
        """Collect no longer what `start` began."""
        if self._started_alone:
            self._started_alone = False
            self.__exit__()

    def _hook(self) -> None:
        self._unhook()  # what a copy, made in a context, has of it
        before, after = self._hooks = Hook(self._begin), Hook(self._listen)
        self._handles = [
            self.model.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            self.model.register_forward_hook(after),
        ]

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooks = [], None

    def __getstate__(self) -> dict[str, Any]:
        none: dict[str, Any] = {"_open": None, "_ways": {}, "_busy": False}
        return vars(self) | none | {"_depth": int(self._started_alone)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._hooks is not None and self._depth:
            before, after = self._hooks  # are in the model's copy, or will be
            before.function, after.function = self._begin, self._listen

    @property
    def empty(self) -> bool:
        """Whether nothing was collected since `clear`."""
        return not self._sums

    def clear(self) -> None:
        """Forget what was collected."""
        self._sums, self._weight, self._unread = {}, None, None

    def diagonal(self, groups: Groups = ()) -> dict[str, Tensor]:
        """The Fisher diagonal of what was collected, of all ranks together.

        Args:
            groups: Groups of the ranks, which all must call.

        Returns:
            `{parameter name: tensor}`, mean over samples (or batches, with `average`).

        Raises:
            DataError: If nothing was collected.
        """
        parameters = trainable_parameters(self.model, self._loss)
        weight = torch.zeros((), dtype=torch.float64, device="cpu")
        if self._weight is not None:
            weight = self._weight.cpu()
        weight = sum_over(weight, groups)
        if not weight:
            raise DataError(
                "Nothing was collected: call mask.refresh() after training steps (model.train(), "
                "loss.backward()) inside mask.collect(), at least `every` of them."
            )
        self._warn_of_unread()
        found = {}
        for name, parameter in parameters.items():
            total = self._sums.get(name)
            total = zero_squares(local(parameter)) if total is None else total
            if not is_sharded(parameter):  # else they are added up already
                total = sum_over(total, groups)
            found[name] = shard_like(total / weight.to(total), parameter)
        return found

    def _warn_of_unread(self) -> None:
        """Say once if factors were guessed."""
        if self._warned or self.scale is not None or self._unread is None or not self._unread:
            return
        self._warned = True
        warnings.warn(
            "The training's loss is no cross-entropy of one label each (smoothed or mixed labels, "
            "weights, logits changed after the model), so what it multiplies a sample's own loss "
            "by was taken to be 1/N of N samples, which a mean over tokens or loss scaling is not: "
            "give mask.collect(scale=...), or to the mask the loss that is trained, loss=...",
            GradmaskWarning,
            stacklevel=4,
        )

    def state_dict(self) -> dict[str, Any]:
        """What was collected: tensors and plain numbers."""
        weight = 0.0 if self._weight is None else float(self._weight)
        parameters = trainable_parameters(self.model, self._loss)
        sums = {n: shard_like(t.clone(), parameters[n]) for n, t in self._sums.items()}
        return {"seen": self.seen, "weight": weight, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Args:
            state: What `state_dict` returned.

        Raises:
            StateError: If it is damaged, or of another model. Nothing changes then.
        """
        parameters = trainable_parameters(self.model, self._loss)
        try:
            shapes = {name: total.shape for name, total in state["sums"].items()}
            fits = all(parameters[name].shape == shape for name, shape in shapes.items())
            fits &= state["seen"] >= 0 and state["weight"] >= 0
        except (KeyError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise StateError("What the state has collected is damaged, or of another model.")
        self.seen = state["seen"]
        self._sums = {n: local(placed(s, parameters[n])) for n, s in state["sums"].items()}
        device = next(iter(parameters.values())).device
        self._weight = torch.tensor(state["weight"], dtype=torch.float64, device=device)

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        recomputes = torch._C._current_graph_task_id() != -1  # of activation checkpointing
        transformed = torch._C._functorch.peek_interpreter_stack() is not None  # as by torch.func
        trains = model.training and torch.is_grad_enabled()
        if self._busy or recomputes or transformed or not trains:
            return
        self._abandon()
        self.seen += 1
        if (self.seen - 1) % self.every:
            return
        parameters = trainable_parameters(model, self._loss)
        count = sample_count((args, kwargs))
        if not count:
            return
        check_mode(model)
        if count == 1 and not any(map(is_sharded, parameters.values())):
            self._open = Step(SingleCapture(parameters), parameters, count)
            return
        known = {(name, id(p)) for name, p in parameters.items()}
        if known != self._known:
            self._ways, self._known = {}, known
        shapes = tuple(tuple(t.shape[1:]) for t in tensors_in((args, kwargs)))
        ways = self._ways.get(shapes) or next(filter(_fit_all_sizes, self._ways.values()), None)
        if ways is None:
            ways = self._find_ways(args, kwargs, parameters)
            self._ways[shapes] = ways
            if len(self._ways) > _MOST:
                del self._ways[next(iter(self._ways))]
        capture = Capture(model, parameters, count, ways, listens=True)
        self._open = Step(capture, parameters, count)
        if shapes not in self._ways:
            self._open.probe = lambda: self._ways.update(
                {shapes: self._find_ways(args, kwargs, parameters)}
            )

    def _find_ways(self, args: Any, kwargs: Any, parameters: dict[str, nn.Parameter]) -> Ways:
        two = map_tensors(lambda t: t[:2].detach() if t.dim() else t, (args, kwargs))
        self._busy = True
        try:  # with none of the hooks that activation checkpointing has around the model
            with saved_tensors_hooks(Tensor.detach, lambda saved: saved):
                return training_ways(self.model, two, parameters)
        finally:
            self._busy = False

    def _listen(self, _: nn.Module, __: Any, outputs: Any) -> None:
        batch = self._open
        if batch is None or self._busy or batch.roots:
            return
        batch.roots = list(dict.fromkeys(t.grad_fn for t in differentiable(outputs)))
        if not batch.roots:
            self._abandon()
            return
        self._read_scale(batch, outputs)  # first in line
        try:
            batch.capture.resolve(outputs)
            missing = batch.parameters.keys() - batch.capture.handled
            if missing and batch.probe is not None:  # other sizes, other operations: from now on
                self._abandon()
                batch.probe()
                return
            check_handled(missing)
        except BaseException:
            self._abandon()
            raise
        batch.may_overflow = torch.float16 in batch.capture.types()
        if isinstance(batch.capture, Capture) and batch.sharded:
            batch.capture.listen(batch.squares, partial(self._settle, batch))
        else:
            batch.capture.listen(batch.squares)
        for root in batch.roots:
            root.register_prehook(partial(self._started, batch))

    def _read_scale(self, batch: Step, outputs: Any) -> None:
        loss = standard_loss(self._loss)
        likelihood = "cross_entropy" if loss is None else likelihood_of(loss)
        logits = logits_of(outputs)
        if self.scale is None and logits is not None and likelihood in SCALED:
            node, place = before_casts(logits)
            note = partial(batch.note_scale, logits.detach(), place, likelihood)
            node.register_prehook(note)

    def _started(self, batch: Step, _: Any) -> None:
        if batch.started:
            if batch.counted:
                Variable._execution_engine.queue_callback(partial(_check_once, batch))
            return
        batch.started = True
        if batch is not self._open:
            raise ModelError(
                "The model ran twice before loss.backward(), so which gradients belong to one "
                f"sample cannot be told: run backward after each forward pass. {INSTEAD}"
            )
        Variable._execution_engine.queue_callback(partial(self._finish, batch))

    @torch.no_grad()
    def _finish(self, batch: Step) -> None:
        self._open = None
        try:
            batch.capture.square_rest(batch.squares)
            if batch.trained():
                self._add(batch)
                batch.counted = True
                batch.mark()
        finally:
            batch.capture.__exit__(None, None, None)

    def _settle(self, batch: Step, names: Iterable[str]) -> None:
        """Add up over the ranks what is complete, so that no rank has all of the whole squares."""
        assert isinstance(batch.squares, ShardSums)
        batch.squares.weight = float(self._factor(batch)[0])
        batch.squares.settle(names)

    def _factor(self, batch: Step) -> tuple[Tensor, Tensor, float]:
        """What squares are multiplied by, whether that is guessed, and a sample's weight."""
        count = float(batch.count)
        device = next(iter(batch.parameters.values())).device
        scale = torch.full((), 1 / count, dtype=torch.float64, device=device)
        unread = torch.zeros((), dtype=torch.bool, device=device)
        if self.scale is not None:
            scale.fill_(self.scale)
        elif batch.scale is not None:
            unread = batch.scale.isnan().to(device)
            scale = torch.where(unread, scale, batch.scale.to(device))
        share = 1.0 if self.average is None else (1 - self.average) / count
        return share / scale.square(), unread, share

    def _add(self, batch: Step) -> None:
        """Add a batch's squares, as they would be of each sample's own loss."""
        factor, unread, share = self._factor(batch)
        new = torch.full_like(factor, share * batch.count)
        found: dict[str, Tensor] = batch.squares
        if isinstance(found, ShardSums):
            found, factor = found.parts, torch.ones_like(factor)  # multiplied already
        keep = torch.full_like(factor, 1.0 if self.average is None else self.average)
        if batch.may_overflow:  # then the optimizer leaves the step out
            sums = torch.stack([s.sum().double() for s in found.values()]).sum()
            fine = sum_over(sums, shard_groups(batch.parameters.values())).isfinite()
            keep, new = torch.where(fine, keep, 1.0), torch.where(fine, new, 0.0)
            for squares in found.values():
                squares.nan_to_num_(0.0, 0.0, 0.0)
            factor, unread = torch.where(fine, factor, 0.0), unread & fine
        self._unread = unread if self._unread is None else self._unread | unread
        before = self._weight if self._weight is not None else torch.zeros_like(factor)
        self._weight = before * keep + new
        if self.average is not None:
            for total in self._sums.values():
                total *= keep.to(total)
        for name, squares in found.items():
            squares *= factor.to(squares)
            self._sums[name] = self._sums[name].add_(squares) if name in self._sums else squares

    def _abandon(self) -> None:
        """Let go of a forward pass that had no backward pass."""
        if self._open is not None:
            self._open.capture.__exit__(None, None, None)
            self._open = None


def _check_once(batch: Step) -> None:
    if batch.trained():
        raise ModelError(
            "A second loss.backward() went through one forward pass, of which the first alone was "
            f"collected: add up the losses before backward(). {INSTEAD}"
        )


def _fit_all_sizes(ways: Ways) -> bool:
    """Whether ways hold for other lengths too; recurrent layers have other operations then."""
    return all(kind[0] in ("rule", "lookup") for way in ways.values() for kind in way)
