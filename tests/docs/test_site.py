"""The site: everything public is on it, its pictures are up to date, it builds and opens."""

import importlib
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import NAMES, ROOT

import gradmask

DOCS = ROOT / "docs"
MODULES = (
    "gradmask",
    "gradmask.audit",
    "gradmask.study",
    "gradmask.study.report",
    "gradmask.integrations.transformers",
    "gradmask.integrations.lightning",
    "gradmask.integrations.peft",
    "gradmask.errors",
)
# What these have for the package's own use.
INNER = {"gradmask.errors": {"check_choice", "first_names", "check_keep", "check_max_samples"}}


def public(name):
    """The public names of a module."""
    module = importlib.import_module(name)
    if hasattr(module, "__all__"):
        return set(module.__all__)
    own = {
        key
        for key, value in vars(module).items()
        if getattr(value, "__module__", None) == name and not key.startswith("_")
    }
    return {
        key
        for key in own
        if inspect.isroutine(vars(module)[key]) or inspect.isclass(vars(module)[key])
    } - INNER.get(name, set())


def documented():
    """Full names of all that the reference has."""
    found = set()
    for page in (DOCS / "reference").glob("*.md"):
        module = ""
        for what, name in re.findall(r"^\.\. (\S+):: (\S+)$", page.read_text(), re.MULTILINE):
            if what == "py:currentmodule":
                module = name
            else:
                found.add(name if name.startswith("gradmask.") else f"{module}.{name}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_on_the_reference(module):
    assert {f"{module}.{name}" for name in public(module)} <= documented()


def test_the_reference_names_nothing_else():
    for name in documented():
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module), last), name


def test_every_score_has_a_card():
    cards = (DOCS / "cards" / "scores.md").read_text(encoding="utf-8").split("\n## ")[1:]
    cards = dict(card.split("\n", 1) for card in cards)
    ours = {
        name: s for name, s in gradmask.SCORES.items() if s.function.__module__ == "gradmask.scores"
    }
    assert list(cards) == list(ours)
    for name, card in cards.items():
        assert ours[name].formula.partition(",")[0] in card
        assert ours[name].cost in card
        for part in ("Formula", "To training", "Settings from our results", "Cost", "Not for"):
            assert f"- **{part}:**" in card, (name, part)


def test_every_use_has_its_parts():
    index = (DOCS / "cards" / "index.md").read_text(encoding="utf-8")
    pages = [path for path in (DOCS / "cards").glob("*.md") if path.stem not in ("index", "scores")]
    assert len(pages) == 5
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert f"({page.name})" in index
        for part in ("What we measured", "Settings to begin with", "Cost.", "When not to use it."):
            assert f"**{part}" in text, (page, part)


def load(name):
    """A script of `docs` as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["architecture", "demo"])
def test_pictures_are_up_to_date(name):
    script = load(name)
    again = f"run: python docs/{name}.py"
    assert script.PICTURE.read_text(encoding="utf-8") == script.draw(), again


def test_arrows_go_down_only():
    script = load("architecture")
    edges, _ = script.imports()
    layer, direct = script.layers(edges)
    for part, found in edges.items():
        assert all(layer[part] > layer[other] for other in found)
    assert edges["study"] >= {"mask"}
    assert "errors" in edges["study"]
    assert "errors" not in direct["study"]


def without_code(page):
    """The text of a page, without what is code."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page):
    """Those of a page's headings."""
    for heading in re.findall(r"^#+ (.*)", without_code(page), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page):
    """In a clone, the README's too; the site's own check is stricter, and slow."""
    here = ROOT / page
    text = re.sub(r"`[^`]*`", "", without_code(here))
    for path, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if not path.startswith("http"):
            there = here.parent / path if path else here
            assert there.exists(), path
            assert not anchor or anchor in anchors(there), f"{path}#{anchor}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_citation():
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["version"] == gradmask.__version__
    assert found["references"][0]["title"] == "Gradient mask and neural network generalization"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does."""
    for needed in ("sphinx", "furo", "myst_parser", "sphinx_copybutton"):
        pytest.importorskip(needed, reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    (recipe,) = re.findall(
        r"sphinx-build (.*) -d \S+ \. \S+$", (ROOT / "Makefile").read_text(), re.M
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [*recipe.split(), "-d", str(folder / "cache"), ".", str(folder / "site")]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text()):
            assert not re.search(r"""(src|href)=["'](https?:)?//""", tag), f"{page}: {tag}"
    shown = (site / "docs" / "reference" / "masks.html").read_text()
    assert 'id="gradmask.FisherMask.refresh"' in shown


NAMES_OF_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, NAMES_OF_BROWSERS)), None
)
FLAGS = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync")
FLAGS = (*FLAGS, "disable-background-networking", "disable-component-update")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_opens_every_page(site):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    wrong, visited = [], 0
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=BROWSER, args=[f"--{flag}" for flag in FLAGS]
        )
        page = browser.new_context(offline=True).new_page()
        here = ""
        page.on("console", lambda message: wrong.append(f"{here}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"{here}: {error}"))
        page.on("requestfailed", lambda request: wrong.append(f"{here}: {request.url}"))
        pages = [path for path in site.rglob("*.html") if "_downloads" not in path.parts]
        for path in sorted(pages):
            here = Path(path).relative_to(site)
            if str(here) != "index.html":  # which leads to docs/index.html at once
                page.goto(path.as_uri())
                visited += 1
        page.goto((site / "index.html").as_uri())
        page.wait_for_url("**/docs/index.html")
        page.goto(f"{(site / 'search.html').as_uri()}?q=threshold")
        page.wait_for_selector("#search-results li a")
        browser.close()
    assert visited > 60
    assert wrong == []
