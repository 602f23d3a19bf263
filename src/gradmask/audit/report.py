"""One page of a ranking: sorted, filtered, with images where there are some."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from markupsafe import Markup
from torch import Tensor

from gradmask.audit.export import columns
from gradmask.audit.scores import COMBINED, SCORES
from gradmask.errors import OptionError
from gradmask.study.files import write_atomically
from gradmask.study.report.rendering import templates

if TYPE_CHECKING:
    from gradmask.audit.rank import Ranking

SIDE = 96  # pixels of an image on the page
_SHOWN = ("suspicion", "area_under_margin", "wrong_share", "flagged")
_TITLES = {"suggestion_probability": "its probability", "area_under_margin": "margin"}


def write_page(ranking: Ranking, path: Path, images: Any, top: int, about: str = "") -> Path:
    """Write the page, which is one file and loads nothing.

    Args:
        ranking: The ranking.
        path: Where.
        images: As `Ranking.report` takes them; or None.
        top: Samples on the page, the most suspicious ones.
        about: What was trained, in a sentence.

    Returns:
        The path.
    """
    if not isinstance(top, Integral) or top < 1:
        raise OptionError(f"top={top!r} must be a whole number, at least 1.")
    audited = int((ranking.suspicion.isfinite() & ~ranking.planted).sum())
    first = ranking.order[: min(top, audited)]
    table = columns(ranking, first)
    known = ("sample", "key", "position", "label", "suggestion", "suggestion_probability")
    shown = [name for name in (*known, *_SHOWN) if name in table]
    shown += [name for name in ranking.scores if name not in SCORES or SCORES[name].cost != "none"]
    rows = [
        {"cells": [(_text(value), _order(value)) for value in cells], "flagged": flagged}
        for cells, flagged in zip(
            zip(*(table[name] for name in shown), strict=True), table["flagged"], strict=True
        )
    ]
    if images is not None:
        _check_images(images, table["sample"])
        for row, sample in zip(rows, table["sample"], strict=True):
            row["image"] = _encoded(images[sample])
    environment = templates("gradmask.audit")
    script = environment.get_template("ranking.js").render()
    page = environment.get_template("ranking.html.j2").render(
        about=about,
        ranking=ranking,
        audited=audited,
        rows=rows,
        names=[(name, _TITLES.get(name, name.replace("_", " "))) for name in shown],
        words={"key", "label", "suggestion"},
        formulas={name: SCORES[name].formula for name in shown if name in SCORES},
        weights=COMBINED,
        script=Markup(script),
        hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def _check_images(images: Any, samples: list[int]) -> None:
    if not hasattr(images, "__getitem__"):
        raise OptionError(f"images must have a sample by its number, images[i], not {images!r}.")
    if samples and hasattr(images, "__len__") and len(images) <= max(samples):
        raise OptionError(f"images has {len(images)} entries, and sample {max(samples)} is wanted.")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.3f}"
    return "" if value is None else str(value)


def _order(value: Any) -> str:
    """What a cell is sorted by."""
    return f"{float(value):.9g}" if isinstance(value, bool | int | float) else ""


def _encoded(sample: Any) -> str:
    """A small PNG of an image, or of the first image that a sample has."""
    from PIL import Image

    sample = _first_image(sample)
    if isinstance(sample, str | Path):
        try:
            sample = Image.open(sample)
            sample.load()
        except (OSError, ValueError) as error:
            raise OptionError(f"{str(sample)[:80]!r} is not an image that can be read.") from error
    if not isinstance(sample, Image.Image):
        sample = _picture(sample)
    # Small images keep their pixels; large ones are made smaller.
    size = sample.size
    scale = SIDE / max(size)
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BILINEAR
    sample = sample.convert("RGB").resize([max(1, round(side * scale)) for side in size], method)
    file = io.BytesIO()
    sample.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _first_image(sample: Any) -> Any:
    from PIL import Image

    entries = [sample]
    if isinstance(sample, Mapping | tuple | list):
        entries = list(sample.values() if isinstance(sample, Mapping) else sample)
    for entry in entries:
        if isinstance(entry, Image.Image | str | Path):
            return entry
        if isinstance(entry, Tensor) or hasattr(entry, "__array__"):
            values = torch.as_tensor(entry)
            if values.dim() in (2, 3) and values.numel():
                return values[None] if values.dim() == 2 else values
    shapes = [tuple(e.shape) if hasattr(e, "shape") else type(e).__name__ for e in entries]
    raise OptionError(
        f"A sample has no image, but {shapes}: give images of (channels, height, width), or leave "
        "out images=, and the page has none."
    )


def _picture(values: Tensor) -> Any:
    from PIL import Image

    if values.shape[0] not in (1, 3, 4) and values.shape[-1] in (1, 3, 4):
        values = values.movedim(-1, 0)
    if values.is_floating_point():  # perhaps normalised: spread over what can be shown
        low, high = values.min(), values.max()
        values = ((values - low) / (high - low).clamp_min(1e-12) * 255).round()
    elif values.dtype == torch.bool or values.max() <= 1:
        values = values.to(torch.int64) * 255
    elif values.max() > 255:  # of more bits than are shown
        values = (values.double() / values.max() * 255).round()
    if values.shape[0] == 2:
        values = values[:1]
    array = values.to(torch.uint8).cpu().movedim(0, -1).numpy()
    return Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array[:, :, :3])
