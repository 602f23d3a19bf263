"""Steps of optimizers in which masked gradients are zero, or masked weights do not move."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmask.attach import held_parameters, optimizers_to_hook
from gradmask.distributed import Groups, all_ranks_raise, is_sharded, local, reshard, shard_like
from gradmask.errors import OptimizerError, StateError
from gradmask.kernels import clip_where, keep_where
from gradmask.parameters import named_parameters
from gradmask.watch import WeightWatch, fingerprint

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


class Masked(NamedTuple):
    """A parameter, and this rank's part of its mask, in the same layout."""

    name: str
    parameter: nn.Parameter
    mask: Tensor


class MaskedSteps:
    """A model's masks, and the optimizers whose steps they hold in.

    Optimizers are held by weak reference. A copy (`copy.deepcopy`, `pickle`) together with model
    and optimizers is attached to the copies.

    Args:
        model: The model.
        scope: `gradient` or `update`.
        loss: The loss, whose parameters are masked too if it is a module.

    Attributes:
        used: Whether an optimizer was attached, or gradients masked or masks read by hand.
    """

    def __init__(self, model: nn.Module, scope: str, loss: Any = None) -> None:
        self.model, self.scope, self._loss = model, scope, loss
        self.masks: dict[str, Tensor] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self._names: dict[int, str] = {}
        self._handles: WeakKeyDictionary[Optimizer, list[Any]] = WeakKeyDictionary()
        self._watch = WeightWatch(hold=scope == "update")
        self.used = False
        self._versions: dict[str, int] = {}
        # What `clip` left masked: gradients by id, masks, and the versions of both.
        self._done: dict[int, tuple[ref[Tensor], int, Tensor, int]] = {}
        self.read_parameters()

    def read_parameters(self) -> None:
        """Look them up anew; frozen ones too, which may thaw while their mask is in force."""
        reshard(self.model)
        self.parameters = named_parameters(self.model, self._loss)
        self._names = {id(p): name for name, p in self.parameters.items()}

    def attach(self, optimizer: Optimizer) -> None:
        """Hook an optimizer and those within it, or, where that fails, none.

        Args:
            optimizer: The optimizer.

        Raises:
            OptimizerError: If it cannot be masked, or is already.
        """
        self.read_parameters()
        hooked = optimizers_to_hook(optimizer, self._names.keys(), self.scope)
        for each in hooked:
            if each in self._handles:
                raise OptimizerError(
                    f"The mask is attached already to this optimizer ({type(each).__name__}), by "
                    "itself or in a wrapper. To attach to a wrapper, call mask.detach() first."
                )
        # What another attached one holds was watched before, and still is.
        watched = self._holders() if self._watch.on else {}
        held = {id(p) for o in hooked for p in held_parameters(o)} - watched.keys()
        news = {
            name: self.parameters[name]
            for name in self.masks.keys() & self.parameters.keys()
            if not self._watch.on or id(self.parameters[name]) in held
        }
        prints = {name: fingerprint(p) for name, p in news.items()}
        self._hook(hooked)
        self._watch.start(prints)
        self.used = True

    def _hook(self, optimizers: Iterable[Optimizer]) -> None:
        added: dict[Optimizer, list[Any]] = {}
        try:
            for optimizer in optimizers:
                own = optimizer._optimizer_step_pre_hooks
                # A wrapper may share them with the one inside.
                shared = [h for o, h in added.items() if o._optimizer_step_pre_hooks is own]
                added[optimizer] = handles = shared[0] if shared else []
                if shared:
                    continue
                handles.append(optimizer.register_step_pre_hook(self._before))
                if self.scope == "update":
                    handles.append(optimizer.register_step_post_hook(self._after))
        except BaseException:
            _remove(added.values())
            raise
        self._handles.update(added)

    def detach(self) -> None:
        """Take the hooks off, and watch no longer."""
        _remove(self._handles.values())
        self._handles.clear()
        self._watch = WeightWatch(self._watch.hold)

    def masks_made(self) -> None:
        """Watch the weights from here on, where there are new masks and an optimizer attached."""
        self.read_parameters()
        self._watch.forget()
        if self._watch.on:
            self._watch.start({name: fingerprint(self.parameters[name]) for name in self.masks})

    def masks_loaded(self) -> None:
        """Watch the weights from the next step on: the model's may be yet to be loaded."""
        self._watch.forget()

    def check(self, groups: Groups) -> None:
        """Raise an error if weights were moved where their mask could not hold them.

        Args:
            groups: Groups of the ranks that check.

        Raises:
            OptimizerError: If they were, since the masks were made.
            DistributedError: If they were on another rank.
        """
        self.read_parameters()
        with all_ranks_raise(groups, "checking that weights moved in masked steps only"):
            self._watch.check(self.parameters, self.masks, self._holders())

    def moved_unmasked(self) -> bool:
        """Whether weights changed since this was asked before, and nothing ever used the masks."""
        before, self._versions = self._versions, {n: p._version for n, p in self.parameters.items()}
        return not self.used and bool(before) and before != self._versions

    def unheld(self) -> list[str]:
        """Names of trainable parameters that no attached optimizer holds, if any is attached."""
        holders = self._holders()
        trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        return [name for name, p in trained.items() if holders and id(p) not in holders]

    def _holders(self) -> dict[int, list[str]]:
        """Types of the attached optimizers that hold a parameter, by its id."""
        holders: dict[int, list[str]] = {}
        for optimizer in list(self._handles):
            for p in held_parameters(optimizer):
                holders.setdefault(id(p), []).append(type(optimizer).__name__)
        return holders

    @torch.no_grad()
    def apply(self) -> None:
        """Mask the gradients in place."""
        self.used = True
        self.read_parameters()
        _mask_gradients([self._masked(n, p) for n, p in self.parameters.items() if n in self.masks])

    @torch.no_grad()
    def clip(self, most: float, kind: float, *, finite: bool) -> Tensor:
        """Mask the gradients in place and scale them to a norm of at most `most`."""
        self.used = True
        self.read_parameters()
        held = {n: p for n, p in self.parameters.items() if p.grad is not None}
        masked = [self._masked(n, p) for n, p in held.items() if n in self.masks]
        gradients, masks = _gradients(masked)
        whole = len(gradients) == len(held) and not any(is_sharded(p) for p in held.values())
        norm = None
        if kind == 2 and whole and gradients:
            norm = clip_where(gradients, masks, most, finite=finite)
        if norm is None:
            keep_where(gradients, masks)
            norm = nn.utils.clip_grad_norm_(held.values(), most, kind, error_if_nonfinite=finite)
        self._done = {
            id(g): (ref(g), g._version, mask, mask._version)
            for g, mask in zip(gradients, masks, strict=True)
        }
        return norm

    def _masked(self, name: str, parameter: nn.Parameter) -> Masked:
        whole = self.masks[name]
        mask, own = local(whole), local(parameter)
        if whole.shape != parameter.shape or mask.shape != own.shape:
            raise StateError(
                f"The mask of {name!r} was made for the shape {tuple(mask.shape)}, and the "
                f"parameter has {tuple(own.shape)} now: call mask.refresh(loader) after replacing "
                "a layer."
            )
        # The model may have been moved. In the parameter's own layout both are read in order.
        if mask.device != own.device or mask.stride() != own.stride():
            mask = torch.empty_like(own, dtype=torch.bool, requires_grad=False).copy_(mask)
            self.masks[name] = shard_like(mask, parameter)
        return Masked(name, parameter, mask)

    def _is_done(self, masked: Masked) -> bool:
        """Whether a gradient is as `clip` left it."""
        gradient, mask = masked.parameter.grad, masked.mask
        found = self._done.get(id(gradient))
        if gradient is None or found is None:
            return False
        same = found[0]() is gradient and found[2] is mask
        return same and found[1::2] == (gradient._version, mask._version)

    def _masked_by(self, optimizer: Optimizer) -> list[Masked]:
        """The optimizer's parameters that have a mask, groups added later included."""
        held = list(held_parameters(optimizer))
        if any(id(p) not in self._names for p in held):  # perhaps put into the model since
            self.read_parameters()
        names = [self._names[id(p)] for p in held if id(p) in self._names]
        return [self._masked(n, self.parameters[n]) for n in names if n in self.masks]

    @torch.no_grad()
    def _before(
        self, optimizer: Optimizer, args: Arguments, kwargs: Keywords
    ) -> tuple[Arguments, Keywords]:
        masked = self._masked_by(optimizer)
        if self._watch.on:
            self._watch.step({m.name: m.parameter for m in masked}, self.masks)
        closures = [a for a in (*args, *kwargs.values()) if callable(a) and a is not optimizer]
        whole = _Whole(masked if closures else [])
        _mask_gradients(m for m in masked if not self._is_done(m))
        whole.note_versions()

        # A closure computes the gradients inside the step: mask them as it returns too.
        def masking(closure: Callable[[], Any]) -> Callable[[], Any]:
            def call() -> Any:
                whole.put_back()
                value = closure()
                with torch.no_grad():
                    _mask_gradients(masked)
                return value

            return call

        wrap = lambda a: masking(a) if any(a is c for c in closures) else a  # noqa: E731
        saved = getattr(args, "saved", {})  # by other masks
        if self.scope == "update":
            saved = saved | {id(self): [(m, local(m.parameter.detach()).clone()) for m in masked]}
        return _Arguments(map(wrap, args), saved), {k: wrap(a) for k, a in kwargs.items()}

    @torch.no_grad()
    def _after(self, _: Optimizer, args: Arguments, __: Keywords) -> None:
        saved = getattr(args, "saved", {}).get(id(self))
        if saved is None:
            raise OptimizerError(
                "Another step hook of the optimizer replaced the arguments of the step, and with "
                "them the weights the mask saved: register that hook before mask.attach()."
            )
        moved = [local(m.parameter.detach()) for m, _ in saved]
        keep_where(moved, [m.mask for m, _ in saved], [weights for _, weights in saved])

    def __getstate__(self) -> dict[str, Any]:
        """The optimizers themselves, to be copied along; ids are looked up anew."""
        own = {"_handles": list(self._handles), "parameters": {}, "_names": {}, "_done": {}}
        return vars(self) | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The model may be incomplete yet: its parameters are looked up at the first step.
        vars(self).update(state, _handles=WeakKeyDictionary())
        self._hook(state["_handles"])


