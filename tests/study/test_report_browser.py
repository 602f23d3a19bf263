"""The report as a browser shows it: Chromium of the system, without a window."""

import os
import shutil

import pytest
from made_up import made_up

from gradmask.study.report import write_report
from gradmask.study.verdicts import verdicts

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync")
FLAGS = (*FLAGS, "disable-background-networking", "disable-component-update")
EVIL = """</script><img src=x onerror="document.title='broken'">"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def results():
    arms = ("none", "fisher:keep=0.25", "slow:keep=0.25", "random_matched:keep=0.25", f"own{EVIL}")
    found = made_up(arms, sweep=(0.001, 0.01, 0.1), judge=["test_accuracy", "test_loss"])
    for run in found["runs"]:
        run["values"] = {"lr": run["values"]["lr"], EVIL: 1}
        for row in run["epochs"]:
            row[f"test_{EVIL}_loss"] = row["test_loss"]
    return found


@pytest.fixture(scope="module")
def path(results, tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("page"), results, title=EVIL, notes=[EVIL])


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=BROWSER, args=[f"--{flag}" for flag in FLAGS]
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, path):
    """Opens the page; what goes wrong in it, or leaves it, fails the test."""
    contexts, wrong = [], []

    def opened(**options):
        contexts.append(chromium.new_context(offline=True, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-drawn]")
        return page

    requested = []
    yield opened
    local = [url for url in requested if not url.startswith(("data:", "blob:"))]
    assert set(local) == {path.as_uri()}
    assert wrong == []
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_page_fits_and_draws_every_figure(width, scheme, visit):
    page = visit(viewport={"width": width, "height": 900}, color_scheme=scheme)
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1]
    charts = page.locator("[data-chart]")
    assert charts.count() == page.locator("[data-chart] svg.marks").count() > 8
    for box in (charts.nth(i).bounding_box() for i in range(charts.count())):
        assert box["height"] > 100
    assert page.title() == EVIL
    assert page.locator("img").count() == 0


def test_colours_follow_the_scheme(visit):
    page = visit(color_scheme="light")
    ink = "getComputedStyle(document.querySelector('[data-chart] svg text')).fill"
    paper = "getComputedStyle(document.querySelector('section')).backgroundColor"
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    light = page.evaluate(ink)
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("body[data-drawn=dark]")
    assert page.evaluate(paper) == "rgb(26, 30, 38)"
    assert page.evaluate(ink) != light
    # The plain arm is black on white, and light on black.
    line = "[...document.querySelectorAll('.mark-line path')].map(p => p.getAttribute('stroke'))"
    assert "#d3d7de" in page.evaluate(line)
    assert "#3b3b3b" not in page.evaluate(line)


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_tables_are_sorted(by, visit, results):
    page = visit()
    metric = verdicts(results)[0].metric
    ps = [v.difference.p for v in verdicts(results) if v.metric == metric]
    table = page.locator("table").first
    head = table.locator("th").nth(5)

    def press():
        if by == "mouse":
            head.locator("button").click()
        else:
            head.locator("button").focus()
            page.keyboard.press("Enter")

    def shown():
        cells = table.locator("tbody td:nth-child(6)").all()
        return [float(cell.get_attribute("data-value")) for cell in cells]

    assert shown() == ps
    assert ps != sorted(ps)
    assert head.get_attribute("aria-sort") is None
    press()
    assert shown() == sorted(ps)
    assert head.get_attribute("aria-sort") == "ascending"
    press()
    assert shown() == sorted(ps, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    assert table.locator("th[aria-sort]").count() == 1


def test_words_are_sorted_and_what_is_missing_comes_last(visit):
    page = visit()
    table = page.locator("table").first
    table.locator("th button").nth(1).click()
    words = table.locator("tbody td:nth-child(2)").all_inner_texts()
    assert words == sorted(words)
    page.evaluate("document.querySelector('tbody td:nth-child(6)').removeAttribute('data-value')")
    for _ in range(2):
        table.locator("th button").nth(5).click()
        assert table.locator("tbody tr").last.locator("td[data-value]").count() == 8


def test_every_button_and_box_is_reached_by_the_keyboard(visit):
    page = visit()
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    count = page.locator("button, input, select, summary").count()
    reached = set()
    for _ in range(3 * count):
        page.keyboard.press("Tab")
        here = "[...document.querySelectorAll('*')].indexOf(document.activeElement)"
        reached.add(page.evaluate(here))
    tags = page.evaluate(
        "(all) => all.map(i => document.querySelectorAll('*')[i]?.tagName)", list(reached)
    )
    assert sum(tag in ("BUTTON", "INPUT", "SELECT", "SUMMARY") for tag in tags) == count


def test_values_are_shown_under_the_pointer(visit, results):
    page = visit()
    chart = page.locator("[data-chart=curves] svg.marks").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.4 * box["height"])
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.4 * box["height"])
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    text = tooltip.inner_text()
    assert "epoch" in text
    spec = page.evaluate("page.figures.curves.panels[0].data.values")
    assert any(row["shown"] in text and row["arm"] in text for row in spec)


def test_an_arm_is_hidden_and_shown_again(visit):
    page = visit()
    lines = page.locator("[data-chart=curves]").first.locator(".mark-line path")
    count = lines.count()
    box = page.locator("[data-legend=curves] input").first
    box.focus()
    page.keyboard.press("Space")
    page.wait_for_function(
        "n => document.querySelector('[data-chart=curves]')"
        ".querySelectorAll('.mark-line path').length < n",
        arg=count,
    )
    page.keyboard.press("Space")
    page.wait_for_function(
        "n => document.querySelector('[data-chart=curves]')"
        ".querySelectorAll('.mark-line path').length == n",
        arg=count,
    )


def test_figures_and_numbers_are_saved(visit, path):
    page = visit(color_scheme="dark", accept_downloads=True)
    for kind, start in (("svg", b"<svg"), ("png", b"\x89PNG")):
        for name in ("curves", "front", "differences", "kept"):
            with page.expect_download() as saved:
                page.locator(f"[data-figure={name}][data-kind={kind}]").click()
            assert saved.value.suggested_filename == f"{name}.{kind}"
            contents = saved.value.path().read_bytes()
            assert contents.startswith(start)
            if kind == "svg":  # as the file is: on white, with a legend
                assert b'fill="white"' in contents
                assert b"#d3d7de" not in contents
    with page.expect_download() as saved:
        page.locator("[data-file='epochs.csv']").click()
    assert saved.value.path().read_text() == (path.parent / "epochs.csv").read_text()
