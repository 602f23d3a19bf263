"""The mask in the Trainer of Lightning, as a callback."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from gradmask import FisherMask
from gradmask.errors import DataError, GradmaskWarning, OptionError
from gradmask.integrations.first_step import CrossEntropyNote, is_compiled, targets_of
from gradmask.integrations.lightning_dynamics import DynamicsCallback
from gradmask.integrations.lightning_module import (
    callback_class,
    forward_errors,
    named_module,
    optimizers_of,
    prepared,
    trainer_is,
)
from gradmask.integrations.online import Online, check_online, mask_of
from gradmask.integrations.schedule import Refresh, Schedule
from gradmask.integrations.trials import Reporter, mask_options

__all__ = ["DynamicsCallback", "FisherMaskCallback"]
_REFUSED = ("deepspeed", "fsdp", "modelparallel", "xla")

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

    from gradmask.study import Trial
else:
    Callback = callback_class()


class FisherMaskCallback(Callback):
    """Mask the training of a `LightningModule`, in trainers of `lightning` and `pytorch_lightning`.

    All optimizers of the trainer that hold parameters of what is measured are masked. Gradients are
    clipped first and then masked, as in a plain loop. Checkpoints hold the mask, so that
    `trainer.fit(..., ckpt_path=...)` goes on with it.

    Example:
        ```python
        trainer = Trainer(callbacks=[FisherMaskCallback(keep=0.25)])
        trainer.fit(module, loader)
        ```

    Args:
        keep: Share of the trainable parameters that still learn, in (0, 1].
        refresh: When the mask is made anew: `epoch` (before every epoch but the first), a number of
            optimizer steps (of the masked optimizers, together), or `start` (once). `online`: as
            `epoch`, of the batches and the loss that were trained, without a pass over the data.
        data: Batches to measure on (default: the trainer's `train_dataloader`).
        protect: Batches whose skills must stay (see `FisherMask.refresh`).
        model: Name of the submodule whose forward is measured and masked, such as `net` (default:
            the module itself, whose `forward` must give what `loss` takes).
        every: With `online`: measure one of so many batches, the first after each mask among them.
        steps: With `online`: make the mask after every so many optimizer steps, not each epoch. An
            option of its own, since a number as `refresh` means passes over the data.
        **options: Options of `FisherMask`. `unpack` gets batches as `training_step` does.

    Attributes:
        mask: The `FisherMask`, once training has started.
        steps: Masked optimizer steps so far.

    Raises:
        OptionError: If an option is out of range or unknown.
    """

    def __init__(
        self,
        keep: float = 0.25,
        *,
        refresh: Refresh = "epoch",
        data: Iterable[Any] | None = None,
        protect: Iterable[Any] | None = None,
        model: str | None = None,
        every: int = 10,
        steps: int | None = None,
        **options: Any,
    ) -> None:
        self._schedule = Schedule(refresh, steps, every)
        if self._schedule.online:
            check_online(keep, every, options, data=data, protect=protect)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            FisherMask(nn.Linear(1, 1), keep, **options)  # bad options are told here, not later
        self.keep, self.data, self.model, self.options = keep, data, model, options
        self.protect = protect
        self.mask: FisherMask | None = None
        self.steps = 0
        self._online: Online | None = None
        self._state: Mapping[str, Any] | None = None
        self._handles: list[Any] = []
        self._note: CrossEntropyNote | None = None
        self._begun = False
        self._epoch: int | None = None
        self._refreshed = 0
        self._reporter: Reporter | None = None

    @classmethod
    def of(cls, trial: Trial, **options: Any) -> FisherMaskCallback:
        """The callback of a run of a study: with the arm's mask, or what stands in its place.

        What the module logs by the end of each epoch is reported to the study: name it
        `val_...` and `test_...`. To go on from a checkpoint, keep it in `trial.directory`.

        Args:
            trial: The run.
            options: Options of the callback; the arm's own are taken over these.
        """
        callback = cls(**mask_options(trial, options))
        callback._reporter = Reporter(trial)
        return callback

    @property
    def state_key(self) -> str:
        """Its place in checkpoints; masks of several submodules have several."""
        return self._generate_state_key(model=self.model)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, which load without pickle."""
        if self._state is not None:  # loaded for a training that has not started
            return dict(self._state)
        if self._online is not None:
            self._online.gather()
        mask = self.mask.state_dict() if self.mask else None
        return {"mask": mask, "steps": self.steps, "epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note what a checkpoint has; the optimizers are not there yet."""
        self._state = state_dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that step where no mask can hold."""
        for kind in type(trainer.strategy).__mro__ if stage == "fit" else ():
            name = kind.__name__
            if any(refused in name.lower() for refused in _REFUSED):
                raise OptionError(
                    f"FisherMaskCallback cannot mask under {name}, whose optimizers do not step on "
                    "the module's own whole parameters: use strategy='ddp' or one device."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the mask; weights, optimizers and loader are all there."""
        self._detach()
        measured = named_module(pl_module, self.model)
        if self.mask is None or self.mask.model is not measured or self._state is not None:
            together = {"group": dist.group.WORLD} if trainer.world_size > 1 else {}
            hidden = "a compiled module" if is_compiled(pl_module) else ""
            make = FisherMask if self._reporter is None else self._reporter.trial.new_mask
            options = together | self.options
            made = mask_of(measured, self.keep, self._schedule, options, hidden, make)
            (self.mask, self._online), self.steps = made, 0
        if self._state is not None:
            self.steps, self._epoch = self._state["steps"], self._state.get("epoch")
            if self._state["mask"] is not None:
                self.mask.load_state_dict(self._state["mask"])
                if self._online is not None:
                    self._online.loaded()
            self._state = None
            if self._reporter is not None:
                self._reporter.resume(trainer.current_epoch)
        self.mask.unpack = partial(
            prepared, trainer, pl_module, self.options.get("unpack"), trained=self.data is None
        )
        for optimizer in optimizers_of(trainer, self.mask):
            self.mask.attach(optimizer)
            self._handles.append(optimizer.register_step_post_hook(self._count))
        if self._online is not None:
            self._online.end()  # until the first batch
        self._refreshed, self._begun = self.steps, False
        if self._schedule.at_start(self.mask.refreshes):
            self._refresh(trainer, pl_module)
        elif not self.mask.refreshes and self._online is None:
            self._measure(trainer, pl_module, self.mask.check)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Make the mask of an epoch, which some step will use; look at what a batch trains.

        Not at the epoch's start: of a run that goes on from a last batch Lightning does not tell.
        """
        epoch, self._epoch = self._epoch, trainer.current_epoch
        if self._epoch not in (0, epoch) and self._schedule.after_epoch(last=False):
            self._refresh(trainer, pl_module)
        first, self._begun = not self._begun, True
        assert self.mask is not None
        if self._online is not None:
            self._online.begin(redirected=self._redirected(trainer, pl_module))
            return
        measured = self.options.get("loss") is None and self.mask.reads_data
        automatic = pl_module.automatic_optimization and not is_compiled(pl_module)
        if first and measured and automatic:
            unpack = self.options.get("unpack")
            known = unpack is None or self.data is None  # whose batches may have another form
            targets = targets_of(batch, unpack) if known else None
            self._note = CrossEntropyNote(self.mask.model, targets)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Make the mask after so many optimizer steps, of which a batch may have none or many."""
        self._compare(trainer, pl_module, outputs)
        if self._online is not None:
            self._online.end()
            if pl_module.automatic_optimization and outputs is not None:
                self._online.check()
        steps = range(self._refreshed + 1, self.steps + 1)
        self._refreshed = self.steps
        if any(self._schedule.after_step(step) for step in steps):
            self._refresh(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the share that learns."""
        if self.mask is not None:
            name = "fisher_mask/kept" if self.model is None else f"fisher_mask/kept/{self.model}"
            pl_module.log(name, self.mask.kept_fraction, sync_dist=trainer.world_size > 1)
        if self._reporter is not None:
            logged = trainer.callback_metrics.items()
            metrics = {k: v for k, v in logged if not k.startswith("fisher_mask/")}
            self._reporter.add(trainer.current_epoch + 1, metrics)
            self._reporter.save()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what a test after training measured."""
        if self._reporter is not None:
            metrics = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("test")}
            self._reporter.add(trainer.current_epoch, metrics)
            self._reporter.flush()

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Detach the mask, and take off the hooks of a batch that did not end."""
        self._detach()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach the mask, and tell if there never was one."""
        self._detach()
        made = self.mask is not None and self.mask.refreshes
        made = made or (self._reporter is not None and not self._reporter.trial.arm.masks)
        if self.steps and not made and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            mend = "steps=<few>" if self._schedule.online else "refresh='start', fewer steps"
            warnings.warn(
                f"Training ended before a mask was made (refresh={self._schedule.refresh!r}), so "
                f"nothing was masked: use {mend}, or more epochs.",
                GradmaskWarning,
                stacklevel=2,
            )

    def _loader(self, trainer: Trainer) -> Iterable[Any]:
        loader: Any = trainer.train_dataloader if self.data is None else self.data
        if self.data is None and (loader is None or isinstance(loader, list | tuple | Mapping)):
            raise DataError(
                f"The trainer's train_dataloader is a {type(loader).__name__}, and not one loader: "
                "say which batches to measure on with FisherMaskCallback(data=...)."
            )
        return loader  # type: ignore[no-any-return]

    def _refresh(self, trainer: Trainer, module: LightningModule) -> None:
        assert self.mask is not None
        if self._online is not None:
            self._online.refresh()
        else:
            self._measure(trainer, module, self.mask.refresh)

    def _measure(
        self, trainer: Trainer, module: LightningModule, measure: Callable[..., None]
    ) -> None:
        assert self.mask is not None
        plugin, loader = trainer.precision_plugin, self._loader(trainer)
        # Mixed precision is for speed: its weights are float32, and measured in it.
        own = str(plugin.precision).endswith("-true")
        batches = "the training loader" if self.data is None else "data"
        context = plugin.forward_context() if own else nullcontext()
        with trainer_is(None, module), forward_errors(self.mask.model, batches), context:
            measure(loader, protect=self.protect)

    def _compare(self, trainer: Trainer, module: LightningModule, outputs: Any) -> None:
        note = self._note
        self._forget()
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if note is None or loss is None:  # compared before, or no step
            return
        assert self.mask is not None
        other_calls = int(self._redirected(trainer, module))
        found = note.difference(loss * trainer.accumulate_grad_batches, other_calls)
        if found:
            warnings.warn(
                f"FisherMaskCallback measures the cross_entropy of "
                f"{type(self.mask.model).__name__}.forward, and {found}: the mask may be that of "
                "another loss than is trained. Give loss=..., unpack=lambda batch: (inputs, "
                "targets), model='submodule' as in training_step; if all is meant so, "
                "loss='cross_entropy'.",
                GradmaskWarning,
                stacklevel=3,
            )

    def _redirected(self, trainer: Trainer, module: LightningModule) -> bool:
        """Whether a strategy that wraps the module sends training_step through its forward."""
        assert self.mask is not None
        return self.mask.model is module and trainer.strategy.model is not module

    def _forget(self) -> None:
        if self._note is not None:
            self._note.remove()
            self._note = None

    def _count(self, *_: Any) -> None:
        self.steps += 1

    def _detach(self) -> None:
        self._forget()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._online is not None:
            self._online.end()
        if self.mask is not None:
            self.mask.detach()