class _Arguments(Arguments):
    """Positional arguments of one step, with the weights that masks saved before it.

    These so end with the step, also if it fails; and a step may run another inside.
    """

    def __new__(cls, args: Iterable[Any], saved: dict[int, Any]) -> _Arguments:
        made = super().__new__(cls, args)
        made.saved = saved
        return made

    saved: dict[int, Any]


class _Whole:
    """Gradients before they are masked, for a closure that adds to them and clips the sum.

    Whether a step uses those that it finds or those of its closure is not known before.

    Args:
        masked: Parameters that are about to be masked.
    """

    def __init__(self, masked: Iterable[Masked]) -> None:
        found = [(m.parameter, m.parameter.grad) for m in masked]
        self._saved = [(p, g, local(g).clone()) for p, g in found if g is not None]
        self._versions: list[int] = []

    def note_versions(self) -> None:
        """From here on a change is somebody else's."""
        self._versions = [local(g)._version for _, g, _ in self._saved]

    @torch.no_grad()
    def put_back(self) -> None:
        """Put those back, once, that are as the mask left them."""
        for (parameter, gradient, whole), version in zip(self._saved, self._versions, strict=True):
            if parameter.grad is gradient and local(gradient)._version == version:
                local(gradient).data.copy_(whole)  # no change to the hooks of a wrapper
        self._saved, self._versions = [], []


def _gradients(masked: Iterable[Masked]) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients as far as there are any, and their masks."""
    gradients, masks = [], []
    for name, parameter, mask in masked:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.is_sparse:
            raise OptimizerError(
                f"Parameter {name!r} has a sparse gradient: use sparse=False in its layer."
            )
        gradients.append(local(gradient))
        masks.append(mask)
    return gradients, masks


def _mask_gradients(masked: Iterable[Masked]) -> None:
    keep_where(*_gradients(masked))


def _remove(handles: Iterable[Iterable[Any]]) -> None:
    for each in handles:
        for handle in each:
            handle.remove()
