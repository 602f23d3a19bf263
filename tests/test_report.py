import re

import pytest
from rich.console import Console

from gradmask.recipes.compare import run_comparison
from gradmask.recipes.config import Comparison
from gradmask.recipes.results import check_comparison
from gradmask.study.arms import MASKS
from gradmask.study.arms import STRATEGIES as ALL
from gradmask.study.folder import read_results
from gradmask.study.progress import Progress
from gradmask.study.report.page import print_summary, write_report
from gradmask.study.statistics import METRICS, compare_arms

STRATEGIES = {arm: ALL[arm] for arm in ("none", *MASKS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = Comparison(
        train_size=150,
        label_noise=0.2,
        model="mlp",
        width=16,
        epochs=3,
        seeds=(0, 1),
        output=tmp_path_factory.mktemp("report") / "out",
    )
    run_comparison(config, Progress(Console(quiet=True)))
    return config.output


@pytest.fixture
def results(folder):
    return read_results(folder, check=check_comparison)


def test_page_is_self_contained(folder, results):
    page = write_report(folder, results).read_text()
    assert not re.search(r"<script|<link|<img|@import|url\((?!#)|src=", page)
    assert not re.search(r'href="(?!#|data:image/png;base64,)', page)
    assert page.count("<svg") == 3
    ids = re.findall(r' id="([^"]+)"', page)
    assert ids
    assert len(ids) == len(set(ids))  # or figures would use each other's parts


def test_page_holds_every_number(folder, results):
    page = write_report(folder, results).read_text()
    for arm, title in STRATEGIES.items():
        assert title in page
        for metric in METRICS:
            summary = results["summary"][arm][metric.name]
            cell = f"{metric.show(summary['mean'])} ± {metric.show(summary['std'])}"
            assert cell in page
    for name, numel in results["parameters"]:
        assert f"{name}  ({numel:,})" in page
    assert "Conclusion on the Fisher mask" in page


def test_wide_parts_of_the_page_can_be_read(folder, results):
    page = write_report(folder, results).read_text()
    # The interval on a line of its own, or the table is wider than the page.
    cells = re.findall(r'<td class="(?:best|weak)">(\S+?)<span class="interval">(.*?)</span>', page)
    assert len(cells) == len(METRICS) * (len(STRATEGIES) - 1)
    difference = compare_arms(results, "inverse", "none", METRICS[-1])
    low, high = (METRICS[-1].show(x, signed=True) for x in (difference.low, difference.high))
    assert cells[-1] == (METRICS[-1].show(difference.mean, signed=True), f"[{low}, {high}]")
    assert re.search(r"\.interval { display: block;", page)
    # Figures keep a legible size on a small screen and scroll in their own box.
    assert re.search(r"figure svg {[^}]* min-width: \d{3}px;", page)
    assert re.search(r"\.scroll, figure {\s*overflow-x: auto;", page)
    assert page.count("<figure><svg") + page.count("<figure>\n<svg") == page.count("<svg")
    assert page.count('<div class="scroll"><table>') == page.count("<table>")


def test_same_results_same_files(folder, results):
    page = write_report(folder, results).read_bytes()
    curves = (folder / "figures" / "curves.svg").read_bytes()
    assert write_report(folder, read_results(folder, check=check_comparison)).read_bytes() == page
    assert (folder / "figures" / "curves.svg").read_bytes() == curves


def test_names_are_escaped(folder, results, tmp_path):
    results["config"]["data"] = "<script>alert(1)</script>"
    page = write_report(tmp_path, results).read_text()
    assert "<script" not in page


@pytest.mark.parametrize(
    ("arms", "seeds", "figures"),
    [
        (("none",), (0,), {"curves"}),
        (("fisher",), (0, 1), {"curves", "kept"}),
        (("none", "inverse"), (1,), {"curves", "differences"}),
    ],
)
def test_parts_of_a_comparison(arms, seeds, figures, results, tmp_path):
    runs = results["runs"]
    results["runs"] = [run for run in runs if run["arm"] in arms and run["seed"] in seeds]
    page = write_report(tmp_path, results).read_text()
    files = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in figures for kind in ("png", "svg"))
    assert page.count("<svg") == len(figures)


def test_table_on_the_terminal(results):
    console = Console(record=True, width=150)
    print_summary(results, console)
    text = console.export_text()
    summary = results["summary"]["inverse"]["last_test_loss"]
    assert f"{summary['mean']:.3f} ± {summary['std']:.3f}" in text
    assert "Conclusion on the Fisher mask" in text


@pytest.mark.parametrize(
    ("width", "missing"),
    [
        (120, []),
        (80, ["best epoch", "train loss"]),
        (60, ["best epoch", "train loss", "memorised", "last epoch"]),
    ],
)
def test_narrow_terminal_leaves_whole_columns_out(width, missing, results):
    console = Console(record=True, width=width)
    print_summary(results, console)
    text = console.export_text()
    rows = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    titles = [metric.title for metric in METRICS if metric.title not in missing]
    assert [row[0].strip() for row in rows] == list(STRATEGIES.values())  # one line an arm
    for arm, row in zip(STRATEGIES, rows, strict=True):
        means = [cell.split("±")[0].strip() for cell in row[1:]]
        kept = [metric for metric in METRICS if metric.title in titles]
        assert means == [m.show(results["summary"][arm][m.name]["mean"]) for m in kept]
        assert all(re.fullmatch(r" *[\d.]+ ± [\d.]+ ", cell) for cell in row[1:])
    assert (f"terminal: {', '.join(missing)}." in " ".join(text.split())) == bool(missing)


def test_one_epoch(folder, results, tmp_path):
    for run in results["runs"]:
        run["epochs"] = run["epochs"][:1]
    write_report(tmp_path, results)


def test_influence_has_its_figure_its_numbers_and_the_claims(tmp_path):
    config = Comparison(
        train_size=150,
        model="mlp",
        width=16,
        epochs=3,
        arms=("none", "none:labels=random", "fisher:keep=0.7"),
        seeds=(0, 1),
        monitor=("quadratic", "kl"),
        monitor_sources=4,
        monitor_probe=8,
        output=tmp_path / "out",
    )
    found = run_comparison(config, Progress(Console(quiet=True)))
    page = write_report(config.output, found).read_text()
    assert page.count("<svg") == 4
    for text in ("Equation 4 (quadratic form), nats", "Equation 3 (exact divergence), nats"):
        assert text in page
    assert "Influence is lower on random labels (equation 8, figure 1)" in page
    assert "Test loss, Fisher mask, keep 0.7: after its minimum" in page
    assert (config.output / "figures" / "influence.png").read_bytes().startswith(b"\x89PNG")
    rows = (config.output / "influence.csv").read_text().splitlines()
    assert len(rows) == 1 + 6 * 4
    console = Console(record=True, width=150)
    print_summary(found, console)
    assert "The paper's claims on influence in these runs" in console.export_text()
