"""How figures of audits, checks of the theorem and benchmarks look, and their files."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "none",
}


def to_svg(name: str, figure: Figure) -> str:
    """SVG source of a figure, the same for the same figure; the name keeps its ids apart."""
    text = io.StringIO()
    # The salt keeps ids of figures on one page apart, and the same figure the same file.
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    used = set(re.findall(r"#([\w-]+)", svg))  # other ids would be double on one page
    return re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)


def to_png(figure: Figure) -> bytes:
    """PNG of a figure at a size for a page or a slide."""
    data = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(data, format="png", dpi=150, bbox_inches="tight")
    return data.getvalue()
