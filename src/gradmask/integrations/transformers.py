"""The mask in Hugging Face's `Trainer`, as a callback."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from torch.utils.data import IterableDataset

from gradmask import FisherMask, InfluenceMonitor
from gradmask.distributed import is_sharded
from gradmask.errors import (
    DataError,
    GradmaskWarning,
    OptionError,
    StateError,
    check_choice,
    check_keep,
)
from gradmask.integrations.checkpoints import checkpoint_folder, places_of
from gradmask.integrations.first_step import OwnLossNote, is_compiled
from gradmask.integrations.numbered import unnumbered
from gradmask.integrations.online import Online, check_online, mask_of
from gradmask.integrations.schedule import Refresh, Schedule
from gradmask.integrations.transformers_dynamics import DynamicsCallback
from gradmask.integrations.trials import Reporter, mask_options
from gradmask.loaders import loader_over
from gradmask.seeding import own_random_state

if TYPE_CHECKING:
    from gradmask.study import Trial

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        "The Trainer's callback needs Transformers: pip install 'gradmask[transformers]'"
    ) from error

__all__ = ["FILE", "DynamicsCallback", "FisherMaskCallback"]
FILE = "fisher_mask.safetensors"
_OPTIONS = set(inspect.signature(FisherMask).parameters) - {"model", "keep", "group"}


class FisherMaskCallback(TrainerCallback, ExportableState):
    """Masks the gradients of a `Trainer`, and measures the masks on its training data.

    Each checkpoint gets the mask beside the weights (`fisher_mask.safetensors`), and
    `resume_from_checkpoint` goes on with it, to the same bits as a run that was not interrupted.
    The logs get the share that learns, as `fisher_mask/kept`.

    The Fisher information is that of the model's own likelihood, as the model's `loss` has it,
    whatever the Trainer adds (label smoothing, `compute_loss_func`, a `compute_loss` of your own),
    with a warning if the first step trains something else: give `loss` for another one.

    Example:
        ```python
        trainer = Trainer(model, args, train_dataset=data, callbacks=[FisherMaskCallback()])
        ```

    Args:
        keep: Share of all trainable parameters together that still learn, in (0, 1].
        refresh: When the mask is measured: before each epoch but the first (`epoch`), once before
            the first step (`start`), or after every so many optimizer steps. `online`: before each
            epoch but the first, of the batches that were trained, without a pass over the data.
        data: Loader of batches to measure on, of the rank's own samples on many processes.
            Default: the training data, read by a loader of their own, collated as for training.
            Needed where the training data are an iterable dataset, which cannot be read twice.
        protect: Loader of batches whose skills must stay (see `FisherMask.refresh`).
        resume: Folder of the checkpoint that `train(resume_from_checkpoint=...)` is given, if it
            is not in `args.output_dir`.
        monitor: Options of `InfluenceMonitor`, such as `{"every": 100}` (optimizer steps), whose
            numbers are then in the logs.
        every: With `online`: measure one of so many batches, the first after each mask among them.
        steps: With `online`: make the mask after every so many optimizer steps, not each epoch. An
            option of its own, since a number as `refresh` means passes over the data.
        options: Options of `FisherMask`: `scope`, `strategy`, `kind`, `loss`, ...

    Attributes:
        mask: The mask, from the beginning of training on.

    Raises:
        OptionError: If an option is unknown or out of range.
    """

    def __init__(
        self,
        keep: float = 0.25,
        *,
        refresh: Refresh = "epoch",
        data: Iterable[Any] | None = None,
        protect: Iterable[Any] | None = None,
        resume: str | Path | None = None,
        monitor: Mapping[str, Any] | None = None,
        every: int = 10,
        steps: int | None = None,
        **options: Any,
    ) -> None:
        check_keep(keep)
        for name in options:
            check_choice("option", name, _OPTIONS)
        self.schedule, self.options = Schedule(refresh, steps, every), options
        if self.schedule.online:
            data_of_mask = data if monitor is None else None
            check_online(keep, every, options, data=data_of_mask, protect=protect)
        self.keep, self.data, self.protect, self.resume = float(keep), data, protect, resume
        self.watched = None if monitor is None else dict(monitor)
        self.mask: FisherMask | None = None
        self.monitor: InfluenceMonitor | None = None
        self._online: Online | None = None
        self.sha256 = ""
        self.left_out: list[str] = []
        self._begun = self._warned = self._ended = False
        self._note: OwnLossNote | None = None
        self._record: dict[str, float] = {}
        self._reporter: Reporter | None = None

    @classmethod
    def of(cls, trial: Trial, **options: Any) -> FisherMaskCallback:
        """The callback of a run of a study: with the arm's mask, or what stands in its place.

        What the Trainer evaluates is reported to the study, `eval_...` as `val_...`, and
        `eval_test_...` (of `eval_dataset={"val": ..., "test": ...}`) as `test_...`. To go on from
        a checkpoint of the Trainer, let it write to `trial.directory`.

        Args:
            trial: The run.
            options: Options of the callback; the arm's own are taken over these.
        """
        callback = cls(**mask_options(trial, options))
        callback._reporter = Reporter(trial)
        return callback

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Note what was measured, for the study."""
        if self._reporter is not None:
            self._reporter.add(float(state.epoch or 0), given.get("metrics") or {})
            if self._ended:
                self._reporter.flush()

    def state(self) -> dict[str, Any]:
        """What the Trainer writes to `trainer_state.json`: the mask's SHA-256, and options."""
        options = {"keep": self.keep, "refresh": self.schedule.refresh, **self.options}
        if self.schedule.online:
            options |= {"every": self.schedule.every, "steps": self.schedule.steps}
        if self._online is not None:  # the place in training is another at each step
            self.sha256 = self._online.sha256()
        plain = {k: v for k, v in options.items() if v is None or isinstance(v, str | int | float)}
        given = {"data": self.data, "resume": self.resume, "monitor": self.watched}
        left_out = [*options.keys() - plain.keys(), *(k for k, v in given.items() if v is not None)]
        return {"args": plain, "attributes": {"sha256": self.sha256, "left_out": sorted(left_out)}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Make the mask, or load that of the checkpoint, and attach it to the optimizer."""
        model: nn.Module = given["model"]
        saved = self._check(args, state)
        self._detach()
        sharded = any(map(is_sharded, model.parameters()))
        together = args.world_size > 1 and not sharded
        group = dist.group.WORLD if together else None
        hidden = "a compiled model" if args.torch_compile else ""
        hidden = f"a model on {args.n_gpu} GPUs in one process" if args.n_gpu > 1 else hidden
        options = {"group": group, **self.options}
        make = FisherMask if self._reporter is None else self._reporter.trial.new_mask
        found = mask_of(model, self.keep, self.schedule, options, hidden, make)
        self.mask, self._online = found
        if state.global_step > 0:
            self._load(self.mask, args, state, saved)
            if self._reporter is not None:
                self._reporter.resume(float(state.epoch or 0))
        self.mask.attach(given["optimizer"])
        if self._online is not None:
            self._online.end()  # until the first step
        self._begun, self._warned, self._ended, self._record = False, False, False, {}
        if self.schedule.at_start(self.mask.refreshes):
            self._refresh(args, state, given["train_dataloader"])
        elif not self.mask.refreshes and self._online is None:
            with self._reading(args):
                data = self._data(args, state, given["train_dataloader"])
                self.mask.check(data, protect=self.protect)
        self.sha256 = self._sha256()
        each = self.schedule.steps
        if (state.max_steps if each else state.num_train_epochs) <= (each or 1):
            self._warn_if_never_made("ends", state.max_steps)
        self.monitor = None
        if self.watched is not None:
            self.monitor = self._monitor(model, args, state, given["train_dataloader"])
        named = self.options.get("loss") is not None or not self.mask.reads_data
        told = self._online or args.label_smoothing_factor or args.n_gpu > 1 or args.torch_compile
        if not (named or told or is_compiled(model)):
            self._note = OwnLossNote(model)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure the mask of this epoch.

        Here, not at the end of the epoch before: of a run that goes on from the last step of an
        epoch the Trainer does not call that.
        """
        within = not self._begun and not float(state.epoch or 0).is_integer()
        self._begun = True
        if state.global_step > 0 and not within and self.schedule.after_epoch(last=False):
            self._refresh(args, state, given["train_dataloader"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Collect in this step, of one batch or many."""
        if self._online is not None:
            self._online.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure the mask, and influence, if it is time; a last mask no step would use."""
        if self._online is not None:
            self._online.end()
            self._online.check()
        self._warn_of_another_loss()
        step = state.global_step
        if self.monitor is not None and step % self.monitor.every == 0:
            self.monitor.calls = step
            self._record = self.monitor.measure()
        if self.schedule.after_step(step) and step < state.max_steps:
            self._refresh(args, state, given["train_dataloader"])

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Add the share that learns, and influence as measured last, to the log of a step."""
        logs: dict[str, float] = given["logs"]
        if "loss" not in logs or self.mask is None:
            return
        found = {k: v for k, v in self._record.items() if k.startswith("influence/")}
        found["fisher_mask/kept"] = self.mask.kept_fraction
        logs.update(found)
        state.log_history[-1].update(found)  # a copy was put there before

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the mask beside the checkpoint's weights."""
        folder = checkpoint_folder(args, state)
        assert self.mask is not None
        if self._online is not None:
            self._online.gather()
        sharded = any(map(is_sharded, self.mask.masks.values()))
        # A search keeps its checkpoints in folders of its own; no trial goes on from one.
        if sharded or (args.should_save and folder.is_dir()):
            self.mask.save(folder / FILE)
        if self._reporter is not None and args.should_save:
            self._reporter.save()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the mask off the optimizer; the masks stay to be read."""
        self._warn_if_never_made("ended", state.global_step)
        self._detach()
        self._ended = True
        if self._reporter is not None:
            self._reporter.flush()

    def _check(self, args: Any, state: Any) -> Any:
        """What the state says of this callback, if the callback can be used as it is."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, list):
            raise OptionError(f"The Trainer has {len(saved)} FisherMaskCallbacks: give it one.")
        if self.left_out:
            raise OptionError(
                "restore_callback_states_from_checkpoint=True made the FisherMaskCallback anew, "
                f"without {', '.join(self.left_out)}, which trainer_state.json cannot hold: leave "
                "it False. The mask is restored in any case."
            )
        smoothing = not self.schedule.online and args.label_smoothing_factor
        if smoothing and self.options.get("loss") is None:
            warnings.warn(
                f"label_smoothing_factor={args.label_smoothing_factor}: the Fisher information is "
                "that of the model's likelihood, without the smoothing.",
                GradmaskWarning,
                stacklevel=2,
            )
        return saved

    def _load(self, mask: FisherMask, args: Any, state: Any, saved: Any) -> None:
        if saved is None:
            warnings.warn(
                f"The checkpoint of step {state.global_step} was made without FisherMaskCallback: "
                "the mask begins here.",
                GradmaskWarning,
                stacklevel=2,
            )
            # The Trainer looks it up at the next checkpoint.
            state.stateful_callbacks[type(self).__name__] = self.state()
            return
        places = places_of(FILE, args, state, self.resume)
        for path in filter(Path.is_file, places):
            mask.load(path)
            if self._online is not None:
                self._online.loaded()
            if self._sha256() == saved["attributes"]["sha256"]:
                return
        raise StateError(
            f"The mask of the checkpoint of step {state.global_step} is not in "
            f"{' or '.join(map(str, places))}: give the folder that goes to "
            "train(resume_from_checkpoint=...) to FisherMaskCallback(resume=...) as well."
        )

    def _refresh(self, args: Any, state: Any, loader: Any) -> None:
        assert self.mask is not None
        if self._online is not None:
            self._online.refresh()
        else:
            with self._reading(args):
                self.mask.refresh(self._data(args, state, loader), protect=self.protect)
        self.sha256 = self._sha256()

    def _sha256(self) -> str:
        assert self.mask is not None
        return self.mask.sha256() if self._online is None else self._online.sha256()

    def _reading(self, args: Any) -> AbstractContextManager[None]:
        assert self.mask is not None
        place = self.mask.refreshes, args.process_index
        return own_random_state("reading", self.mask.seed, *place)

    def _data(self, args: Any, state: Any, loader: Any, size: int = 0) -> Iterable[Any]:
        if self.data is not None:
            return self.data
        # Not the Trainer's own loader: reading it within an epoch would end that.
        dataset: Any = getattr(loader, "dataset", None)
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise DataError(
                f"The training data ({type(dataset).__name__}) cannot be read again while they are "
                "trained on: give data=loader of batches to measure on."
            )
        own = range(args.process_index, len(dataset), args.world_size)
        with unnumbered(loader):  # of a DynamicsCallback
            return loader_over(loader, own, size or state.train_batch_size or args.train_batch_size)

    def _monitor(self, model: nn.Module, args: Any, state: Any, loader: Any) -> InfluenceMonitor:
        given = {k: v for k, v in self.options.items() if k in ("loss", "unpack", "seed")}
        options = {"sources": 64, "probe": 256, **given, **(self.watched or {})}
        # In one batch, which pads all samples to one length.
        data = self._data(args, state, loader, options["sources"] + options["probe"])
        return InfluenceMonitor(model, data, **options)

    def _warn_if_never_made(self, ends: str, steps: int) -> None:
        masks = self._reporter is None or self._reporter.trial.arm.masks
        if self.mask is not None and masks and not self.mask.refreshes and not self._warned:
            self._warned = True
            mend = "steps" if self.schedule.online else "refresh"
            number = f", or {mend}=<a number of steps below {steps}>" if steps > 1 else ""
            warnings.warn(
                f"Nothing is masked: training {ends} after {steps} steps, before the first mask is "
                f"measured (refresh={self.schedule.refresh!r}). Use refresh='start'{number}.",
                GradmaskWarning,
                stacklevel=3,
            )

    def _warn_of_another_loss(self) -> None:
        note, self._note = self._note, None
        if note is None:
            return
        note.remove()
        if note.called and not note.followed:
            warnings.warn(
                "The Trainer trains another loss than the model's own (compute_loss_func, or a "
                "compute_loss of your own), and the Fisher information is that of the model's own: "
                "give FisherMaskCallback(loss=...), a callable of (outputs, targets); or name the "
                "model's own, such as loss='cross_entropy', if it is meant.",
                GradmaskWarning,
                stacklevel=3,
            )

    def _detach(self) -> None:
        if self._note is not None:
            self._note.remove()
            self._note = None
        if self._online is not None:
            self._online.end()
        if self.mask is not None:
            self.mask.detach()
