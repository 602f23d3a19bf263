"""Weights of the combined rank, fitted on scikit-learn's digits.

    python results/audit-weights/fit.py > results/audit-weights/fit.log

Ten networks of one hidden layer learn the 1,797 digits with 20 or 40 % of the labels wrong.
Logistic regression says which labels are wrong from the samples' ranks by each score; scores of
negative weight are left out, and the others fitted again.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import nn

from gradmask.audit import SCORES, Dynamics
from gradmask.audit.scores import suspicion_share

EPOCHS, BATCH = 100, 32


def train(seed: int, noise: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
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
    dynamics = Dynamics(len(labels))
    for _ in range(EPOCHS):
        for ids in torch.randperm(len(labels), generator=generator).split(BATCH):
            logits = model(inputs[ids])
            dynamics.update(ids, logits, given[ids])
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, given[ids]).backward()
            optimizer.step()
    right = (model(inputs).argmax(1) == given).double().mean()
    print(f"seed {seed}, {noise:.0%} wrong: {right:.1%} of the given labels learnt")
    return dynamics.scores(), wrong


def main() -> None:
    """Fit and print the weights."""
    scored = [s for s in SCORES.values() if s.cost == "none" and s.high is not None]
    names = [score.name for score in scored if score.name != "last_loss"]
    ranks, targets = [], []
    for noise in (0.2, 0.4):
        for seed in range(5):
            scores, wrong = train(seed, noise)
            columns = [
                suspicion_share(scores[n], bool(SCORES[n].high)).nan_to_num(0.5) for n in names
            ]
            ranks.append(torch.stack(columns, 1))
            targets.append(wrong)
    for name, column in zip(names, zip(*[r.T for r in ranks], strict=True), strict=True):
        found = [roc_auc_score(t, c) for t, c in zip(targets, column, strict=True)]
        print(f"{name:20} AUROC {sum(found[:5]) / 5:.4f} (20 %) {sum(found[5:]) / 5:.4f} (40 %)")
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
    found = [
        roc_auc_score(t, r[:, kept] @ torch.tensor(weights))
        for r, t in zip(ranks, targets, strict=True)
    ]
    twenty, forty = sum(found[:5]) / 5, sum(found[5:]) / 5
    print(f"{'combined':20} AUROC {twenty:.4f} (20 %) {forty:.4f} (40 %)")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
