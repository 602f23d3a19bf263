"""`gradmask bench influence`: each form against the least that any way to it needs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch
from rich.table import Table
from torch import Tensor

import gradmask
from gradmask.benchmarks import forms
from gradmask.benchmarks.memory import peak_megabytes
from gradmask.benchmarks.timing import interleave, ratio
from gradmask.benchmarks.workloads import make

STEP = 1e-3
PLAIN = "plain forward + backward"


def bench_influence(
    name: str,
    *,
    sources: int = 1000,
    probe: int = 1000,
    step_sources: int = 20,
    step_probe: int = 200,
    memory: int = 1024,
    batch_size: int | None = None,
    rounds: int = 3,
    device: str = "cpu",
    shape: Sequence[int] | None = None,
) -> Table:
    """Time the influence in all its forms, and what each is compared with.

    The diagonal form runs with one probe sample: what a probe set adds is a Fisher diagonal
    (`gradmask bench fisher`).

    Args:
        name: A workload (see `gradmask.benchmarks.workloads.find_workload`).
        sources: Sources of the Gram matrix and of the diagonal form.
        probe: Probe samples of the Gram matrix.
        step_sources: Sources of the divergence and of the exact quadratic form.
        step_probe: Probe samples of these two.
        memory: MiB that gradients and activations may take in the timed calls.
        batch_size: Samples in the calls whose memory is measured, half of them sources (default:
            256, and 32 where the work is one of all pairs).
        rounds: Times everything is timed.
        device: Device to measure on.
        shape: Shape of one sample (default: the workload's own).

    Returns:
        Table: seconds (median), multiples of the work that it is compared with and of a plain
        forward and backward of the same samples (medians of the rounds' ratios), peak memory above
        the start at two values of `memory`, and, for sampled labels, how far the values are from
        the exact ones.
    """
    few, many = max(step_sources, step_probe), max(sources, probe)
    model, inputs, targets = make(name, 2 * max(few, many), device, shape)
    half = len(inputs) // 2
    givers, takers = (inputs[:half], targets[:half]), (inputs[half:], targets[half:])

    def call(n: int, data: object, method: str, fisher: str) -> Tensor:
        own = tuple(t[:n] for t in givers)
        options = {"method": method, "fisher": fisher, "step": STEP, "memory": memory << 20}
        return gradmask.influence(model, own, data, **options)  # type: ignore[arg-type]

    own = tuple(t[:sources] for t in givers)
    labelled = tuple(t[:probe] for t in takers)
    both = tuple(torch.cat(pair) for pair in zip(own, labelled, strict=True))
    unlabelled = takers[0][:step_probe]
    gradients = forms.gradients_of(model, *(t[:step_sources] for t in givers))
    baselines: dict[str, tuple[str, forms.Task]] = {
        "Gram matrix": ("per-sample gradients", forms.per_sample_gradients(model, *both)),
        "diagonal": (PLAIN, forms.plain(model, *own)),
        "quadratic": (
            "Jacobian-vector products",
            forms.jacobian_products(model, gradients, unlabelled),
        ),
        "kl": (
            "perturbed forward passes",
            forms.perturbed_passes(model, gradients, unlabelled, STEP),
        ),
    }
    data: dict[str, tuple[int, object]] = {
        "Gram matrix": (sources, labelled),
        "diagonal": (sources, tuple(t[:1] for t in takers)),
        "quadratic": (step_sources, unlabelled),
        "kl": (step_sources, unlabelled),
    }
    values: dict[str, Tensor] = {}

    def keep(form: str) -> None:
        values[form] = call(*data[form], *forms.FORMS[form])

    def sampled() -> None:
        values["sampled"] = call(step_sources, unlabelled, "quadratic", "sampled")

    tasks: dict[str, forms.Task] = {form: lambda form=form: keep(form) for form in baselines}  # type: ignore[misc]
    tasks |= {f"least, {form}": task for form, (_, task) in baselines.items()}
    tasks |= {"sampled": sampled, PLAIN: forms.plain(model, *both)}
    for method, fisher in forms.FORMS.values():  # loads what is loaded at first use
        two = tuple(t[:2] for t in takers)
        call(2, two if fisher == "empirical" else two[0], method, fisher)
    seconds = interleave(tasks, rounds, device, warm=False)

    size = f"{device}, {torch.get_num_threads()} threads, memory {memory} MiB"
    table = Table(title=f"{name}, {size}, torch {torch.__version__}")
    for title in ("", "size", "seconds", "÷", "of", *(f"MB at {m}" for m in forms.MEBIBYTES)):
        table.add_column(title, justify="left" if title in ("", "of") else "right")
    for form, (least, _) in baselines.items():
        n, probes = data[form][0], probe if form == "Gram matrix" else step_probe
        samples = batch_size or (32 if form in ("quadratic", "kl") else 256)
        peaks = [
            peak_megabytes(name, f"{form}, {m}", samples, device, shape) for m in forms.MEBIBYTES
        ]
        table.add_row(
            form,
            f"{n}" if form == "diagonal" else f"{n} x {probes}",
            f"{median(seconds[form]):.2f}",
            f"{ratio(seconds, form, f'least, {form}'):.2f}",
            least,
            *(f"{peak:.0f}" for peak in peaks),
        )
    table.add_row("", "", "", f"{ratio(seconds, 'Gram matrix', PLAIN):.2f}", PLAIN)
    faster = ratio(seconds, "sampled", "quadratic")
    table.add_row(
        "quadratic, sampled",
        f"{step_sources} x {step_probe}",
        f"{median(seconds['sampled']):.2f}",
        f"{faster:.2f}",
        f"quadratic; {difference(values['sampled'], values['quadratic'])}",
    )
    return table


def difference(found: Tensor, expected: Tensor) -> str:
    """How far values of the sources are from the exact ones, in words.

    Args:
        found: One value for each source.
        expected: The exact ones.

    Returns:
        The median of the relative errors and the correlation of the ranks.
    """
    error = float(((found - expected).abs() / expected).median())
    ranks = torch.stack([values.argsort().argsort().double() for values in (found, expected)])
    return f"error {100 * error:.0f} %, rank correlation {float(torch.corrcoef(ranks)[0, 1]):.2f}"
