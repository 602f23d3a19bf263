"""`gradmask bench`: one command for each benchmark."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from gradmask.cli.options import SEVERAL, command, parameter
from gradmask.cli.run import recipes_app
from gradmask.cli.terminal import terminal
from gradmask.cli.values import read_items, read_whole
from gradmask.errors import OptionError
from gradmask.extras import require
from gradmask.interrupts import work_begins
from gradmask.recipes.catalogue import Options

_LISTS = {"shape": 1, "workers": 0}  # of numbers from these on
_HELP = {
    "model": "resnet18, gpt2, ..., a torchvision classifier, transformers:NAME, or "
    "module:function; of loop, processes and dynamics a model of gradmask run.",
    "width": "Width of the model.",
    "stem_stride": "Stride of its first convolution.",
    "rounds": "Times everything is timed.",
    "device": "auto, cpu, cuda, ...",
    "batch_size": "Samples in a batch.",
    "shape": "Shape of one sample: 3 224 224.",
    "batches": "Batches in a pass.",
    "steps": "Batches in an epoch.",
    "precision": "Of all passes.",
    "peers": "Measure other libraries as well.",
    "variants": "Measure what else the loop can do as well.",
    "entries": "How many.",
    "sources": "Sources of the Gram matrix and the diagonal form.",
    "probe": "Probe samples of the Gram matrix.",
    "step_sources": "Sources of the divergence and the exact quadratic form.",
    "step_probe": "Probe samples of these.",
    "memory": "MiB that gradients and activations may take, about.",
    "samples": "Training samples that are followed.",
    "jobs": "Workers.",
    "runs": "Runs of the study.",
    "seconds": "About how long a run takes.",
    "images": "JPEGs to make.",
    "image_size": "Size of the crops.",
    "workers": "Numbers of processes that decode.",
}
_WORKLOAD = {"rounds": 7, "device": "cpu", "model": "resnet18", "batch_size": None, "shape": None}
_LOOP = {"model": "cifar_resnet18", "width": None, "batch_size": 128}
# Function in `gradmask.benchmarks`, what it measures, and its options with their defaults.
_BENCHES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fisher": (
        "fisher.bench_fisher",
        "The Fisher diagonal, against a plain pass and other libraries.",
        {**_WORKLOAD, "batches": None, "precision": "float32", "peers": True},
    ),
    "layers": ("layers.bench_layers", "The ways to a convolution's squares.", _WORKLOAD),
    "influence": (
        "influence.bench_influence",
        "The influence of samples, against the gradients and passes it needs.",
        _WORKLOAD
        | {"rounds": 3, "sources": 1000, "probe": 1000}
        | {"step_sources": 20, "step_probe": 200, "memory": 1024},
    ),
    "online": (
        "online.bench_online",
        "Training steps that collect the Fisher diagonal, against plain ones.",
        _WORKLOAD,
    ),
    "step": ("mask.bench_step", "A masked optimizer step.", _WORKLOAD),
    "threshold": (
        "mask.bench_threshold",
        "The exact threshold over all entries.",
        {"rounds": 7, "device": "cpu", "entries": 10**8},
    ),
    "loop": (
        "loop.bench_loop",
        "The training loop of gradmask run, against one written by hand.",
        {**_LOOP, "steps": 8, "rounds": 7, "device": "cpu", "variants": True},
    ),
    "processes": (
        "loop.bench_processes",
        "Training by two processes, against one.",
        {**_LOOP, "steps": 4, "rounds": 3},
    ),
    "dynamics": (
        "dynamics.bench_dynamics",
        "Steps that follow each sample, against plain ones.",
        {"model": "cifar_resnet10", "width": 16, "stem_stride": 2, "batch_size": 128}
        | {"samples": 1_200_000, "rounds": 15, "device": "cpu"},
    ),
    "workers": (
        "workers.bench_workers",
        "Runs an hour by several workers, against one.",
        {"jobs": 2, "runs": 8, "seconds": 10, "rounds": 3},
    ),
    "loading": (
        "loading.bench_loading",
        "Decoding JPEGs, against torchvision's pipeline.",
        {"images": 512, "image_size": 224, "batch_size": 64, "workers": (0, 1, 2), "rounds": 5},
    ),
}


def _annotation(name: str, default: Any) -> Any:
    """An option's type and help: a list, a text, a switch, or a number of things."""
    kind: Any = type(default)
    about: Any = {"help": _HELP[name], "allow_repeating": True}
    if name in _LISTS:
        reader = partial(read_items, int, least=_LISTS[name])
        return Annotated[tuple[int, ...] | None, Parameter(converter=reader, **about, **SEVERAL)]
    if name == "precision":
        return Annotated[Literal["float32", "bf16", "fp16"], Parameter(**about)]
    if kind in (bool, str):
        return Annotated[kind, Parameter(**about)]
    return Annotated[int | None, Parameter(converter=partial(read_whole, least=1), **about)]


def _measure(place: str, defaults: dict[str, Any], **given: Any) -> int:
    require("experiments", "gradmask bench")
    from gradmask.recipes.training.components import resolve_device

    module, _, function = place.partition(".")
    options = defaults | given
    if "device" in options:
        options["device"] = str(resolve_device(options["device"]))
    model = [options.pop("model")] if "model" in options else []
    measure = getattr(import_module(f"gradmask.benchmarks.{module}"), function)
    work_begins()
    terminal().print(measure(*model, **options))
    return 0


def _refresh(config: Options) -> int:
    require("experiments", "gradmask bench")
    from gradmask.benchmarks import refresh
    from gradmask.recipes.config import Comparison

    if not isinstance(config, Comparison):
        raise OptionError("bench refresh trains one network: give no recipe, or a comparison's.")
    if config.stop_after is not None:
        raise OptionError("bench refresh cannot go on later: leave --stop-after out.")
    work_begins()
    refresh.bench_refresh(config)
    return 0


def _nothing() -> None:
    raise OptionError("Say WHAT to measure: see gradmask bench --help.")


bench = App(
    name="bench",
    help="Measure speed, with other libraries beside it.",
    default_command=_nothing,
    help_epilogue="Examples:\n  gradmask bench step --model resnet18\n"
    "  gradmask bench fisher --model gpt2 --device cuda --no-peers",
)
for name, (place, text, defaults) in _BENCHES.items():
    options = [parameter(k, _annotation(k, v), v) for k, v in defaults.items()]
    example = f"Example:\n  gradmask bench {name} --rounds 3"
    function = command(partial(_measure, place, defaults), options, text)
    bench.command(function, name=name, help_epilogue=example)
bench.command(recipes_app("bench refresh", _refresh, "How many samples a mask needs."))
