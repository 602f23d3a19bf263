"""Weights of the combined rank, fitted on scikit-learn's digits.

    python results/audit-weights/fit.py > results/audit-weights/fit.log

Networks of one hidden layer learn the 1,797 digits with 20 or 40 % of the labels wrong, for 5, 20
or 100 epochs, at a constant learning rate or with warm-up and decay: from networks that have learnt
little to those that have learnt wrong labels by heart. Logistic regression says which labels are
wrong from the samples' ranks by each score; scores of negative weight are left out, and the others
fitted again.
"""

from itertools import product

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import nn

from gradmask.audit import SCORES, Dynamics
from gradmask.audit.scores import suspicion_share

EPOCHS, BATCH, SEEDS = (5, 20, 100), 32, 2


def train(
    seed: int, noise: float, epochs: int, warm: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Scores of every digit, and which labels are wrong."""
    data = load_digits()
    inputs = torch.tensor(data.data / 16, dtype=torch.float32)
    labels = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=generator) < noise
    offset = torch.randint(1, 10, labels.shape, generator=generator)
    given = torch.where(wrong, (labels + offset) % 10, labels)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps = epochs * -(-len(labels) // BATCH)
    if warm:
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    dynamics = Dynamics(len(labels))
    for _ in range(epochs):
        for ids in torch.randperm(len(labels), generator=generator).split(BATCH):
            logits = model(inputs[ids])
            dynamics.update(ids, logits, given[ids])
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, given[ids]).backward()
            optimizer.step()
            if warm:
                schedule.step()
    right = (model(inputs).argmax(1) == given).double().mean()
    kind = "warm-up and decay" if warm else "constant"
    print(
        f"seed {seed}, {noise:.0%} wrong, {epochs} epochs, {kind}: {right:.1%} learnt", flush=True
    )
    return dynamics.scores(), wrong


def main() -> None:
    """Fit and print the weights."""
    scored = [s for s in SCORES.values() if s.cost == "none" and s.high is not None]
    names = [score.name for score in scored if score.name != "last_loss"]
    ranks, targets = [], []
    kinds = list(product((False, True), EPOCHS, (0.2, 0.4)))
    for (warm, epochs, noise), seed in product(kinds, range(SEEDS)):
        scores, wrong = train(seed, noise, epochs, warm)
        columns = [suspicion_share(scores[n], bool(SCORES[n].high)).nan_to_num(0.5) for n in names]
        ranks.append(torch.stack(columns, 1))
        targets.append(wrong)

    def show(name: str, found: list[torch.Tensor]) -> None:
        aurocs = [roc_auc_score(t, column) for t, column in zip(targets, found, strict=True)]
        parts = [sum(aurocs[i : i + SEEDS]) / SEEDS for i in range(0, len(aurocs), SEEDS)]
        print(f"{name:20}", *(f"{part:8.3f}" for part in parts))

    titles = (f"{'warm ' if warm else ''}{epochs}/{noise:.0%}" for warm, epochs, noise in kinds)
    print(f"{'AUROC: epochs/wrong':20}", *(f"{title:>8}" for title in titles))
    for place, name in enumerate(names):
        show(name, [r[:, place] for r in ranks])
    kept = list(range(len(names)))
    while True:
        fit = LogisticRegression(C=1.0, max_iter=1000)
        fit.fit(torch.cat(ranks)[:, kept].numpy(), torch.cat(targets).numpy())
        weights = fit.coef_[0]
        if (weights >= 0).all():
            break
        kept = [k for k, weight in zip(kept, weights, strict=True) if weight > 0]
    total = weights.sum()
    print({names[k]: round(float(w / total), 2) for k, w in zip(kept, weights, strict=True)})
    show("combined", [r[:, kept] @ torch.tensor(weights) for r in ranks])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
