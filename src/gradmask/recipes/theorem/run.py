"""Theorem 1 measured: the exact divergence of one sample's step against the quadratic form."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from gradmask.errors import DataError
from gradmask.recipes.data.batches import Batches
from gradmask.recipes.data.images import ImageData, load_images
from gradmask.recipes.data.sources import in_memory
from gradmask.recipes.identity import check_data, data_sum
from gradmask.recipes.results import check_theorem
from gradmask.recipes.theorem.config import TheoremCheck
from gradmask.recipes.theorem.numbers import measure, smooth_twin
from gradmask.recipes.training.components import new_model, resolve_device
from gradmask.recipes.training.run import Row, train_run
from gradmask.seeding import seeded_generator
from gradmask.study.budget import EpochBudget
from gradmask.study.environment import environment
from gradmask.study.files import write_json
from gradmask.study.folder import open_folder, remove_checkpoints, run_directory
from gradmask.study.options import to_plain
from gradmask.study.results import Results
from gradmask.study.runs import begin_folder
from gradmask.study.spec import Spec
from gradmask.study.trial import Diverged

FILE = "theorem1.json"


def run_theorem(config: TheoremCheck, console: Console) -> Results:
    """Measure every model with every seed, before and after training, and write the results.

    Training is in float32 and measuring in float64. The output folder then holds `config.yaml` and
    `theorem1.json`; `write_theorem` adds tables, findings and a figure. Runs that `theorem1.json`
    already holds are not done again, and training that has a checkpoint goes on from it, so an
    interrupted run goes on. A run that diverges is recorded as such, and the others go on.

    Args:
        config: The options.
        console: Where to say how far the work is.

    Returns:
        The contents of `theorem1.json`.

    Raises:
        GradmaskError: If an option, the data, a model or the folder cannot be used; all of these
            are checked before training starts.
        EpochsSpent: If `stop_after` epochs were trained and there is more to do.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.deterministic = True
    with ExitStack() as stack:
        config, results = open_folder(config, stack, FILE, check_theorem)
        return _run_missing(config, results, console)


def _run_missing(config: TheoremCheck, results: Results, console: Console) -> Results:
    device, budget = resolve_device(config.device), EpochBudget(config.stop_after)
    described = {"sum": _check(config)}
    check_data(results.get("data", described)["sum"], described["sum"], config.output / FILE)
    begin_folder(config)
    results["config"] = to_plain(config)
    if "data" in results or not results["runs"]:  # an earlier version wrote no sum
        results["data"] = described
    done = {(run["model"], run["seed"]) for run in results["runs"]}
    every = [(model, seed) for seed in config.seeds for model in config.models]
    missing = [pair for pair in every if pair not in done]
    if missing:  # a visit that measures nothing does not change what was measured with
        results["environment"] = environment(device.type)
    if done:
        console.print(f"{len(done)} finished runs found; {len(missing)} to go.")
    for number, (model, seed) in enumerate(missing, start=1):
        directory = run_directory(config.output, Spec(model, seed))
        try:
            run = _run(config, model, seed, device, directory, budget)
        except Diverged as diverged:  # the others go on
            known = {name: diverged.run[name] for name in ("seed", "seconds", "diverged")}
            run = {"model": model, **known}
        results["runs"].append(run)
        results["runs"].sort(key=lambda r: (config.models.index(r["model"]), r["seed"]))
        write_json(config.output / FILE, results)
        remove_checkpoints(directory)
        told = f"[{number}/{len(missing)}] {model}, seed {seed}: {run['seconds']:.1f} s"
        if "diverged" in run:
            told += f", diverged in epoch {run['diverged']['epoch']}"
        console.print(told, highlight=False, markup=False)
    write_json(config.output / FILE, results)
    return results


def _check(config: TheoremCheck) -> str:
    """Load the data and build every model once, so that what cannot work fails early.

    Returns:
        The sum of the data.
    """
    for name in config.models:
        training = config.training(name)
        data = load_images(training, config.seeds[0])
        new_model(training, data, config.seeds[0])
    for option, available in (("sources", data.train_labels), ("probe", data.test_labels)):
        if getattr(config, option) > len(available):
            raise DataError(
                f"{option}={getattr(config, option)} is more than the {len(available)} images."
            )
    return data_sum(data)


def _run(
    config: TheoremCheck,
    name: str,
    seed: int,
    device: torch.device,
    directory: Path,
    budget: EpochBudget,
) -> Row:
    """Train one network, and measure it as it was built and as it was trained."""
    started = time.perf_counter()
    training = config.training(name)
    data = load_images(training, seed)
    last: list[tuple[nn.Module, Batches]] = []
    trained = train_run(
        training,
        data,
        "none",
        seed,
        directory,
        observe=lambda _, *rest: last.append(rest),
        budget=budget,
    )
    final = trained["epochs"][-1]
    if not math.isfinite(final["test_loss"]):  # since its last step
        known = {"epoch": final["epoch"], "reason": f"test_loss is {final['test_loss']}"}
        raise Diverged(f"{name}, seed {seed}: {known['reason']}", trained | {"diverged": known})
    model, batches = last[-1]
    sources, probe = _samples(config, data, seed, batches, device)
    rates = {"lr": config.lr, "lr_over_batch": config.lr / config.batch_size}
    states = {"initial": new_model(training, data, seed).to(device), "trained": model}
    measurements = []
    for state, network in states.items():
        network = network.double().eval()
        for activation, twin in (("own", network), ("smooth", smooth_twin(network))):
            if twin is not None:
                found = measure(twin, sources, probe, config.step_sizes(), rates)
                measurements.append({"state": state, "activation": activation, **found})
    return {
        "model": name,
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "train_loss": final["train_loss"],
        "test_accuracy": final["test_accuracy"],
        "measurements": measurements,
    }


def _samples(
    config: TheoremCheck, data: ImageData, seed: int, batches: Batches, device: torch.device
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Sources from the training images and a probe set from the test images, in float64."""

    def draw(images: Tensor, labels: Tensor, size: int, purpose: str) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(labels), generator=seeded_generator(seed, purpose))[:size]
        return batches.prepare(images[order].to(device)).double(), labels[order].to(device)

    return (
        draw(in_memory(data.train_images), data.train_labels, config.sources, "sources"),
        draw(in_memory(data.test_images), data.test_labels, config.probe, "probe"),
    )
