"""The runs of the recipe `finetune`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmask import SCORES, FisherMask, fisher_diagonal
from gradmask.extras import require
from gradmask.recipes.finetune.config import LOWEST, UNMASKED, FineTuning
from gradmask.recipes.finetune.tasks import (
    Tasks,
    accuracies,
    load_tasks,
    pretrained,
    set_head,
    start,
)
from gradmask.recipes.identity import tensors_sum
from gradmask.recipes.networks import remembered, shared_folder, train_on
from gradmask.seeding import seeded_generator
from gradmask.study import Trial, compare
from gradmask.study.arms import Arm
from gradmask.study.controls import new_mask
from gradmask.study.files import read_tensors
from gradmask.study.options import from_plain, to_plain
from gradmask.study.progress import Progress
from gradmask.study.results import Results


def unmasked(trial: Trial, model: nn.Module, optimizer: Optimizer, **_: Any) -> None:
    """An arm without a mask that trains otherwise than `none` does."""


def lowest(trial: Trial, model: nn.Module, optimizer: Optimizer, **options: Any) -> FisherMask:
    """A mask of the least Fisher information."""
    arm = Arm(trial.arm.name, "fisher", {**trial.arm.options, "which": "lowest"})
    return new_mask(arm, model, seed=trial.seed, **options).attach(optimizer)


OWN = {**dict.fromkeys(UNMASKED, unmasked), **dict.fromkeys(LOWEST, lowest)}


def run_finetuning(config: FineTuning, progress: Progress) -> Results:
    """Compare ways to fine-tune on new classes, over learning rates.

    Args:
        config: Options.
        progress: Shows how far the work is.

    Returns:
        The contents of `results.json`. Of every run `old` and `new` accuracies of validation and
        test images, and the share of the old accuracy that is left (`test_kept`).
    """
    options = {k: v for k, v in to_plain(config).items() if k not in FineTuning.NOT_RESULTS}
    # What cannot work is told before the folder is made.
    if any(arm.partition(":")[0] == "lora" for arm in config.arms):
        require("peft", "Arm 'lora'")
    tasks = load_tasks(config, config.seeds[0])
    network = None if config.pretrained is None else _sum_of(config.pretrained, config, tasks)
    return compare(
        train,
        {arm: OWN.get(arm.partition(":")[0]) for arm in config.arms},
        config.seeds,
        config.output,
        progress=progress,
        options={"config": options, "pretrained_sum": network},
        sweep={"lr": list(config.rates)},
        choose="val_new_accuracy",
        judge=("test_new_accuracy@last", "test_kept@last"),
        metrics={"test_kept": "higher", "val_kept": "higher"},
        front=("test_kept", "test_new_accuracy"),
        jobs=config.jobs,
        threads=config.threads,
    )


def train(trial: Trial) -> None:
    """Fine-tune on the new classes, and measure what is left of the old ones.

    Batch normalisation stays as it was pretrained. Plain SGD with momentum and a cosine schedule,
    without weight decay.

    Args:
        trial: The run.
    """
    config: FineTuning = from_plain(FineTuning, trial.options["config"])
    tasks, strategy = load_tasks(config, trial.seed), trial.arm.strategy
    folder, lr = shared_folder(trial), trial.options["lr"]
    expected = trial.options["pretrained_sum"]
    network = pretrained(config, tasks, folder / "pretrained.pt", expected)
    begun = remembered(folder / f"start-seed{trial.seed}.json", lambda: start(network, tasks))
    set_head(network, begun)
    model: nn.Module = network
    if strategy == "frozen":  # the first half of the body
        weights = list(network.body.parameters())
        for parameter in weights[: len(weights) // 2]:
            parameter.requires_grad_(False)
    elif strategy == "lora":
        model = with_lora(model, trial.options["rank"])
    penalty = penalty_of(trial, model, tasks)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr, momentum=0.9)
    mask = trial.mask(model, optimizer, loss=tasks.loss, max_samples=None)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return tasks.loss(outputs, labels) / len(labels) + penalty()

    def before_pass(number: int) -> None:
        if number == 0 or strategy == "lowest_each_epoch":
            refresh(mask, strategy, tasks)

    updates = 0 if strategy == "probe" else config.updates
    generator = seeded_generator(trial.seed, "fine-tuning")
    train_on(model, tasks.train, loss, optimizer, updates, generator, before_pass)
    before, after = begun["before"], accuracies(model, tasks)
    kept = {
        f"{part}_kept": after[f"{part}_old_accuracy"] / max(before[f"{part}_old_accuracy"], 1e-9)
        for part in ("val", "test")
    }
    trial.report(epoch=config.updates, **after, **kept)


def _sum_of(path: Path, config: FineTuning, tasks: Tasks) -> str:
    """The sum of weights that are given, by which a study knows them again."""
    pretrained(config, tasks, path)  # which checks that they fit
    return tensors_sum(read_tensors(path))


def refresh(mask: FisherMask, strategy: str, tasks: Tasks) -> None:
    """Measure a mask on the data it is for."""
    if strategy == "old_lowest":
        mask.refresh(protect=tasks.kept)
    elif SCORES[mask.score].compares:
        mask.refresh(tasks.train, protect=tasks.kept)
    else:
        mask.refresh(tasks.train)


def penalty_of(trial: Trial, model: nn.Module, tasks: Tasks) -> Callable[[], Tensor | float]:
    """½ λ Σ_j a_j (θ_j - θ⁰_j)²: a is 1 (L2-SP), or the old Fisher diagonal / its mean (EWC).

    Li et al., 2018 (L2-SP); Kirkpatrick et al., 2017 (elastic weight consolidation).

    Args:
        trial: The run, whose arm may have a `penalty`, λ.
        model: The network before fine-tuning.
        tasks: The images.

    Returns:
        A function that gives the penalty, or 0.
    """
    if trial.arm.strategy not in ("l2sp", "ewc"):
        return lambda: 0.0
    strength = float(trial.options["penalty"])
    weights: Mapping[str, Tensor] | None = None
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    if trial.arm.strategy == "ewc":
        found = fisher_diagonal(model, tasks.kept, loss=tasks.loss)
        mean = sum(f.sum() for f in found.values()) / sum(f.numel() for f in found.values())
        weights = {name: f / mean for name, f in found.items()}

    def penalty() -> Tensor:
        moved = {n: p - start[n] for n, p in model.named_parameters() if n in start}
        parts = [(d.square() * (1.0 if weights is None else weights[n])) for n, d in moved.items()]
        return 0.5 * strength * torch.stack([part.sum() for part in parts]).sum()

    return penalty


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """Low-rank adapters (Hu et al., 2022) on all convolutions and linear layers of the body.

    Args:
        model: The network; its new head learns in full.
        rank: Rank of each.
    """
    from peft import LoraConfig, get_peft_model

    layers = (nn.Conv2d, nn.Linear)
    body = model.get_submodule("body")
    targets = [f"body.{name}" for name, m in body.named_modules() if isinstance(m, layers)]
    adapted: nn.Module = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    )
    for name, parameter in adapted.named_parameters():
        if ".new." in name:
            parameter.requires_grad_(True)
    return adapted.eval()
