"""The commands under `gradmask bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from gradmask.cli.options import read_options
from gradmask.cli.parser import count, count_or_none
from gradmask.cli.terminal import terminal
from gradmask.errors import OptionError
from gradmask.interrupts import work_begins


def add_bench(commands: Any) -> None:
    """Add `bench` to the commands of an argument parser."""
    bench = commands.add_parser("bench", help="measure speed, with other libraries beside it")
    kinds = bench.add_subparsers(dest="what", required=True, metavar="WHAT")
    for what, text in (
        ("fisher", "the Fisher diagonal, against a plain pass and other libraries"),
        ("layers", "the ways to a convolution's squares"),
        ("influence", "the influence of samples, against the gradients and passes it needs"),
        ("online", "training steps that collect the Fisher diagonal, against plain ones"),
        ("step", "a masked optimizer step"),
        ("threshold", "the exact threshold over all entries"),
    ):
        kind = kinds.add_parser(what, help=text)
        rounds = 3 if what == "influence" else 7
        kind.add_argument("--rounds", type=count, default=rounds, help="times everything is timed")
        kind.add_argument("--device", default="cpu")
        if what == "threshold":
            kind.add_argument("--entries", type=count, default=10**8)
            continue
        names = (
            "resnet18, gpt2, ..., a torchvision classifier, transformers:NAME, or module:function"
        )
        kind.add_argument("--model", default="resnet18", help=names)
        kind.add_argument("--batch-size", type=count, help="samples in a batch")
        kind.add_argument("--shape", type=count, nargs="+", help="shape of one sample: 3 224 224")
        if what == "influence":
            for option, default, text in (
                ("--sources", 1000, "sources of the Gram matrix and the diagonal form"),
                ("--probe", 1000, "probe samples of the Gram matrix"),
                ("--step-sources", 20, "sources of the divergence and the exact quadratic form"),
                ("--step-probe", 200, "probe samples of these"),
                ("--memory", 1024, "MiB that gradients and activations may take, about"),
            ):
                kind.add_argument(option, type=count, default=default, help=text)
        if what == "fisher":
            kind.add_argument("--batches", type=count, help="batches in a pass")
            kind.add_argument("--precision", choices=("float32", "bf16", "fp16"), default="float32")
            kind.add_argument("--no-peers", dest="peers", action="store_false")
    _add_training(kinds)
    kinds.add_parser("refresh", help="how many samples a mask needs (options of `gradmask run`)")


def _add_training(kinds: Any) -> None:
    """Benchmarks of the training loop of `gradmask run`."""
    for what, text in (
        ("loop", "the training loop, against one written by hand"),
        ("processes", "training by two processes, against one"),
    ):
        kind = kinds.add_parser(what, help=text)
        kind.add_argument("--model", default="cifar_resnet18", help="a model of `gradmask run`")
        kind.add_argument("--width", type=count, help="its width")
        kind.add_argument("--batch-size", type=count, default=128, help="images in a batch")
        steps = 8 if what == "loop" else 4
        kind.add_argument("--steps", type=count, default=steps, help="batches in an epoch")
        rounds = 7 if what == "loop" else 3
        kind.add_argument("--rounds", type=count, default=rounds, help="times everything is timed")
        if what == "loop":
            kind.add_argument("--device", default="cpu")
            kind.add_argument("--no-variants", dest="variants", action="store_false")
    dynamics = kinds.add_parser(
        "dynamics", help="steps that follow each sample, against plain ones"
    )
    dynamics.add_argument("--model", default="cifar_resnet10", help="a model of `gradmask run`")
    for option, default, text in (
        ("--width", 16, "its width"),
        ("--stem-stride", 2, "stride of its first convolution"),
        ("--batch-size", 128, "images in a batch"),
        ("--samples", 1_200_000, "training samples that are followed"),
        ("--rounds", 15, "times everything is timed"),
    ):
        dynamics.add_argument(option, type=count, default=default, help=text)
    dynamics.add_argument("--device", default="cpu")
    workers = kinds.add_parser("workers", help="runs an hour by several workers, against one")
    for option, default, text in (
        ("--jobs", 2, "workers"),
        ("--runs", 8, "runs of the study"),
        ("--seconds", 10, "about how long a run takes"),
        ("--rounds", 3, "studies of each kind"),
    ):
        workers.add_argument(option, type=count, default=default, help=text)
    loading = kinds.add_parser("loading", help="decoding JPEGs, against torchvision's pipeline")
    loading.add_argument("--images", type=count, default=512, help="JPEGs to make")
    loading.add_argument("--image-size", type=count, default=224, help="size of the crops")
    loading.add_argument("--batch-size", type=count, default=64, help="images in a batch")
    loading.add_argument("--workers", type=count_or_none, nargs="+", default=(0, 1, 2))
    loading.add_argument("--rounds", type=count, default=5, help="times everything is timed")


def run_bench(parsed: argparse.Namespace) -> int:
    """Run a benchmark and print its table."""
    from gradmask.benchmarks.dynamics import bench_dynamics
    from gradmask.benchmarks.fisher import bench_fisher
    from gradmask.benchmarks.influence import bench_influence
    from gradmask.benchmarks.layers import bench_layers
    from gradmask.benchmarks.loading import bench_loading
    from gradmask.benchmarks.loop import bench_loop, bench_processes
    from gradmask.benchmarks.mask import bench_step, bench_threshold
    from gradmask.benchmarks.online import bench_online
    from gradmask.benchmarks.workers import bench_workers
    from gradmask.recipes.training.components import resolve_device

    benches: dict[str, Callable[..., Any]] = {
        "fisher": bench_fisher,
        "layers": bench_layers,
        "influence": bench_influence,
        "online": bench_online,
        "step": bench_step,
        "threshold": bench_threshold,
        "dynamics": bench_dynamics,
        "loop": bench_loop,
        "processes": bench_processes,
        "loading": bench_loading,
        "workers": bench_workers,
    }
    if "device" in parsed:
        parsed.device = str(resolve_device(parsed.device))
    others = ("command", "debug", "what", "model")
    options = {k: v for k, v in vars(parsed).items() if k not in others}
    work_begins()
    model = [parsed.model] if "model" in parsed else []
    terminal().print(benches[parsed.what](*model, **options))
    return 0


def bench_refresh(words: list[str]) -> int:
    """Run `bench refresh`, which takes the options of `gradmask run`."""
    from gradmask.benchmarks import refresh
    from gradmask.recipes.config import Comparison

    config = read_options(words)
    if not isinstance(config, Comparison):
        raise OptionError("bench refresh trains one network: give no recipe, or a comparison's.")
    if config.stop_after is not None:
        raise OptionError("bench refresh cannot go on later: leave --stop-after out.")
    work_begins()
    refresh.bench_refresh(config)
    return 0
