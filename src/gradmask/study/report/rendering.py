"""Figures as SVG and PNG files, and in a page that draws them itself."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import vl_convert
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gradmask.study.files import to_json
from gradmask.study.report.parts import Figure, Look, Page, Spec

_SCALE = 2  # pixels of a PNG for each of the SVG


def render(page: Page) -> str:
    """A page as one file of HTML, which loads nothing and runs no script but its own.

    Args:
        page: The page.

    Returns:
        Its source.
    """
    figures = [figure for section in page.sections for figure in section.figures]
    data = {
        "figures": {figure.name: _together(figure) for figure in figures},
        "themes": {name: theme(page.looks, dark=name == "dark") for name in ("light", "dark")},
        "files": page.files,
    }
    template = templates().get_template("report.html.j2")
    script = templates().get_template("report.js").render()
    return template.render(
        page=page,
        looks={look.arm: (place, look) for place, look in enumerate(page.looks)},
        # A text between < and > would end the script that holds it.
        data=Markup(to_json(data).replace("<", "\\u003c")),
        scripts=[Markup(source) for source in (_library(), script)],
        hashes=" ".join(f"'sha256-{_sum(source)}'" for source in (_library(), script)),
    )


def to_files(figure: Figure, looks: Sequence[Look]) -> dict[str, str | bytes]:
    """The SVG and the PNG of a figure, on white, by the ends of their names."""
    spec = _together(figure)
    spec |= {"params": [*spec.get("params", ()), {"name": "hidden", "value": []}], "padding": 10}
    config = theme(looks, dark=False) | {"background": "white"}
    return {
        "svg": vl_convert.vegalite_to_svg(spec, config=config),
        "png": vl_convert.vegalite_to_png(spec, config=config, scale=_SCALE),
    }


def _together(figure: Figure) -> Spec:
    """All panels of a figure in one specification."""
    panels = [{**panel, "width": figure.file_width} for panel in figure.panels]
    return {"concat": panels, "columns": figure.columns} if len(panels) > 1 else panels[0]


def theme(looks: Sequence[Look], *, dark: bool) -> dict[str, Any]:
    """Vega-Lite's configuration: the colours of arms, and of everything else."""
    ink, soft, line = (
        ("#e8ebf0", "#a5adba", "#333a46") if dark else ("#1d2330", "#5c6575", "#e4e7ec")
    )
    labels = {"labelColor": soft, "labelFontSize": 11, "titleColor": soft, "titleFontSize": 11}
    return {
        "background": "transparent",
        "font": "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif",
        "view": {"stroke": None},
        "axis": labels
        | {"gridColor": line, "domain": False, "tickColor": line, "titleFontWeight": "normal"},
        "legend": {"labelColor": ink, "labelFontSize": 11, "labelLimit": 400, "orient": "top"}
        | {"columns": 3, "symbolStrokeWidth": 2, "symbolType": "stroke"},
        "title": {"anchor": "start", "color": ink, "fontSize": 13, "fontWeight": 600, "offset": 12}
        | {"subtitleColor": soft, "subtitleFontSize": 11},
        "text": {"color": ink},
        "range": {"category": [look.dark if dark else look.light for look in looks]},
    }


def templates(*packages: str) -> Environment:
    """The templates of pages; what they are given is escaped.

    Args:
        packages: Packages with templates of their own.
    """
    return Environment(
        loader=ChoiceLoader([PackageLoader(p) for p in (*packages, "gradmask.study.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed with all that they need, as one script."""
    source: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return source.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _sum(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
