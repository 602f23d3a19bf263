"""What a model's training passes give, added up to a Fisher diagonal."""

from __future__ import annotations

import math
from functools import partial
from numbers import Real
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import saved_tensors_hooks

from gradmask.collect.checks import INSTEAD, check_handled, check_mode, check_model
from gradmask.collect.step import Hook, SingleCapture, Step
from gradmask.collect.sums import RunningDiagonal
from gradmask.containers import map_tensors, sample_count, tensors_in
from gradmask.distributed import is_sharded, unwrapped
from gradmask.errors import ModelError, OptionError
from gradmask.fisher.calls import differentiable
from gradmask.fisher.capture import Capture, Strategies
from gradmask.fisher.likelihood import Loss
from gradmask.fisher.losses import likelihood_of, standard_loss
from gradmask.fisher.probe import training_strategies
from gradmask.fisher.scale import SCALED, before_casts, logits_of
from gradmask.parameters import trainable_parameters

_MOST = 64  # shapes of inputs whose strategies are remembered


_PROBED: WeakSet[nn.Module] = WeakSet()  # models that run beside training; several may collect


class Collector(RunningDiagonal):
    """Squares of per-sample gradients, added up while a model is trained.

    F = 1/|D| Σ_n (∂ℓ_n/∂θ)² over the samples of the batches that were collected, each at the
    weights that it was trained with, in train mode: dropout is part of it. `.grad` is as autograd
    gives it, to the bit. A loss that is a mean (of samples, of tokens, scaled for mixed precision)
    has c ∂ℓ_n/∂θ for every sample; squares are divided by c².

    A context manager: hooks are on the model from entry to exit, around one training step or all.

    Args:
        model: The model that is trained, as it is wrapped; not compiled.
        loss: The negative log-likelihood that training follows, as of the mask.
        options: As of `set`.

    Raises:
        OptionError: If an option is out of range.
        ModelError: If the model cannot be measured while it trains.
    """

    def __init__(self, model: nn.Module, loss: Loss | None = None, **options: Any) -> None:
        self.set(**options)
        check_model(model, loss)
        super().__init__(unwrapped(model), loss)
        self._strategies: dict[
            tuple[tuple[int, ...], ...], Strategies
        ] = {}  # by the inputs' shapes
        self._known: set[tuple[str, int]] = set()  # parameters they are of
        self._open: Step | None = None
        self._handles: list[Any] = []
        self._hooks: tuple[Hook, Hook] | None = None
        self._depth, self._started_alone = 0, False

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
        if scale is not None and not (isinstance(scale, Real) and 0 < scale < math.inf):
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
        none: dict[str, Any] = {"_open": None, "_strategies": {}}
        return vars(self) | none | {"_depth": int(self._started_alone)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._hooks is not None and self._depth:
            before, after = self._hooks  # are in the model's copy, or will be
            before.function, after.function = self._begin, self._listen

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        recomputes = torch._C._current_graph_task_id() != -1  # of activation checkpointing
        transformed = torch._C._functorch.peek_interpreter_stack() is not None  # as by torch.func
        trains = model.training and torch.is_grad_enabled()
        if model in _PROBED or recomputes or transformed or not trains:
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
            self._strategies, self._known = {}, known
        shapes = tuple(tuple(t.shape[1:]) for t in tensors_in((args, kwargs)))
        strategies = self._strategies.get(shapes) or next(
            filter(_fit_all_sizes, self._strategies.values()), None
        )
        if strategies is None:
            strategies = self._find_strategies(args, kwargs, parameters)
            self._strategies[shapes] = strategies
            if len(self._strategies) > _MOST:
                del self._strategies[next(iter(self._strategies))]
        capture = Capture(model, parameters, count, strategies, listens=True)
        self._open = Step(capture, parameters, count)
        if shapes not in self._strategies:
            self._open.probe = lambda: self._strategies.update(
                {shapes: self._find_strategies(args, kwargs, parameters)}
            )

    def _find_strategies(
        self, args: Any, kwargs: Any, parameters: dict[str, nn.Parameter]
    ) -> Strategies:
        two = map_tensors(lambda t: t[:2].detach() if t.dim() else t, (args, kwargs))
        _PROBED.add(self.model)
        try:  # with none of the hooks that activation checkpointing has around the model
            with saved_tensors_hooks(Tensor.detach, lambda saved: saved):
                return training_strategies(self.model, two, parameters)
        finally:
            _PROBED.discard(self.model)

    def _listen(self, model: nn.Module, _: Any, outputs: Any) -> None:
        batch = self._open
        if batch is None or model in _PROBED or batch.roots or not model.training:
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
            batch.capture.listen(batch.squares, partial(self.on_complete, batch))
        else:
            batch.capture.listen(batch.squares)
        for root in batch.roots:
            root.register_prehook(partial(self._started, batch))

    def _read_scale(self, batch: Step, outputs: Any) -> None:
        loss = standard_loss(self._loss)
        likelihood = "cross_entropy" if loss is None else likelihood_of(loss)
        logits = logits_of(outputs)
        if self.scale is None and logits is not None and likelihood in SCALED:
            node, index = before_casts(logits)
            note = partial(batch.note_scale, logits.detach(), index, likelihood)
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
                self.add(batch)
                batch.counted = True
                batch.mark()
        finally:
            batch.capture.__exit__(None, None, None)

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


def _fit_all_sizes(strategies: Strategies) -> bool:
    """Whether strategies hold for other lengths too, as of recurrent layers they do not."""
    return all(
        kind[0] in ("rule", "lookup") for strategy in strategies.values() for kind in strategy
    )
