"""One frozen dataclass holds every option of a comparison."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import yaml

from gradmask.errors import OptionError, check_choice, check_keep
from gradmask.experiments.arms import MASKS, parse_arm
from gradmask.experiments.schema import check_types

# What may change between two visits to a folder: more arms and seeds are added to it.
EXTENDABLE = ("arms", "seeds")
# What may change as well, because no result depends on it.
NOT_RESULTS = (
    "output",
    "device",
    "threads",
    "workers",
    "engine",
    "checkpoint_every",
    "stop_after",
)


class Options(Protocol):
    """A dataclass of options."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class RunOptions(Options, Protocol):
    """A frozen dataclass of options, each with a default, that names its output folder."""

    @property
    def output(self) -> Path:
        """Folder for results."""


Kind = TypeVar("Kind", bound=RunOptions)


@dataclass(frozen=True)
class Comparison:
    """Options of `gradmask run`: the same network and seeds, with each kind of mask.

    Attributes:
        data: `digits` (embedded), a Hugging Face hub name, a parquet folder or an image folder.
        train_size: Take a seeded stratified part of the training images (default: all).
        classes: Take a seeded choice of the classes (default: all).
        image_size: Take the middle of each image, of this many pixels (needed when they differ in
            size, and with `streaming`).
        streaming: Decode images when they are needed, for data that do not fit into memory:
            random resized crops in training, the middle of each image to measure on.
        workers: Processes that decode with `streaming` (default: one a processor, at most 8).
        skip_damaged: Leave out images that cannot be decoded, found by decoding all of them once
            (default: the first one ends the run, by name).
        label_noise: Share of training labels replaced by a different class, drawn once per seed.
        labels: `given`, or `random`: every training label drawn from all classes, once per seed.
        validation: Share of the training images held out to choose an epoch.
        augment: Random crop with padding and horizontal flip on training batches.
        model: Model name: `mlp`, `small_cnn`, `cifar_vit`, `cifar_resnet18`, ..., or torchvision's.
        width: Base width of `mlp`, `small_cnn` and the `cifar_` models (default: theirs).
        stem_stride: Stride of the first convolution of the `cifar_resnet` models.
        arms: The kinds of mask to compare; `none` is training without a mask, `sam` with
            sharpness-aware minimisation. An arm may have options of its own: `fisher:keep=0.7`,
            `random:scope=update`, `none:labels=random`, `sam:rho=0.1`.
        keep: Share of the parameters that still learn, in (0, 1].
        scope: Mask the `gradient` (equation 10) or freeze the whole `update`.
        fisher_kind: Labels of the Fisher information: `empirical`, `sampled` or `exact`.
        fisher_samples: Training images in each Fisher pass (default: all).
        rho: Radius of the neighbourhood of `sam`.
        epochs: Passes over the training images.
        seeds: One run per arm and seed; a seed fixes data, noise, weights and order.
        batch_size: Images in a training batch.
        precision: Of training and evaluation: `float32`, or autocast to `bf16` or `fp16` (with
            loss scaling). The Fisher information is always measured in float32.
        channels_last: Memory layout that convolutions on GPUs prefer.
        compile: Compile the network with `torch.compile`.
        optimizer: `sgd` or `adamw`.
        lr: Learning rate, the peak of the schedule.
        momentum: Momentum of `sgd`.
        nesterov: Nesterov momentum for `sgd`.
        weight_decay: Weight decay.
        schedule: `onecycle`, `cosine`, `constant` or `step` (a tenth after each third of the
            epochs), stepped after each batch.
        monitor: Forms of influence to follow in training: `quadratic` (equation 4), `diagonal`
            (equation 9), `kl` (equation 3); default: none.
        monitor_fisher: Its Fisher information: `sampled` (cheap), `exact` or `empirical`.
        monitor_sources: Training images whose single steps are measured.
        monitor_probe: Other training images, on whose predictions they are measured.
        monitor_step: Size ε of these steps.
        monitor_every: Optimizer steps between measurements (default: those of an epoch).
        save_every: Keep the network's weights after every so many epochs, and after the last.
        checkpoint_every: Optimizer steps between checkpoints, from which an interrupted run goes
            on (default: those of an epoch).
        stop_after: Epochs to train in this visit, all runs together; the same command goes on
            (default: all).
        device: `auto`, `cpu`, `cuda`, ...
        engine: What several processes (`torchrun`) share: `ddp`, the batches; `fsdp`, parameters
            and optimizer state as well.
        threads: CPU threads (default: PyTorch's choice).
        output: Folder for results.
    """

    data: str = "digits"
    train_size: int | None = None
    classes: int | None = None
    image_size: int | None = None
    streaming: bool = False
    workers: int | None = None
    skip_damaged: bool = False
    label_noise: float = 0.0
    labels: Literal["given", "random"] = "given"
    validation: float = 0.1
    augment: bool = True
    model: str = "small_cnn"
    width: int | None = None
    stem_stride: int = 1
    arms: tuple[str, ...] = ("none", *MASKS)
    keep: float = 0.25
    scope: Literal["gradient", "update"] = "gradient"
    fisher_kind: Literal["empirical", "sampled", "exact"] = "empirical"
    fisher_samples: int | None = None
    rho: float = 0.05
    epochs: int = 30
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 128
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: Literal["onecycle", "cosine", "constant", "step"] = "onecycle"
    monitor: tuple[str, ...] = ()
    monitor_fisher: Literal["empirical", "sampled", "exact"] = "sampled"
    monitor_sources: int = 64
    monitor_probe: int = 256
    monitor_step: float = 0.01
    monitor_every: int | None = None
    save_every: int | None = None
    checkpoint_every: int | None = None
    stop_after: int | None = None
    device: str = "auto"
    engine: Literal["ddp", "fsdp"] = "ddp"
    threads: int | None = None
    output: Path = Path("runs/compare")

    def __post_init__(self) -> None:
        """Check every option before any work starts.

        Raises:
            OptionError: If an option's value cannot work.
        """
        check_keep(self.keep)
        check_choice("scope", self.scope, ("gradient", "update"))
        check_choice("labels", self.labels, ("given", "random"))
        check_choice("engine", self.engine, ("ddp", "fsdp"))
        check_choice("precision", self.precision, ("float32", "bf16", "fp16"))
        for name in ("epochs", "batch_size", "stem_stride", "monitor_sources", "monitor_probe"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)!r} must be at least 1.")
        optional = ("train_size", "classes", "image_size", "width", "fisher_samples", "threads")
        every = ("monitor_every", "save_every", "checkpoint_every", "stop_after")
        for name in (*optional, *every):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name}={value!r} must be at least 1, or left out.")
        for method in self.monitor:
            check_choice("monitor", method, ("quadratic", "diagonal", "kl"))
        if self.streaming and (self.image_size is None or self.data == "digits"):
            raise OptionError(
                "streaming needs an image_size, such as 224, and other data than digits."
            )
        if self.streaming and self.monitor:
            raise OptionError("The influence monitor needs images in memory: leave streaming out.")
        if self.workers is not None and not self.streaming:
            raise OptionError("workers is an option of streaming.")
        if self.workers is not None and self.workers < 0:
            raise OptionError(f"workers={self.workers} must be 0 or more.")
        if not 0.0 <= self.label_noise <= 1.0:
            raise OptionError(f"label_noise={self.label_noise!r} must be a share in [0, 1].")
        if self.label_noise and self.labels == "random":
            raise OptionError("label_noise has no meaning with labels='random': leave one out.")
        if not 0.0 < self.validation < 1.0:
            raise OptionError(f"validation={self.validation!r} must be a share in (0, 1).")
        for name in ("lr", "rho", "monitor_step"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise OptionError(f"{name}={getattr(self, name)!r} must be positive and finite.")
        if not 0.0 <= self.momentum < 1.0:
            raise OptionError(f"momentum={self.momentum!r} must be in [0, 1).")
        if not 0.0 <= self.weight_decay < math.inf:
            raise OptionError(
                f"weight_decay={self.weight_decay!r} must be finite and not negative; 0 is none."
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise OptionError(f"seeds={list(self.seeds)} must be one or more different integers.")
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise OptionError(f"arms={list(self.arms)} must be one or more different names.")
        found: dict[str, str] = {}
        for arm in self.arms:
            self.for_arm(arm)
            if (same := found.setdefault(parse_arm(arm).title, arm)) != arm:
                raise OptionError(f"Arms {same!r} and {arm!r} are the same: leave one out.")

    def for_arm(self, name: str) -> Comparison:
        """The options of one arm's runs.

        Args:
            name: The arm, one of `arms` or any other.

        Returns:
            These options with those that the arm changes.

        Raises:
            OptionError: If the arm is unknown, or one of its options cannot work.
        """
        arm = parse_arm(name)
        return replace(self, **arm.options, arms=(arm.strategy,)) if arm.options else self


def to_plain(config: Options) -> dict[str, Any]:
    """Options as values that YAML and JSON know, without that of a single visit, `stop_after`."""
    plain = {tuple: list, Path: str}
    return {
        name: next((turn(v) for kind, turn in plain.items() if isinstance(v, kind)), v)
        for name, v in asdict(config).items()
        if name != "stop_after"
    }


def from_plain(kind: type[Kind], options: dict[str, Any]) -> Kind:
    """Options as `to_plain` wrote them, perhaps by an earlier version that had fewer.

    Args:
        kind: The dataclass of the options.
        options: Plain values by name, from a file; those of unknown names are left out.

    Returns:
        The options.

    Raises:
        Wrong: If a value is of another type.
        OptionError: If one cannot work.
    """
    known = {field.name for field in fields(kind)}
    options = {name: value for name, value in options.items() if name in known}
    check_types(kind, options)
    turned: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    if "output" in turned:
        turned["output"] = Path(turned["output"])
    return kind(**turned)


def to_yaml(config: Options) -> str:
    """Options as the YAML that `gradmask run RECIPE --config` reads."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, default_flow_style=None)


assert {*EXTENDABLE, *NOT_RESULTS} <= {field.name for field in fields(Comparison)}
