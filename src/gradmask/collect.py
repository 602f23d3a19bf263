"""The Fisher diagonal out of the training's own backward passes, for the price of the squares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm

from gradmask.containers import map_tensors, sample_count, tensors_in
from gradmask.distributed import Groups, is_sharded, sum_over, unwrapped
from gradmask.errors import DataError, ModelError, OptionError, StateError, first_names
from gradmask.fisher.calls import differentiable, full_precision
from gradmask.fisher.capture import Capture, Ways
from gradmask.fisher.graph import leaves, walk
from gradmask.fisher.likelihood import Loss
from gradmask.fisher.losses import likelihood_of, standard_loss
from gradmask.fisher.probe import training_ways
from gradmask.fisher.reference import zero_squares
from gradmask.fisher.rules import add_squares
from gradmask.fisher.scale import SCALED, before_casts, logits_of, loss_scale
from gradmask.parameters import trainable_parameters

_PASS = (
    "Measure in a pass of its own, in eval mode: mask.refresh(loader), or refresh='epoch' of a "
    "callback."
)


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
        _check_model(model, loss)
        self.model, self._loss = unwrapped(model), loss
        self.seen = 0
        self._sums: dict[str, Tensor] = {}
        self._weight: Tensor | None = None  # of what is in the sums
        self._ways: dict[tuple[tuple[int, ...], ...], Ways] = {}  # by the inputs' shapes
        self._known: set[tuple[str, int]] = set()  # parameters they are of
        self._open: _Batch | None = None
        self._handles: list[Any] = []
        self._hooks: tuple[_Hook, _Hook] | None = None
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
        before, after = self._hooks = _Hook(self._begin), _Hook(self._listen)
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
        self._sums, self._weight = {}, None

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
        found = {}
        for name, parameter in parameters.items():
            total = self._sums.get(name)
            total = zero_squares(parameter) if total is None else total
            found[name] = sum_over(total, groups) / weight.to(total)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What was collected: tensors and plain numbers."""
        weight = 0.0 if self._weight is None else float(self._weight)
        sums = {name: total.clone() for name, total in self._sums.items()}
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
        self._sums = {n: s.to(parameters[n].device, copy=True) for n, s in state["sums"].items()}
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
        _check_mode(model)
        if count == 1:
            self._open = _Batch(_Single(parameters), parameters, count)
            return
        known = {(name, id(p)) for name, p in parameters.items()}
        if known != self._known:
            self._ways, self._known = {}, known
        shapes = tuple(tuple(t.shape[1:]) for t in tensors_in((args, kwargs)))
        if shapes not in self._ways:  # recurrent layers have other operations for other lengths
            self._ways[shapes] = self._find_ways(args, kwargs, parameters)
        capture = Capture(model, parameters, count, self._ways[shapes], listens=True)
        self._open = _Batch(capture, parameters, count)

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
        try:
            batch.capture.resolve(outputs)
            _check_handled(batch.parameters.keys() - batch.capture.handled)
        except BaseException:
            self._abandon()
            raise
        batch.may_overflow = torch.float16 in batch.capture.types()
        batch.capture.listen(batch.squares)
        for root in batch.roots:
            root.register_prehook(partial(self._started, batch))
        loss = standard_loss(self._loss)
        likelihood = "cross_entropy" if loss is None else likelihood_of(loss)
        logits = logits_of(outputs)
        if self.scale is None and logits is not None and likelihood in SCALED:
            node, place = before_casts(logits)
            note = partial(batch.note_scale, logits.detach(), place, likelihood)
            node.register_prehook(note)

    def _started(self, batch: _Batch, _: Any) -> None:
        if batch.started:
            return
        batch.started = True
        if batch is not self._open:
            raise ModelError(
                "The model ran twice before loss.backward(), so which gradients belong to one "
                f"sample cannot be told: run backward after each forward pass. {_PASS}"
            )
        Variable._execution_engine.queue_callback(partial(self._finish, batch))

    @torch.no_grad()
    def _finish(self, batch: _Batch) -> None:
        self._open = None
        try:
            batch.capture.square_rest(batch.squares)
            if batch.trained():
                self._add(batch)
        finally:
            batch.capture.__exit__(None, None, None)

    def _add(self, batch: _Batch) -> None:
        """Add a batch's squares, as they would be of each sample's own loss."""
        count = float(batch.count)
        device = next(iter(batch.parameters.values())).device
        scale = torch.full((), 1 / count, dtype=torch.float64, device=device)
        if self.scale is not None:
            scale.fill_(self.scale)
        elif batch.scale is not None:
            scale = torch.where(batch.scale.isnan(), scale, batch.scale.to(device))
        share = 1.0 if self.average is None else (1 - self.average) / count
        factor, new = share / scale.square(), torch.full_like(scale, share * count)
        keep = torch.full_like(scale, 1.0 if self.average is None else self.average)
        if batch.may_overflow:  # then the optimizer leaves the step out
            fine = torch.stack([s.sum().double() for s in batch.squares.values()]).isfinite().all()
            keep, new = torch.where(fine, keep, 1.0), torch.where(fine, new, 0.0)
            for squares in batch.squares.values():
                squares.nan_to_num_(0.0, 0.0, 0.0)
            factor = torch.where(fine, factor, 0.0)
        before = self._weight if self._weight is not None else torch.zeros_like(factor)
        self._weight = before * keep + new
        if self.average is not None:
            for total in self._sums.values():
                total *= keep.to(total)
        for name, squares in batch.squares.items():
            squares *= factor.to(squares)
            self._sums[name] = self._sums[name].add_(squares) if name in self._sums else squares

    def _abandon(self) -> None:
        """Let go of a forward pass that had no backward pass."""
        if self._open is not None:
            self._open.capture.__exit__(None, None, None)
            self._open = None


