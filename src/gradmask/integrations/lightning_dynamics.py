"""Training dynamics in the Trainer of Lightning, as a callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gradmask.audit import Dynamics
from gradmask.distributed import is_compiled
from gradmask.errors import ModelError, OptionError, StateError
from gradmask.integrations.lightning_ids import BatchIds, indexed_of
from gradmask.integrations.lightning_module import callback_class, named_module
from gradmask.integrations.recording import StepRecorder, is_hugging_face, labels_of, shifts
from gradmask.seeding import own_random_state

_LABELS = ("labels", "label", "y", "targets", "target")
_REFUSED = ("modelparallel", "xla")

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = callback_class()


class DynamicsCallback(Callback):
    """Record what training says of each sample, in trainers of `lightning` and `pytorch_lightning`.

    It takes the logits of the forward pass that `training_step` makes anyway, once a batch. The
    numbers that `Indexed` adds are taken out of each training batch before the module's hooks and
    `training_step` see it. Validation does not count. Checkpoints hold what was recorded, so that
    `trainer.fit(..., ckpt_path=...)` goes on with it.

    Example:
        ```python
        dynamics = DynamicsCallback()
        loader = DataLoader(Indexed(data), ...)
        trainer = Trainer(callbacks=[dynamics])
        trainer.fit(module, loader)
        dynamics.scores()
        ```

    Args:
        model: Name of the submodule whose forward gives the logits, such as `net` (default: the
            module itself, if `training_step` calls it).
        unpack: Makes (inputs, labels) of a batch as `training_step` gets it. Default: labels are
            its second entry, or `labels`, `label`, `y`, `targets` or `target` of a mapping.
        positions: Labels that each sample has at most, to follow each, such as tokens.
        multilabel: Each class is a label of its own.
        shift: Logits at one place are of the label at the next (default: for causal language models
            of Hugging Face's, by their class).
        class_dim: Dimension of the classes in the logits, as `Dynamics` has it.

    Attributes:
        dynamics: The `Dynamics`, once training has started.

    Raises:
        OptionError: If an option is out of range.
    """

    def __init__(
        self,
        *,
        model: str | None = None,
        unpack: Callable[[Any], Any] | None = None,
        positions: int | None = None,
        multilabel: bool = False,
        shift: bool | None = None,
        class_dim: int | None = None,
    ) -> None:
        self._options: dict[str, Any] = {
            "positions": positions,
            "multilabel": multilabel,
            "class_dim": class_dim,
        }
        Dynamics(1, **self._options)  # bad options are told here, not later
        self.model, self.unpack, self.shift = model, unpack, shift
        self.dynamics: Dynamics | None = None
        self._measured: nn.Module | None = None
        self._recorder: StepRecorder | None = None
        self._ids: BatchIds | None = None
        self._state: Mapping[str, Any] | None = None

    def scores(self) -> dict[str, Tensor]:
        """The scores of every sample, as `Dynamics.scores` has them.

        Raises:
            StateError: If nothing was trained yet.
        """
        if self.dynamics is None:
            raise StateError("No training was recorded: call scores() after trainer.fit().")
        return self.dynamics.scores()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, which load without pickle; called by all ranks."""
        if self._state is not None:  # loaded for a training that has not started
            return dict(self._state)
        if self.dynamics is None:
            return {"dynamics": None}
        self.dynamics.gather()
        return {"dynamics": self.dynamics.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note what a checkpoint has; the data are not there yet."""
        self._state = state_dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be followed."""
        if stage != "fit":
            return
        for kind in type(trainer.strategy).__mro__:
            if any(refused in kind.__name__.lower() for refused in _REFUSED):
                raise OptionError(
                    f"DynamicsCallback cannot record under {kind.__name__}, whose ranks may share "
                    "samples: use strategy='ddp' or one device."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on batches come without the numbers of their samples."""
        self._release()
        self._ids = BatchIds(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on from a checkpoint or an earlier fit."""
        samples = len(indexed_of(trainer))
        measured = named_module(pl_module, self.model, "DynamicsCallback")
        _check_compiled(pl_module, self.model)
        known = self.dynamics is not None and self.dynamics.samples == samples
        if self.dynamics is None or not known or self._measured is not measured or self._state:
            self.dynamics = Dynamics(samples, **self._options)
        if self._state is not None:
            if self._state["dynamics"] is not None:
                self.dynamics.load_state_dict(self._state["dynamics"])
            self._state = None
        self._measured = measured
        shift = shifts(measured) if self.shift is None else self.shift
        self._recorder = StepRecorder(
            self.dynamics,
            f"DynamicsCallback takes what {type(measured).__name__}.forward returns in "
            "training_step: name the submodule that is called there and gives the logits, "
            "DynamicsCallback(model=...).",
            shift=shift,
            classes_last=is_hugging_face(measured),
        )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Watch the forward passes of this batch."""
        assert self._ids is not None
        assert self._recorder is not None
        assert self._measured is not None
        ids, labels = self._ids.take(), self._labels(batch)
        self._recorder.begin(self._measured, ids, labels)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        """Tell of a step without logits before the weights change, where one step is a batch."""
        if pl_module.automatic_optimization and self._recorder is not None:
            self._recorder.end()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """The batch has been trained."""
        assert self._recorder is not None
        self._recorder.end()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what all ranks have recorded."""
        if self.dynamics is not None:
            self.dynamics.gather()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave everything as it was; what was recorded stays to be read."""
        if self.dynamics is not None:
            self.dynamics.gather()
        self._release()

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Take off the hooks of a batch that did not end."""
        self._release()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """The same, of a fit without batches."""
        self._release()

    def _labels(self, batch: Any) -> Tensor:
        mend = "give DynamicsCallback(unpack=lambda batch: (inputs, labels))."
        if self.unpack is not None:
            with own_random_state("unpack"):
                batch = self.unpack(batch)
        return labels_of(batch, _LABELS, mend)

    def _release(self) -> None:
        if self._recorder is not None:
            self._recorder.cancel()
        if self._ids is not None:
            self._ids.remove()
        self._ids = None


def _check_compiled(module: nn.Module, name: str | None) -> None:
    """Refuse a place inside compiled code, where a hook would change it."""
    path = (name or "").split(".") if name else []
    outer = [module.get_submodule(".".join(path[:n])) for n in range(len(path))]
    inside = any(is_compiled(part) or part._compiled_call_impl is not None for part in outer)
    if inside or getattr(module, "_compiler_ctx", None) is not None:
        raise ModelError(
            "DynamicsCallback cannot see the logits inside a compiled module: compile the submodule"
            " that gives them, self.net = torch.compile(net), and name it, model='net'."
        )
