"""Figures of an audit: how well scores find wrong labels, and the images ranked first."""

from __future__ import annotations

import io
import textwrap

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradmask.recipes.audit.detection import MEAN, MEAN_RANK, Detection, ranking
from gradmask.recipes.audit.run import Audited
from gradmask.recipes.audit.scores import AUDIT_SCORES
from gradmask.recipes.data.sources import in_memory
from gradmask.recipes.plots import STYLE

# Okabe and Ito's palette: told apart with any colour vision.
_BASELINE, _INFLUENCE = "#3b3b3b", "#0072b2"
_WRONG = "#d55e00"
_LINES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
# Those drawn over the epochs: one of each kind.
_DRAWN = ("loss", "norm", "others", "same", "per_norm", "same_per_norm")
_COLUMNS = 10


def draw_detection(detection: Detection) -> Figure:
    """AUROC of each score as chosen, with one dot for each seed, and over the epochs.

    Args:
        detection: What was found.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(10, 1.4 + 0.3 * len(AUDIT_SCORES)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1))
    for row, form in enumerate(AUDIT_SCORES):
        values = list(detection.aurocs[form.name].values())
        colour = _BASELINE if form.baseline else _INFLUENCE
        left.plot(values, [row] * len(values), "o", color=colour, alpha=0.4, markersize=4)
        left.plot(np.mean(values), row, "D", color=colour, markersize=6)
    left.set_yticks(range(len(AUDIT_SCORES)), [form.title for form in AUDIT_SCORES])
    left.set_ylim(len(AUDIT_SCORES) - 0.5, -0.5)
    left.axvline(0.5, color="#777777", linewidth=1)
    left.set_title("AUROC, epochs and order as chosen")
    _over_epochs(right, detection)
    return figure


def _over_epochs(axes: Axes, detection: Detection) -> None:
    for name, colour in zip(_DRAWN, _LINES, strict=True):
        form = next(form for form in AUDIT_SCORES if form.name == name)
        found = [detection.all_aurocs[seed][name] for seed in detection.seeds]
        rules = [rule for rule in found[0] if rule not in (MEAN, MEAN_RANK)]
        epochs = [int(rule.split()[1]) for rule in rules]
        mean = np.mean([[auroc[rule] for rule in rules] for auroc in found], axis=0)
        axes.plot(epochs, mean, "o-", color=colour, label=form.title, markersize=3.5)
    axes.axhline(0.5, color="#777777", linewidth=1)
    axes.set_xlabel("epoch")
    axes.set_title("AUROC of HIGH values at single epochs")
    axes.legend(fontsize=8)


def contact_sheet(audited: Audited, seed: int) -> bytes:
    """The images that rank first, with given label, true label if known, and score, as PNG.

    Args:
        audited: What the audit found.
        seed: Which run.

    Returns:
        The PNG file's contents.
    """
    run, choice = audited.runs[seed], audited.choice
    values = run.scores[choice.form][choice.rule]
    first = ranking(choice.of(run.scores))[: audited.options.top].tolist()
    lines = -(-len(first) // _COLUMNS)
    known = audited.detection is not None
    names = [textwrap.shorten(name, 14, placeholder="…") for name in run.data.class_names]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_COLUMNS * 0.95, lines * (1.45 if known else 1.32)), dpi=80)
        figure.subplots_adjust(0.005, 0.005, 0.995, 1 - 0.44 / (lines * 1.4), 0.06, 0.62)
        for place, index in enumerate(first, start=1):
            axes = figure.add_subplot(lines, _COLUMNS, place)
            image = in_memory(run.data.train_images)[index].permute(1, 2, 0).numpy()
            axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray")
            axes.set_axis_off()
            given, clean = (
                labels[index].item()
                for labels in (run.data.train_labels, run.data.train_clean_labels)
            )
            caption = [names[int(given)], *([f"({names[int(clean)]})"] if known else [])]
            caption.append(f"{values[index]:.3g}")
            wrong = known and given != clean
            axes.set_title(
                "\n".join(caption),
                fontsize=7,
                fontweight="normal",
                loc="center",
                pad=2,
                color=_WRONG if wrong else "black",
                parse_math=False,
            )
        contents = io.BytesIO()
        figure.savefig(contents, format="png", metadata={"Software": None})
    return contents.getvalue()
