"""The documentation site: `make docs` builds it into `build/docs`.

Sphinx with MyST and furo, because: the site works without a network; every warning, and every link
or anchor within the project that leads nowhere, can be an error; the reference is read from the
docstrings (Google's style, by napoleon). MkDocs is no longer developed, Material for MkDocs is in
maintenance, and its successor is young.

The source folder is the repository itself, so that links from a page to the results, or from
results to a page, are the same in the site and in a clone. Formulas are plain text, as MathJax and
KaTeX would come from a network.
"""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent, indent
from typing import TYPE_CHECKING

import gradmask

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]

project = "gradmask"
version = release = gradmask.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "results/README.md",
    "results/*/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "tests/README.md",
    "SECURITY.md",
]
exclude_patterns = [".*", "build", "data", "dist", "runs", "src"]
highlight_language = "text"

myst_heading_anchors = 4

default_role = "code"  # docstrings have names between single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_rtype = False

# Types that autodoc cuts at their first comma; and those of other packages, whose pages are not at
# hand without a network.
# Names of types that have no page.
nitpick_ignore = [
    ("py:class", f"gradmask.{name}")
    for name in (
        *("scores.F", "study.spec.Spec", "fisher.rules.Product"),
        *("monitor.Writer", "monitor.InfluenceOptions"),
    )
]
nitpick_ignore_regex = [
    (r"py:class", r"(tuple|dict)\[(str|int)"),
    (
        r"py:.*",
        r"(torch|Tensor|nn|numpy|np|collections|pathlib|typing|transformers|lightning|rich)\b.*",
    ),
]

html_theme = "furo"
html_title = "gradmask"
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # which a browser does not fetch from files
copybutton_exclude = ".linenos, .gp, .go"

_TO_A_FOLDER = re.compile(r"\]\((?P<path>[\w./-]+)\)")


def name_readme(app: Sphinx, docname: str, source: list[str]) -> None:
    """Let a link to a folder lead to its README, as it does where repositories are shown."""
    folder = (ROOT / docname).parent

    def named(link: re.Match[str]) -> str:
        page = Path(link["path"]) / "README.md"
        return f"]({page})" if (folder / page).is_file() else link[0]

    source[0] = _TO_A_FOLDER.sub(named, source[0])


def read_fences(
    app: Sphinx, what: str, name: str, item: object, options: object, lines: list[str]
) -> None:
    """Show code in docstrings, which stands between ``` as in Markdown, as code."""
    text = "\n".join(lines)
    for fence in reversed(list(re.finditer(r"( *)```python\n(.*?)\n *```", text, re.DOTALL))):
        code = indent(dedent(fence[2]), fence[1] + "   ")
        block = f"{fence[1]}.. code-block:: python\n\n{code}\n"
        text = text[: fence.start()] + block + text[fence.end() :]
    # A formula with |x| names no substitution.
    lines[:] = [line if "`" in line else line.replace("|", "\\|") for line in text.splitlines()]


def write_index(app: Sphinx, error: Exception | None) -> None:
    """`build/docs/index.html` leads to the first page, which lies in `docs` like its source."""
    if error is None and app.builder.format == "html":
        page = f'<meta charset="utf-8"><meta http-equiv="refresh" content="0; url={root_doc}.html">'
        link = f'<title>gradmask</title><a href="{root_doc}.html">gradmask</a>'
        (Path(app.outdir) / "index.html").write_text(f"<!doctype html>{page}{link}\n")


def setup(app: Sphinx) -> None:
    """Connect what is above."""
    app.connect("source-read", name_readme)
    app.connect("autodoc-process-docstring", read_fences, priority=400)  # before napoleon
    app.connect("build-finished", write_index)
