"""Training dynamics in Hugging Face's `Trainer`, as a callback."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gradmask.audit import Dynamics
from gradmask.audit.state_file import load_state, save_state
from gradmask.errors import DataError, GradmaskWarning, OptionError, StateError
from gradmask.integrations.checkpoints import checkpoint_folder, places_of
from gradmask.integrations.numbered import KEY, check_indices, number, restore
from gradmask.integrations.recording import StepRecorder, labels_of, shifts, unwrapped

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        "The Trainer's callback needs Transformers: pip install 'gradmask[transformers]'"
    ) from error

FILE = "dynamics.safetensors"


class DynamicsCallback(TrainerCallback, ExportableState):
    """Records in a `Trainer` what its training says of each sample.

    It takes the logits of the forward passes that training makes anyway: weights, batches and
    random numbers are those of a training without it, to the bit. Each sample's number is its place
    in `train_dataset`. Evaluation does not count.

    Each checkpoint gets what was recorded (`dynamics.safetensors`), and `resume_from_checkpoint`
    goes on with it, to the same bits as a run that was not interrupted.

    Example:
        ```python
        trainer = Trainer(model, args, train_dataset=data)
        dynamics = DynamicsCallback.attach(trainer)
        trainer.train()
        table = rank(dynamics.dynamics, labels)
        ```

    Args:
        positions: Labels that each sample has at most, to follow each, such as tokens. Those of a
            causal language model begin with the second token.
        multilabel: Each class is a label of its own (default: as the model's `problem_type`).
        shift: Logits at one place are of the label at the next (default: for causal language
            models, by their class).
        resume: Folder of the checkpoint that `train(resume_from_checkpoint=...)` is given, if it
            is not in `args.output_dir`.

    Attributes:
        dynamics: The `Dynamics`, from the beginning of training on.
    """

    def __init__(
        self,
        *,
        positions: int | None = None,
        multilabel: bool | None = None,
        shift: bool | None = None,
        resume: str | Path | None = None,
    ) -> None:
        Dynamics(1, positions=positions)  # bad options are told here, not later
        self.positions, self.multilabel = positions, multilabel
        self.shift, self.resume = shift, resume
        self.dynamics: Dynamics | None = None
        self.run = ""
        self._many = False
        self._trainer: Any = None
        self._loader: Any = None
        self._recorder: StepRecorder | None = None

    @classmethod
    def attach(cls, trainer: Any, **options: Any) -> DynamicsCallback:
        """Record the trainings of a trainer.

        Args:
            trainer: The `Trainer`, before `train()`.
            options: Options of the callback.

        Returns:
            The callback, which the trainer has now.

        Raises:
            OptionError: If an option is out of range, the trainer has such a callback already, or
                the dynamics cannot be recorded as it trains.
            DataError: If its training data have no indices to number samples by.
        """
        callback = cls(**options)
        if any(isinstance(other, cls) for other in trainer.callback_handler.callbacks):
            raise OptionError("The Trainer has a DynamicsCallback already: attach one.")
        callback._trainer = trainer
        callback._check_trainer()
        if trainer.train_dataset is not None:
            check_indices(trainer.train_dataset)
        step = trainer.training_step

        @wraps(step)
        def training_step(model: nn.Module, inputs: Any, *args: Any, **given: Any) -> Any:
            with callback._recording(model, inputs):
                return step(model, inputs, *args, **given)

        trainer.training_step = training_step
        trainer.add_callback(callback)
        return callback

    def scores(self) -> dict[str, Tensor]:
        """The scores of every sample, as `Dynamics.scores` has them.

        Raises:
            StateError: If nothing was trained yet.
        """
        if self.dynamics is None:
            raise StateError("No training was recorded: call scores() after trainer.train().")
        return self.dynamics.scores()

    def state(self) -> dict[str, Any]:
        """What the Trainer writes to `trainer_state.json`: which run the file must be of."""
        return {"args": {}, "attributes": {"run": self.run}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Number the samples; begin, or go on from a checkpoint."""
        if self._trainer is None:
            raise OptionError(
                "This DynamicsCallback is not attached: leave it out of callbacks=[...], call "
                "DynamicsCallback.attach(trainer), and leave "
                "restore_callback_states_from_checkpoint False (the dynamics are restored in any "
                "case)."
            )
        self._check_trainer()
        self._release()  # of a training that failed
        loader, model = given["train_dataloader"], unwrapped(given["model"])
        samples = number(loader)
        self._loader, self.run = loader, secrets.token_hex(8)
        self._check_problem(model)
        self.dynamics = self._new(samples, self._is_multilabel(model))
        if state.global_step > 0:
            self._load(args, state)
        shift = shifts(model) if self.shift is None else self.shift
        self._recorder = StepRecorder(
            self.dynamics,
            "DynamicsCallback takes the `logits` of what the model returns in training_step, of as "
            "many rows as samples were collated (no packing or flattening of several into one, and "
            "no fused loss such as use_liger_kernel=True, which leaves them out).",
            shift=shift,
            classes_last=True,
            first=lambda: self._first(model),
        )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take up what all ranks have recorded."""
        self._gather()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the dynamics beside the checkpoint's weights."""
        self._gather()
        folder = checkpoint_folder(args, state)
        # A search keeps its checkpoints in folders of its own; no trial goes on from one.
        if self.dynamics is not None and args.should_save and folder.is_dir():
            about = {"run": self.run, "step": state.global_step}
            save_state(folder / FILE, self.dynamics.state_dict(), about)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the loader as it was; what was recorded stays to be read."""
        self._gather()
        self._release()

    @contextmanager
    def _recording(self, model: nn.Module, inputs: MutableMapping[str, Any]) -> Iterator[None]:
        ids = inputs.pop(KEY, None)
        recorder = self._recorder
        if recorder is None:  # a step outside train()
            yield
            return
        if ids is None:
            raise DataError(
                "A training batch came without its samples' numbers: DynamicsCallback adds them to "
                "what the training loader's collate_fn returns, and something took them out."
            )
        names = tuple(self._trainer.label_names)
        shifted = recorder.shift and "shift_labels" in inputs
        names = ("shift_labels",) if shifted else ("labels", *names)
        labels = labels_of(inputs, names, "let the collator name them `labels`.")
        recorder.begin(model, ids, labels, shift=not shifted)
        try:
            yield
            recorder.end()
        finally:
            recorder.cancel()

    def _first(self, model: Any) -> None:
        """The model's own loss settles what kind its labels are in its first call."""
        self._check_problem(model)
        assert self.dynamics is not None
        assert self._recorder is not None
        many = self._is_multilabel(model)
        if many != self._many:
            self.dynamics = self._new(self.dynamics.samples, many)
            self._recorder.dynamics = self.dynamics

    def _new(self, samples: int, many: bool) -> Dynamics:
        self._many = many
        return Dynamics(samples, positions=self.positions, multilabel=many)

    def _is_multilabel(self, model: Any) -> bool:
        if self.multilabel is not None:
            return self.multilabel
        return bool(_problem(model) == "multi_label_classification")

    def _load(self, args: Any, state: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is None:
            warnings.warn(
                f"The checkpoint of step {state.global_step} was made without DynamicsCallback: "
                "the dynamics begin here.",
                GradmaskWarning,
                stacklevel=2,
            )
            # The Trainer looks it up at the next checkpoint.
            state.stateful_callbacks[type(self).__name__] = self.state()
            return
        places = places_of(FILE, args, state, self.resume)
        assert self.dynamics is not None
        for path in filter(Path.is_file, places):
            found, about = load_state(path)
            run = saved["attributes"]["run"]
            if about == {"run": run, "step": state.global_step}:
                if self.multilabel is None:  # the model may say so in its first call only
                    self.dynamics = self._new(self.dynamics.samples, bool(found.get("multilabel")))
                self.dynamics.load_state_dict(found)
                self.run = run
                return
        raise StateError(
            f"The dynamics of the checkpoint of step {state.global_step} are not in "
            f"{' or '.join(map(str, places))}: give the folder that goes to "
            "train(resume_from_checkpoint=...) to DynamicsCallback.attach(resume=...) as well."
        )

    def _check_trainer(self) -> None:
        args = self._trainer.args
        if args.n_gpu > 1:
            raise OptionError(
                f"DynamicsCallback cannot record a model on {args.n_gpu} GPUs in one process "
                "(nn.DataParallel): start one process a GPU with torchrun, or show it one GPU."
            )
        parallel = getattr(self._trainer.accelerator, "parallelism_config", None)
        for name in ("tp_size", "cp_size", "sp_size"):
            if (getattr(parallel, name, None) or 1) > 1:
                raise OptionError(
                    f"DynamicsCallback cannot record with {name}={getattr(parallel, name)}, where "
                    "ranks share samples: use data parallelism."
                )
        names = self._trainer.label_names
        if len(names) > 1:
            raise OptionError(
                f"DynamicsCallback follows one label a sample or token, and this model has "
                f"several kinds ({', '.join(names)}): record `Dynamics` of your own in a loop."
            )

    def _check_problem(self, model: Any) -> None:
        if _problem(model) == "regression":
            raise OptionError(
                f"{type(model).__name__} is trained on a regression (problem_type='regression', "
                "which num_labels=1 sets), and dynamics are those of classes: give the model "
                "num_labels=2 or more, and whole labels."
            )

    def _gather(self) -> None:
        if self.dynamics is not None:
            self.dynamics.gather()

    def _release(self) -> None:
        if self._loader is not None:
            restore(self._loader)
        self._loader = self._recorder = None


def _problem(model: Any) -> Any:
    """What kind its labels are, once the model knows."""
    return getattr(getattr(model, "config", None), "problem_type", None)
