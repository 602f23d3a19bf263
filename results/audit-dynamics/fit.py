"""Weights of the combined rank, fitted on scikit-learn's digits.

    python results/audit-dynamics/fit.py > results/audit-dynamics/fit.log

Networks of one hidden layer learn the 1,797 digits with 20 or 40 % of the labels wrong, for 5, 20
or 100 epochs, at a constant learning rate or with warm-up and decay, in small or large batches:
from networks that have learnt little to those that have learnt wrong labels by heart. Ten times the
score is added whose ranks raise the mean of log(AUROC / (1 - AUROC)) over all of them most
(ensemble selection: Caruana et al., 2004); a score's weight is how often it was.
"""

from itertools import product

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn

from gradmask.audit import SCORES, Dynamics
from gradmask.audit.scores import suspicion_share

EPOCHS, SEEDS, PICKS = (5, 20, 100), 2, 10
SIZES = ((32, 256), (128, 32))  # samples in a batch, hidden units


def train(
    seed: int, noise: float, epochs: int, warm: bool, batch: int, width: int
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
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps = epochs * -(-len(labels) // batch)
    if warm:
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    dynamics = Dynamics(len(labels))
    for _ in range(epochs):
        for ids in torch.randperm(len(labels), generator=generator).split(batch):
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
    kinds = list(product(SIZES, (False, True), EPOCHS, (0.2, 0.4)))
    for (size, warm, epochs, noise), seed in product(kinds, range(SEEDS)):
        scores, wrong = train(seed, noise, epochs, warm, *size)
        columns = [suspicion_share(scores[n], bool(SCORES[n].high)).nan_to_num(0.5) for n in names]
        ranks.append(torch.stack(columns, 1))
        targets.append(wrong)

    def show(name: str, found: list[torch.Tensor]) -> None:
        aurocs = [roc_auc_score(t, column) for t, column in zip(targets, found, strict=True)]
        parts = [sum(aurocs[i : i + SEEDS]) / SEEDS for i in range(0, len(aurocs), SEEDS)]
        print(f"{name:20}", *(f"{part:8.3f}" for part in parts))

    print(f"{'AUROC':20}", *(f"{n:8}" for n in range(len(kinds))))
    for number, (size, warm, epochs, noise) in enumerate(kinds):
        kind = "warm-up and decay" if warm else "constant"
        print(f"{number}: batches of {size[0]}, {kind}, {epochs} epochs, {noise:.0%} wrong")
    for place, name in enumerate(names):
        show(name, [r[:, place] for r in ranks])
    picked = [0] * len(names)
    for _ in range(PICKS):
        tried = [[n + (k == place) for k, n in enumerate(picked)] for place in range(len(names))]
        picked = max(tried, key=lambda weights: quality(ranks, targets, weights))
    print({name: n / PICKS for name, n in zip(names, picked, strict=True) if n})
    show("combined", [r @ torch.tensor(picked).double() for r in ranks])


def quality(ranks: list[torch.Tensor], targets: list[torch.Tensor], weights: list[int]) -> float:
    """Mean log-odds of the AUROC of the weighted mean of ranks."""
    mixed = (r @ torch.tensor(weights).double() for r in ranks)
    found = torch.tensor([roc_auc_score(t, m) for t, m in zip(targets, mixed, strict=True)])
    return float(found.clamp(max=1 - 1e-6).logit().mean())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
