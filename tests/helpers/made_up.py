"""Results of a study that never ran: numbers by formula, with what real ones may lack or hold."""

import math
import random


def made_up(
    arms=("none", "fisher:keep=0.25", "slow:keep=0.25", "random_matched:keep=0.25", "early"),
    seeds=4,
    epochs=8,
    sweep=(),
    start=0,
    every=1,
    **config,
):
    """Contents of `results.json`.

    Args:
        arms: Names of arms; `early` ends before the others.
        seeds: Number of seeds.
        epochs: Number of epochs.
        sweep: Learning rates.
        start: First epoch.
        every: The test set is evaluated in every such epoch, and the last one.
        config: Options of the study.
    """
    runs = []
    for place, arm in enumerate(arms):
        for lr in sweep or (None,):
            for seed in range(seeds):
                run = {"arm": arm, "seed": seed, "seconds": 2.0}
                run |= {"values": {"lr": lr}} if lr else {}
                draw = random.Random(f"{arm} {lr} {seed}")
                length = epochs - 2 - seed % 2 if arm == "early" else epochs
                quality = 1.0 - abs(math.log10(lr or 0.01) + 2) / 10
                rows = []
                for epoch in range(start, start + length):
                    learnt = quality * (1 - math.exp(-(epoch - start + 1) / 3))
                    accuracy = (0.6 + 0.03 * (place % 3)) * learnt + draw.gauss(0, 0.004)
                    row = {"epoch": epoch, "train_loss": 2 - 1.5 * learnt, "seconds": 0.2}
                    row["val_accuracy"] = accuracy + draw.gauss(0, 0.01)
                    if (epoch - start) % every == 0 or epoch == start + length - 1:
                        row["test_accuracy"] = accuracy
                        row["test_loss"] = 2 - learnt + draw.gauss(0, 0.02)
                    if arm.startswith("fisher"):
                        row["kept_per_parameter"] = [1.0, 0.25 * learnt]
                    rows.append(row)
                runs.append(run | {"epochs": rows})
    options = {"train": "mine:train", "arms": list(arms), "seeds": list(range(seeds))}
    options |= {"sweep": {"lr": list(sweep)}} if sweep else {}
    return {
        "version": 1,
        "runs": runs,
        "config": options | config,
        "environment": {"torch": "2.6"},
        "parameters": [["weight", 1000], ["bias", 10]],
    }
