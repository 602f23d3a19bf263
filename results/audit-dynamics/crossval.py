"""Confident learning on the runs of a folder: cleanlab's label quality by 5-fold cross-validation.

    python results/audit-dynamics/crossval.py runs/audit-sym20 0 [epochs]

The network of `gradmask run`, trained anew without each fifth of the training images, says what it
takes these for. Prints AUROC and average precision of two of cleanlab's scores, and the time.
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from cleanlab.rank import get_label_quality_scores
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold

from gradmask.recipes.config import Comparison
from gradmask.recipes.data.images import load_images
from gradmask.recipes.data.transforms import Normalize
from gradmask.recipes.training.run import train_run
from gradmask.study.folder import read_results
from gradmask.study.options import from_plain


def main(folder: Path, seed: int, epochs: int | None = None) -> None:
    """Measure one seed."""
    config: Comparison = from_plain(Comparison, read_results(folder)["config"])
    config = replace(config, evaluate_every=epochs or config.epochs, epochs=epochs or config.epochs)
    torch.set_num_threads(config.threads or 1)
    data = load_images(config, seed)
    given = data.train_labels
    found = torch.zeros(len(given), len(data.class_names))
    prepare = Normalize.of(data.train_images, config.channels_last)
    began = time.perf_counter()
    folds = StratifiedKFold(5, shuffle=True, random_state=seed).split(given, given)
    for inner, outer in (map(torch.from_numpy, fold) for fold in folds):
        part = replace(
            data,
            train_images=data.train_images[inner],
            train_labels=given[inner],
            train_clean_labels=data.train_clean_labels[inner],
        )

        def predict(row, model, _, outer=outer):  # noqa: ANN001, ANN202
            if row["epoch"] == config.epochs:
                model.eval()
                with torch.no_grad():
                    images = prepare(data.train_images[outer]).split(500)
                    found[outer] = torch.cat([model(x).softmax(1) for x in images])

        with tempfile.TemporaryDirectory() as place:
            train_run(config, part, "none", seed, Path(place), observe=predict, checkpoints=False)
    seconds = time.perf_counter() - began
    wrong = (given != data.train_clean_labels).numpy()
    right = (found.argmax(1) == data.train_clean_labels).double().mean()
    for method in ("self_confidence", "normalized_margin"):
        suspicion = 1 - get_label_quality_scores(given.numpy(), found.numpy(), method=method)
        print(
            f"{folder.name} seed {seed}, {config.epochs} epochs, {method}: AUROC "
            f"{roc_auc_score(wrong, suspicion):.4f}, average precision "
            f"{average_precision_score(wrong, suspicion):.4f}; {seconds:.0f} s; held-out accuracy "
            f"{right:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *map(int, sys.argv[3:4]))
