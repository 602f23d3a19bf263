"""Wrong labels among generated documents: dynamics, the last epoch's loss, confident learning.

    python results/audit-dynamics/text.py > results/audit-dynamics/text.log

5,000 documents of 20 classes and 40 words out of 2,000: 30 % of the words are drawn from the 60 of
their class (a third of which belong to a second class as well), the others from all by Zipf's law.
A network of word embeddings, their mean and one hidden layer learns them until it knows nearly all
given labels by heart. Confident learning has probabilities from five-fold cross-validation with
the same network, trained for a fifth of the epochs.
"""

import time
from statistics import mean, stdev

import torch
from cleanlab.rank import get_label_quality_scores
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from gradmask.audit import Dynamics, rank

CLASSES, WORDS, LENGTH, SAMPLES = 20, 2000, 40, 5000
EPOCHS, BATCH = 40, 64


def documents(seed: int) -> tuple[Tensor, Tensor]:
    """Words (samples, length) and true classes."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randperm(WORDS, generator=generator)[: CLASSES * 40].reshape(CLASSES, 40)
    topic = torch.cat([own, own.roll(1, 0)[:, :20]], 1)  # shared with the class before
    labels = torch.arange(SAMPLES) % CLASSES
    common = torch.multinomial(
        1 / torch.arange(1, WORDS + 1), SAMPLES * LENGTH, replacement=True, generator=generator
    ).reshape(SAMPLES, LENGTH)
    place = torch.randint(60, (SAMPLES, LENGTH), generator=generator)
    specific = topic[labels].gather(1, place)
    chosen = torch.rand(SAMPLES, LENGTH, generator=generator) < 0.3
    return torch.where(chosen, specific, common), labels


def noisy(labels: Tensor, share: float, kind: str, seed: int) -> Tensor:
    """Given labels: another class at random, or the next one, which shares words."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(SAMPLES, generator=generator) < share
    offset = torch.randint(1, CLASSES, labels.shape, generator=generator)
    offset = offset if kind == "symmetric" else torch.ones_like(offset)
    return torch.where(wrong, (labels + offset) % CLASSES, labels)


def train(
    words: Tensor,
    given: Tensor,
    seed: int,
    epochs: int,
    dynamics: Dynamics | None,
    classes: int = CLASSES,
) -> nn.Module:
    """Train a network; note what it says of each document."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.EmbeddingBag(WORDS, 64), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, classes)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for ids in torch.randperm(len(words)).split(BATCH):
            logits = model(words[ids])
            if dynamics is not None:
                dynamics.update(ids, logits, given[ids])
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, given[ids]).backward()
            optimizer.step()
    return model


def confident(words: Tensor, given: Tensor, seed: int) -> Tensor:
    """1 - cleanlab's label quality, from probabilities that were predicted out of sample."""
    found = torch.zeros(SAMPLES, CLASSES)
    for inner, outer in StratifiedKFold(5, shuffle=True, random_state=seed).split(words, given):
        model = train(words[inner], given[inner], seed, EPOCHS // 5, None)
        with torch.no_grad():
            found[outer] = model(words[outer]).softmax(1)
    return 1 - torch.tensor(get_label_quality_scores(given.numpy(), found.numpy()))


def main() -> None:
    """Run five seeds of each kind of noise."""
    for kind, share in (("symmetric", 0.2), ("symmetric", 0.4), ("asymmetric", 0.2)):
        found: dict[str, list[tuple[float, float]]] = {}
        seconds: dict[str, list[float]] = {"training": [], "cross-validation": []}
        for seed in range(5):
            words, true = documents(seed)
            given = noisy(true, share, kind, seed)
            wrong = given != true
            dynamics, began = Dynamics(SAMPLES), time.perf_counter()
            model = train(words, given, seed, EPOCHS, dynamics)
            seconds["training"].append(time.perf_counter() - began)
            with torch.no_grad():
                learnt = (model(words).argmax(1) == given).double().mean()
            table, began = rank(dynamics, given), time.perf_counter()
            values = {"combined rank": table.suspicion}
            for name, sign in (
                ("area_under_margin", -1), ("cumulative_loss", 1), ("last_loss", 1)
            ):  # fmt: skip
                values[name] = sign * table.scores[name]
            values["confident learning"] = confident(words, given, seed)
            seconds["cross-validation"].append(time.perf_counter() - began)
            right = table.suggestions[wrong] == true[wrong]
            known = f"{learnt:.1%} learnt, suggestions right {right.double().mean():.1%}"
            print(f"{kind} {share} seed {seed}: {known}")
            for name, value in values.items():
                pair = roc_auc_score(wrong, value), average_precision_score(wrong, value)
                found.setdefault(name, []).append(pair)
        for name, pairs in found.items():
            auroc, precision = zip(*pairs, strict=True)
            print(
                f"{kind} {share:.0%}  {name:20} AUROC {mean(auroc):.3f} ± {stdev(auroc):.3f}  "
                f"average precision {mean(precision):.3f} ± {stdev(precision):.3f}"
            )
        print({name: f"{mean(values):.1f} s" for name, values in seconds.items()}, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
