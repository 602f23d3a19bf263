"""Influence over a training run, measured on a fixed random part of the training data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, Protocol, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gradmask.containers import part, sample_count, tensors_in
from gradmask.errors import DataError, OptionError, StateError, check_choice
from gradmask.fisher.adapter import Unpack as UnpackBatch
from gradmask.fisher.adapter import as_batch, check_batches, check_unpack
from gradmask.fisher.likelihood import Loss
from gradmask.fisher.sampling import random_samples
from gradmask.fisher.scored import has_names
from gradmask.fisher.verify import Verify
from gradmask.influence import gradient_norms, influence
from gradmask.influence.measure import METHODS
from gradmask.loaders import undisturbed
from gradmask.seeding import own_random_state, seeded_generator

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Record = dict[str, float]


class Writer(Protocol):
    """What takes the numbers: TensorBoard's `SummaryWriter`, or anything with its method."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Log one number."""


class InfluenceOptions(TypedDict, total=False):
    """Options of `influence` that a monitor passes on."""

    step: float
    fisher: str
    loss: Loss
    memory: int
    verify: Verify


class InfluenceMonitor:
    """Follows how far one sample's step moves the predictions on others (equation 4) in training.

    Some training samples are sources, others the probe set, drawn once. A measurement gives the
    mean and quantiles over the sources of their influence on the probe set, the mean
    ½ ε² E_x[g_iᵀ F(x) g_i] over it, as `gradmask.influence` does, in nats. Those of ½ ε² ‖g_i‖²
    stand beside them: influence falls when gradients do, whatever their direction.

    Cost of a measurement: as much as training on `sources + probe` samples, about, with
    `fisher="sampled"` or `"empirical"`; the other forms are in the table of `docs/influence.md`.
    It does not grow with the data set. The time is in each record.

    Args:
        model: The model in training; it is left as it was.
        data: A DataLoader or another iterable of batches (see `fisher_diagonal`), or one of them.
            Read once, other than a plain DataLoader up to four times what is wanted; its generators
            and all random states stay. Augmentation, if it does any, is frozen as it is read.
        every: Calls of `step` from one measurement to the next.
        sources: Samples whose gradient steps are measured.
        probe: Other samples, on which they are measured.
        methods: Forms to measure: `quadratic`, `diagonal`, `kl`.
        seed: Seed of the choice of samples and of sampled labels.
        unpack: From a batch of another form to `(inputs, targets)`.
        writer: Where the numbers are logged, for example TensorBoard's `SummaryWriter`.
        options: `step`, `loss`, `memory` and `verify` of `gradmask.influence`, and `fisher`, which
            is `"sampled"` here unless given: unbiased for the mean over the probe set, and cheap.

    Attributes:
        history: The records so far: `step` (calls of `step` when it was measured),
            `influence/<method>/mean` and `influence/<method>/q05` to `q95`, the same of
            `influence/squared_norm`, and `seconds`.

    Raises:
        OptionError: If an option cannot work.
        DataError: If there are fewer than `sources + probe` samples, or of different shapes.
        ModelError: If the model cannot be measured.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        *,
        every: int = 1,
        sources: int = 64,
        probe: int = 256,
        methods: tuple[str, ...] = ("quadratic",),
        seed: int = 0,
        unpack: UnpackBatch | None = None,
        writer: Writer | None = None,
        **options: Unpack[InfluenceOptions],
    ) -> None:
        for name, value in {"every": every, "sources": sources, "probe": probe}.items():
            if not isinstance(value, Integral) or value < 1:
                raise OptionError(f"{name}={value!r} must be a whole number, at least 1.")
        for name in options:
            check_choice("monitor option", name, InfluenceOptions.__annotations__)
        if writer is not None and not hasattr(writer, "add_scalar"):
            raise OptionError(
                f"writer={type(writer).__name__} has no method add_scalar(tag, value, step): give "
                "TensorBoard's SummaryWriter, or none and log what `step` returns."
            )
        if not methods or isinstance(methods, str):
            raise OptionError(f"methods={methods!r} must be a tuple of {', '.join(METHODS)}.")
        for method in methods:
            check_choice("method", method, METHODS)
        check_unpack(unpack)
        self.model, self.every, self.methods, self.seed = model, every, methods, seed
        self.writer = writer
        self._options: dict[str, Any] = {"fisher": "sampled", "step": 1e-3, **options}
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=sorted(devices, key=str)):  # a loader may draw a seed
            self._sources, self._probe = _two_parts(data, sources, probe, seed, unpack)
        self.calls = 0
        self.history: list[Record] = []
        # What cannot be measured is told before training: a label, an option, the model.
        for samples in (self._sources, self._probe):
            self._norms(samples)
        self._values(1)

    def step(self) -> Record | None:
        """Count one step (or epoch) of the training loop, and measure if it is time.

        Returns:
            The record of a measurement, or None.
        """
        self.calls += 1
        return self.measure() if self.calls % self.every == 0 else None

    def measure(self) -> Record:
        """Measure now, for example before the first step.

        Returns:
            The record, which is logged and added to `history` as well.
        """
        started = time.perf_counter()
        record: Record = {"step": self.calls}
        for method, values in self._values(None).items():
            record[f"influence/{method}/mean"] = values.mean().item()
            found = values.quantile(
                torch.tensor(QUANTILES, dtype=values.dtype, device=values.device)
            ).tolist()
            for share, value in zip(QUANTILES, found, strict=True):
                record[f"influence/{method}/q{100 * share:02.0f}"] = value
        record["seconds"] = time.perf_counter() - started
        self.history.append(record)
        if self.writer is not None:
            for name, value in record.items():
                if name.startswith("influence/"):
                    self.writer.add_scalar(name, value, self.calls)
        return record

    def state_dict(self) -> dict[str, Any]:
        """Calls and history, as plain numbers; the samples follow from data and seed."""
        return {"calls": self.calls, "history": [dict(record) for record in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another monitor was.

        Args:
            state: What `state_dict` returned.

        Raises:
            StateError: If it is something else.
        """
        if not isinstance(state, Mapping) or set(state) != {"calls", "history"}:
            found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise StateError(f"This is no state of an InfluenceMonitor: it is {found}.")
        self.calls = int(state["calls"])
        self.history = [dict(record) for record in state["history"]]

    def _values(self, count: int | None) -> dict[str, Tensor]:
        """Influence of the sources by method, and ½ ε² ‖g_i‖²; `count` limits both parts."""
        some = slice(count)
        sources = part(self._sources, some)
        whole = part(self._probe, some)
        found = {}
        for method in self.methods:
            options = self._options | {"method": method, "seed": self.seed}
            if method == "kl":
                options["fisher"] = "exact"  # it has none, and `influence` knows it by this
            labelled = options["fisher"] == "empirical"
            probe = whole if labelled or has_names(whole) else whole[0]
            found[method] = influence(self.model, sources, probe, **options)
        found["squared_norm"] = 0.5 * self._options["step"] ** 2 * self._norms(sources).square()
        return {name: values.double().cpu() for name, values in found.items()}

    def _norms(self, samples: Any) -> Tensor:
        options = {k: v for k, v in self._options.items() if k in ("loss", "memory", "verify")}
        return gradient_norms(self.model, samples, **options)


