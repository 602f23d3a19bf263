"""Numbers of samples, taken out of Lightning's training batches before anything sees them."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradmask.audit import Indexed
from gradmask.errors import DataError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class BatchIds:
    """Stands in for `convert_input` of a precision plugin, the first thing done to each batch.

    Args:
        trainer: The trainer.

    Attributes:
        original: What it stands in for.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._plugin = trainer, trainer.precision_plugin
        self._before = vars(self._plugin).get("convert_input")
        self.original = self._plugin.convert_input
        self._ids: Tensor | None = None
        vars(self._plugin)["convert_input"] = self

    def __call__(self, batch: Any) -> Any:
        """Convert a batch; of one to be trained, note its samples and leave them out."""
        if self._trainer.training:
            batch, self._ids = self._split(batch)
        return self.original(batch)

    def without(self, batch: Any) -> Any:
        """Convert a batch of the training loader that is not to be trained now."""
        return self.original(self._split(batch)[0])

    def take(self) -> Tensor:
        """The samples of the batch that is to be trained.

        Raises:
            DataError: If it had none.
        """
        ids, self._ids = self._ids, None
        if ids is None:
            raise DataError(
                "A training batch has no numbers of its samples: read DataLoader(Indexed(data), "
                "...), and keep what Indexed adds when batches are collated (the last entry, or "
                f"{indexed_of(self._trainer).key!r} of a mapping). A training_step(dataloader_iter)"
                " that reads for itself cannot be followed."
            )
        return ids

    def remove(self) -> None:
        """Put back what it stands in for."""
        if self._before is None:
            vars(self._plugin).pop("convert_input", None)
        else:
            vars(self._plugin)["convert_input"] = self._before

    def _split(self, batch: Any) -> tuple[Any, Tensor | None]:
        """A batch without the numbers, and those, if it has them; the batch itself stays whole."""
        if isinstance(batch, MutableMapping):
            key = indexed_of(self._trainer).key
            if _are_ids(batch.get(key)):
                batch = copy.copy(batch)
                return batch, batch.pop(key)
        elif isinstance(batch, list | tuple) and len(batch) > 1 and _are_ids(batch[-1]):
            return type(batch)(batch[:-1]), batch[-1]
        return batch, None


def indexed_of(trainer: Trainer) -> Indexed:
    """The `Indexed` data set that a trainer trains on.

    Args:
        trainer: The trainer.

    Raises:
        DataError: If there is none.
    """
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    while dataset is not None and not isinstance(dataset, Indexed):  # a Subset of one
        dataset = getattr(dataset, "dataset", None)
    if dataset is None:
        found: Any = trainer.train_dataloader
        raise DataError(
            f"DynamicsCallback needs the number of each sample, and the trainer's train_dataloader "
            f"(a {type(found).__name__}) has no Indexed data set: read DataLoader(Indexed(data), "
            "...), with `from gradmask.audit import Indexed`."
        )
    return dataset


def _are_ids(value: Any) -> bool:
    whole = isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()
    return whole and value.dim() == 1
