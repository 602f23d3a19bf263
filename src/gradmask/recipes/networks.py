"""Networks that several runs of a study begin with: trained once, by whoever comes first."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock
from torch import nn

from gradmask.recipes.config import Comparison
from gradmask.recipes.data.batches import Batches
from gradmask.recipes.data.images import ImageData
from gradmask.recipes.training.components import new_model
from gradmask.recipes.training.run import Row, train_run
from gradmask.recipes.training.weights import load_weights, save_weights


def trained_network(config: Comparison, data: ImageData, seed: int, path: Path) -> nn.Module:
    """Train a network without a mask, or read what another run of the study has trained.

    Args:
        config: Options of the training.
        data: The images.
        seed: Seed of the training.
        path: Where its weights are kept; processes wait for the one that trains.

    Returns:
        The network after its last epoch, on the CPU.

    Raises:
        Diverged: If training diverges.
        StateError: If the file is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            with TemporaryDirectory(dir=path.parent) as place:

                def keep_last(row: Row, model: nn.Module, _: Batches) -> None:
                    if row["epoch"] == config.epochs:
                        save_weights(path, model.state_dict())

                folder = Path(place)
                train_run(config, data, "none", seed, folder, observe=keep_last, checkpoints=False)
    model = new_model(config, data, seed)
    load_weights(path, model)
    return model
