"""One frozen dataclass holds every option of a comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from gradmask.errors import OptionError, check_choice, check_keep
from gradmask.study.arms import MASKS, STRATEGIES, parse_arm
from gradmask.study.options import check_counts, check_different
from gradmask.study.schema import Wrong, check_types

# What the runs of one comparison may differ in: an arm's options, and values of a sweep. All see
# the same images.
VARIED = (
    *("labels", "augment", "flip", "crop", "class_weights", "batch_size", "optimizer", "lr"),
    *(
        "momentum",
        "nesterov",
        "weight_decay",
        "schedule",
        "keep",
        "scope",
        "fisher_kind",
        "fisher_samples",
        "rho",
    ),
)
# What arms change of their masks only.
_OF_MASKS = ("file", "patience", "score", "which", "per", "average")
_OWN_NAMES = {"kind": "fisher_kind", "max_samples": "fisher_samples"}  # as FisherMask has them


@dataclass(frozen=True)
class Comparison:
    """Options of `gradmask run`: the same network and seeds, with each kind of mask.

    Attributes:
        data: `digits` (embedded), a Hugging Face hub name, a parquet folder or an image folder.
        labels_csv: File with the columns `file` and `label`, and perhaps `split` (`train`, `val` or
            `test`): the labels of images that lie in the folder `data` in any order.
        train_size: Take a seeded stratified part of the training images (default: all).
        test_size: The same of the test images.
        classes: Take a seeded choice of the classes (default: all).
        image_size: Take the middle of each image, of this many pixels (needed when they differ in
            size, and with `streaming`).
        streaming: Decode images when they are needed, for data that do not fit into memory:
            random resized crops in training, the middle of each image to measure on.
        workers: Processes that decode with `streaming` (default: one a processor, at most 8).
        skip_damaged: Leave out images that cannot be decoded, found by decoding all of them once
            (default: the first one ends the run, by name).
        label_noise: Share of training labels replaced by a different class, drawn once per seed.
        noise: Which class: any other (`symmetric`), or the one whose mean image is nearest to that
            of the label's class (`asymmetric`).
        noisy_validation: Whether the validation labels are wrong to the same share, as they are
            where nobody has cleaned any: they then choose the epoch.
        plant: Share of the training labels made wrong on purpose, once per seed, after the noise:
            by them `gradmask audit` calibrates its threshold.
        labels: `given`, or `random`: every training label drawn from all classes, once per seed.
        validation: Share of the training images held out to choose an epoch (default: 0.1, or
            none where the data have validation images beside test images).
        augment: Change training images at random: `transform`, or else `crop` and `flip`.
        crop: Random crop with padding; with `streaming` a random resized crop.
        flip: Mirror half of the images left to right (never `digits`).
        transform: Function of your own in place of both, `module:function`: called with each
            training image, a uint8 tensor (channels, height, width), and returns another.
        class_weights: `balanced`: the training loss of an image is weighted by images ÷ (classes ·
            images of its class).
        model: Model name: `mlp`, `small_cnn`, `cifar_vit`, `cifar_resnet18`, ..., or torchvision's;
            or a function of your own, `module:function`, called with those of `classes`,
            `channels` and `image_size` that it takes.
        weights: File of weights to start from, of `torch.save` or safetensors; a last layer of
            another number of classes starts at random.
        width: Base width of `mlp`, `small_cnn` and the `cifar_` models (default: theirs).
        stem_stride: Stride of the first convolution of the `cifar_resnet` models.
        arms: The kinds of mask to compare, and what they are to be better than: `none` is training
            without a mask, `slow` that at `keep` times the learning rate, `slow_matched` that at
            each tensor's share of it, `early` that stopped by validation, `sam` sharpness-aware
            minimisation, `fixed:file=...` a mask from a file. An arm may have options of its own:
            `fisher:keep=0.7`, `random:scope=update`, `none:labels=random`, `sam:rho=0.1`.
        keep: Share of the parameters that still learn, in (0, 1].
        scope: Mask the `gradient` (equation 10) or freeze the whole `update`.
        fisher_kind: Labels of the Fisher information: `empirical`, `sampled` or `exact`.
        fisher_samples: Training images in each Fisher pass; null for all.
        rho: Radius of the neighbourhood of `sam`.
        epochs: Passes over the training images.
        evaluate_every: Epochs from one evaluation to the next; the last epoch has one in any case.
        seeds: One run per arm and seed; a seed fixes data, noise, weights and order.
        sweep: Values that every arm is run with, by the name of an option: `lr=0.01,0.03,0.1`.
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
        jobs: Runs at a time, each in a process of its own with a share of the cores and a GPU.
        threads: CPU threads of each (default: PyTorch's choice; with jobs an equal share).
        scheduler: Address of a dask scheduler whose workers train, in place of processes here.
        output: Folder for results.
    """

    EXTENDABLE: ClassVar = ("arms", "seeds", "sweep")
    NOT_RESULTS: ClassVar = (
        "output",
        "device",
        "threads",
        "workers",
        "engine",
        "checkpoint_every",
        "stop_after",
        "jobs",
        "scheduler",
    )

    data: str = "digits"
    labels_csv: str | None = None
    train_size: int | None = None
    test_size: int | None = None
    classes: int | None = None
    image_size: int | None = None
    streaming: bool = False
    workers: int | None = None
    skip_damaged: bool = False
    label_noise: float = 0.0
    noise: Literal["symmetric", "asymmetric"] = "symmetric"
    noisy_validation: bool = False
    plant: float = 0.0
    labels: Literal["given", "random"] = "given"
    validation: float | None = None
    augment: bool = True
    crop: bool = True
    flip: bool = True
    transform: str | None = None
    class_weights: Literal["none", "balanced"] = "none"
    model: str = "small_cnn"
    weights: str | None = None
    width: int | None = None
    stem_stride: int = 1
    arms: tuple[str, ...] = ("none", *MASKS, "slow", "early")
    keep: float = 0.25
    scope: Literal["gradient", "update"] = "gradient"
    fisher_kind: Literal["empirical", "sampled", "exact"] = "empirical"
    fisher_samples: int | None = 4000
    rho: float = 0.05
    epochs: int = 30
    evaluate_every: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)
    sweep: dict[str, Any] = field(default_factory=dict)
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
    jobs: int = 1
    threads: int | None = None
    scheduler: str | None = None
    output: Path = Path("runs/compare")

    def __post_init__(self) -> None:
        """Check every option before any work starts.

        Raises:
            OptionError: If an option's value cannot work.
        """
        check_keep(self.keep)
        check_choice("scope", self.scope, ("gradient", "update"))
        check_choice("labels", self.labels, ("given", "random"))
        check_choice("noise", self.noise, ("symmetric", "asymmetric"))
        check_choice("class_weights", self.class_weights, ("none", "balanced"))
        check_choice("engine", self.engine, ("ddp", "fsdp"))
        check_choice("precision", self.precision, ("float32", "bf16", "fp16"))
        whole = ("epochs", "evaluate_every", "batch_size", "stem_stride", "jobs")
        check_counts(self, *whole, "monitor_sources", "monitor_probe")
        optional = ("train_size", "test_size", "classes", "image_size", "width", "fisher_samples")
        every = ("threads", "monitor_every", "save_every", "checkpoint_every", "stop_after")
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
        if self.noise == "asymmetric" and self.streaming:
            raise OptionError("noise='asymmetric' needs images in memory: leave streaming out.")
        if not 0.0 <= self.plant < 0.5:
            raise OptionError(f"plant={self.plant!r} must be a share below one half.")
        if self.label_noise and self.labels == "random":
            raise OptionError("label_noise has no meaning with labels='random': leave one out.")
        if self.transform is not None and not (self.augment and self.crop and self.flip):
            raise OptionError(
                "transform is used in place of crop and flip, and augment=False leaves all out: "
                "leave transform out, or these."
            )
        if self.labels_csv is not None and self.data == "digits":
            raise OptionError("labels_csv needs data, the folder that its files lie in.")
        if self.validation is not None and not 0.0 < self.validation < 1.0:
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
        if self.stop_after is not None and (self.jobs > 1 or self.scheduler is not None):
            raise OptionError("stop_after counts the epochs of one process: leave it or jobs out.")
        check_different("seeds", self.seeds)
        check_different("arms", self.arms)
        for name, values in self.sweep.items():
            check_choice("option to sweep over,", name, VARIED)
            check_different(f"sweep {name}", values)
            for value in values:
                self._changed(f"sweep {name}", {name: value})
        found: dict[str, str] = {}
        for arm in self.arms:
            if both := parse_arm(arm).options.keys() & self.sweep.keys():
                raise OptionError(f"Arm {arm!r} and the sweep both set {min(both)}: leave one out.")
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
        if arm.strategy not in STRATEGIES:
            raise OptionError(f"Arm {name!r} is a function: compare it with `gradmask study`.")
        own = {_OWN_NAMES.get(k, k): v for k, v in arm.options.items()}
        changes = {k: v for k, v in own.items() if k not in _OF_MASKS}
        return self._changed(f"arm {name!r}", changes, arms=(arm.strategy,)) if changes else self

    def _changed(self, where: str, changes: dict[str, Any], **others: Any) -> Comparison:
        hints = get_type_hints(Comparison)
        for name, value in changes.items():
            check_choice(f"option of {where},", name, VARIED)
            if get_origin(hints[name]) is Literal:
                check_choice(name, str(value), get_args(hints[name]))
        try:
            check_types(Comparison, changes)
        except Wrong as error:
            raise OptionError(f"{where[0].upper()}{where[1:]}: {error}.") from error
        return replace(self, **changes, **others, sweep={})


def training_of(options: Any) -> Comparison:
    """How a network that other recipes begin with is trained: without a mask.

    Args:
        options: Those of the recipe; what a comparison calls by the same names is taken from them.
    """
    names = {f.name for f in fields(Comparison)} & vars(options).keys()
    shared = {name: getattr(options, name) for name in names - {"arms", "seeds", "jobs", "output"}}
    return Comparison(**shared, arms=("none",), evaluate_every=shared["epochs"])
