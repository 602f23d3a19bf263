"""The commands under `gradmask bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from gradmask.cli.options import read_options
from gradmask.cli.terminal import terminal
from gradmask.errors import OptionError


def add_bench(commands: Any) -> None:
    """Add `bench` to the commands of an argument parser."""
    bench = commands.add_parser("bench", help="measure speed, with other libraries beside it")
    kinds = bench.add_subparsers(dest="what", required=True, metavar="WHAT")
    for what, text in (
        ("fisher", "the Fisher diagonal, against a plain pass and other libraries"),
        ("layers", "the ways to a convolution's squares"),
        ("influence", "the influence of samples, against the gradients and passes it needs"),
        ("step", "a masked optimizer step"),
        ("threshold", "the exact threshold over all entries"),
    ):
        kind = kinds.add_parser(what, help=text)
        rounds = 3 if what == "influence" else 7
        kind.add_argument("--rounds", type=int, default=rounds, help="times everything is timed")
        kind.add_argument("--device", default="cpu")
        if what == "threshold":
            kind.add_argument("--entries", type=int, default=10**8)
            continue
        names = "resnet18, mlp, ..., a torchvision classifier, or package.module:function"
        kind.add_argument("--model", default="resnet18", help=names)
        kind.add_argument("--batch-size", type=int, help="samples in a batch")
        kind.add_argument("--shape", type=int, nargs="+", help="shape of one sample: 3 224 224")
        if what == "influence":
            for option, default, text in (
                ("--sources", 1000, "sources of the Gram matrix and the diagonal form"),
                ("--probe", 1000, "probe samples of the Gram matrix"),
                ("--step-sources", 20, "sources of the divergence and the exact quadratic form"),
                ("--step-probe", 200, "probe samples of these"),
                ("--memory", 1024, "MiB that gradients and activations may take, about"),
            ):
                kind.add_argument(option, type=int, default=default, help=text)
        if what == "fisher":
            kind.add_argument("--batches", type=int, default=8, help="batches in a pass")
            kind.add_argument("--no-peers", dest="peers", action="store_false")
    kinds.add_parser("refresh", help="how many samples a mask needs (options of `gradmask run`)")


def run_bench(parsed: argparse.Namespace) -> int:
    """Run a benchmark and print its table."""
    from gradmask.benchmarks.fisher import bench_fisher
    from gradmask.benchmarks.influence import bench_influence
    from gradmask.benchmarks.layers import bench_layers
    from gradmask.benchmarks.mask import bench_step, bench_threshold

    benches: dict[str, Callable[..., Any]] = {
        "fisher": bench_fisher,
        "layers": bench_layers,
        "influence": bench_influence,
        "step": bench_step,
        "threshold": bench_threshold,
    }
    options = {k: v for k, v in vars(parsed).items() if k not in ("command", "what", "model")}
    model = [parsed.model] if "model" in parsed else []
    terminal().print(benches[parsed.what](*model, **options))
    return 0


def bench_refresh(words: list[str]) -> int:
    """Run `bench refresh`, which takes the options of `gradmask run`."""
    from gradmask.benchmarks import refresh
    from gradmask.experiments.config import Comparison

    config = read_options(words)
    if not isinstance(config, Comparison):
        raise OptionError("bench refresh trains one network: give no recipe, or a comparison's.")
    if config.stop_after is not None:
        raise OptionError("bench refresh cannot go on later: leave --stop-after out.")
    refresh.bench_refresh(config)
    return 0
