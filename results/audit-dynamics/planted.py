"""Do promised false alarms hold? Planted labels, or a planted class, among generated documents.

    python results/audit-dynamics/planted.py > results/audit-dynamics/planted.log

Documents, noise and network of text.py; 5 % of the documents are planted.
"""

from statistics import mean

import torch
from text import CLASSES, EPOCHS, SAMPLES, documents, noisy, train

from gradmask.audit import Dynamics, plant, rank

PROMISED = (0.05, 0.1, 0.2)
SEEDS = 5


def main() -> None:
    """Run five seeds of each way to plant and each kind of noise."""
    for noise in ("symmetric", "asymmetric"):
        for kind in ("label", "class"):
            found: dict[float, list[tuple[float, float]]] = {rate: [] for rate in PROMISED}
            for seed in range(SEEDS):
                words, true = documents(seed)
                given = noisy(true, 0.2, noise, seed)
                wrong = given != true
                planted = plant(given, CLASSES, kind=kind, seed=seed)
                dynamics = Dynamics(SAMPLES)
                train(words, planted.labels, seed, EPOCHS, dynamics, CLASSES + (kind == "class"))
                for rate in PROMISED:
                    table = rank(dynamics, planted.labels, planted=planted, false_alarms=rate)
                    flagged = table.flagged
                    alarms = float((~wrong[flagged]).double().mean()) if flagged.any() else 0.0
                    found[rate].append((alarms, float(flagged[wrong].double().mean())))
            for rate, pairs in found.items():
                alarms, recall = zip(*pairs, strict=True)
                print(
                    f"{noise} noise, planted {kind}: {rate:.0%} promised, {mean(alarms):.1%} came "
                    f"(at most {max(alarms):.1%}), {mean(recall):.0%} of the wrong labels found",
                    flush=True,
                )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