def _two_parts(
    data: Any, sources: int, probe: int, seed: int, unpack: UnpackBatch | None
) -> tuple[Any, Any]:
    """Two random parts of the data without a common sample, each in the form of a batch."""
    check_batches(data)
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor):
        data = [tuple(data)]
    elif has_names(data):
        data = [data]
    wanted = sources + probe
    batches = []
    with own_random_state(seed, "monitor"), undisturbed(data) as read:
        for batch in random_samples(read, wanted, seed):
            batch = as_batch(unpack(batch) if unpack else batch)
            batches.append((batch, sample_count(batch)))
    found = sum(count for _, count in batches)
    if found < wanted:
        raise DataError(
            f"sources={sources} and probe={probe} need {wanted} samples, but the data have "
            f"{found}: lower one of them."
        )
    shapes = {tuple(t.shape[1:] for t in tensors_in(b)) for b, _ in batches}
    if len(shapes) > 1:
        raise DataError(
            "The samples have different shapes from batch to batch: give one pair (inputs, "
            "targets) padded to the same shape."
        )
    order = torch.randperm(wanted, generator=seeded_generator(seed, "monitor"), device="cpu")
    parts = [batch for batch, _ in batches]
    joined = tree_map(lambda *ts: torch.cat(ts)[order.to(ts[0].device)], *parts)
    return part(joined, slice(sources)), part(joined, slice(sources, wanted))