class _Single:
    """What `Capture` is, for one sample: its gradients are those of the batch, by way of the model.

    What a loss has of parameters besides, such as a penalty, does not go by that way.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self._parameters, self._handles = parameters, list[Any]()
        self._uses: dict[str, list[tuple[Any, int]]] = {}
        self._sums: dict[str, Tensor] = {}
        self._types: set[torch.dtype] = set()
        self.handled = parameters.keys()

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._uses, self._sums = {}, {}

    def resolve(self, outputs: Any) -> None:
        """Find the operations that use the parameters, and refuse a graph with hidden parts."""
        nodes, parents = walk(list(dict.fromkeys(t.grad_fn for t in differentiable(outputs))))
        self._types = {m.dtype for node in nodes for m in node._input_metadata}
        names = {id(p): name for name, p in self._parameters.items()}
        for name, leaf in leaves(nodes, lambda variable: names.get(id(variable))).items():
            self._uses[name] = [
                (node, place)
                for node in dict.fromkeys(parents[leaf])
                for place, (below, _) in enumerate(node.next_functions)
                if below is leaf
            ]

    def types(self) -> set[torch.dtype]:
        """Types of what operations returned."""
        return self._types

    def listen(self, totals: dict[str, Tensor]) -> None:
        """Add the squares of the next backward pass to totals; complete after `square_rest`."""

        @torch.no_grad()
        def add(name: str, place: int, gradients: tuple[Tensor | None, ...], *_: Any) -> None:
            if (g := gradients[place]) is None:
                return
            g = full_precision(g.to_dense()).sum_to_size(self._parameters[name].shape)
            if len(self._uses[name]) == 1:
                add_squares(totals[name], g.unsqueeze(0))
            else:
                self._sums[name] = self._sums[name] + g if name in self._sums else g

        for name, uses in self._uses.items():
            self._handles += [node.register_hook(partial(add, name, i)) for node, i in uses]

    def square_rest(self, totals: dict[str, Tensor]) -> None:
        """Of parameters that are used more than once."""
        for name, gradient in self._sums.items():
            add_squares(totals[name], gradient.unsqueeze(0))


class _Hook:
    """A hook that does nothing in a copy or a file of the model, unless a collector comes with it.

    Args:
        function: What is called.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        """Call it."""
        self.function(*args)

    def __reduce__(self) -> Any:
        return _Hook, (_nothing,)


def _nothing(*_: Any) -> None:
    """Stands for a hook in a copy."""


class _Batch:
    """One forward pass, and what its backward pass gives."""

    def __init__(
        self, capture: Capture | _Single, parameters: dict[str, nn.Parameter], count: int
    ) -> None:
        self.capture, self.parameters, self.count = capture, parameters, count
        self.roots: list[Any] = []
        self.squares: dict[str, Tensor] = _Squares(parameters)
        self.scale: Tensor | None = None
        self.started = self.may_overflow = False
        self._before = {name: _mark(p) for name, p in parameters.items()}

    def note_scale(
        self, logits: Tensor, place: int, likelihood: str, gradients: tuple[Tensor | None, ...]
    ) -> None:
        """What the loss multiplies a sample's own by."""
        gradient = gradients[place]
        if gradient is not None and gradient.shape == logits.shape:
            with torch.no_grad():
                self.scale = loss_scale(logits, gradient, likelihood)

    def trained(self) -> bool:
        """Whether the backward pass gave parameters gradients: else it was one for other ends."""
        return any(_mark(p) != self._before[name] for name, p in self.parameters.items())


class _Squares(dict[str, Tensor]):
    """Sums that are zero until something is added."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._parameters = parameters

    def __missing__(self, name: str) -> Tensor:
        self[name] = zero_squares(self._parameters[name])
        return self[name]


def _mark(parameter: nn.Parameter) -> tuple[int, int]:
    return (0, 0) if parameter.grad is None else (id(parameter.grad), parameter.grad._version)


def _check_model(model: nn.Module, loss: Any) -> None:
    """Refuse what no training pass can be measured of."""
    for name, parameter in trainable_parameters(model, loss).items():
        if is_sharded(parameter):
            raise ModelError(
                f"Parameter {name!r} is in shards (fully_shard), of which a training pass has only "
                f"parts. {_PASS}"
            )
        if name.startswith("loss.") and isinstance(loss, nn.Module):
            raise ModelError(f"The loss has parameters of its own ({name}). {_PASS}")
    for module in model.modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if compiled or hasattr(module, "_orig_mod"):
            raise ModelError(
                f"{type(module).__name__} is compiled, which hides its layers while it trains: "
                f"leave torch.compile out. {_PASS}"
            )


def _check_mode(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ModelError(
                f"Layer {name!r} ({type(module).__name__}) normalises with the statistics of the "
                "batch while it trains, which mixes the samples: they have no gradients of their "
                f"own. {_PASS} Or use GroupNorm or LayerNorm, or keep the layer in eval mode."
            )


def _check_handled(missing: Iterable[str]) -> None:
    if missing := set(missing):
        raise ModelError(
            f"No rule measures {first_names(missing)} in training's own pass: register one for the "
            f"layer (gradmask.fisher.register_rule), or freeze it. {_PASS}"
        )
