import csv
import io
import json
import re
from html import unescape
from pathlib import Path
from statistics import mean, stdev

import pytest
from made_up import made_up
from rich.console import Console

from gradmask.errors import OptionError
from gradmask.recipes import report as recipes_report
from gradmask.recipes.compare import run_comparison
from gradmask.recipes.config import Comparison
from gradmask.recipes.results import check_comparison
from gradmask.study.arms import STRATEGIES, arm_title
from gradmask.study.folder import mark_folder, read_results
from gradmask.study.metrics import metrics_of
from gradmask.study.progress import Progress
from gradmask.study.report import print_summary, write_comparison_report, write_report
from gradmask.study.report.parts import looks
from gradmask.study.statistics import arms, compare_arms, values
from gradmask.study.verdicts import verdicts

RESULTS = Path(__file__).parents[2] / "results"
ONE_OF_EACH_KIND = {"demo", "figure1", "unlearn"}
EARLIER = [
    pytest.param(p.parent, marks=() if p.parent.name in ONE_OF_EACH_KIND else pytest.mark.slow)
    for p in sorted(RESULTS.rglob("results.json"))
]
EVIL = """</script><img src=x onerror="alert('1')">&lt;"""


def cells(page):
    """The text of every cell of the page's tables, with what its column is sorted by."""
    found = re.findall(r"<td(?: data-value=\"(.*?)\")? class=\"[^\"]*\">(.*?)</td>", page)
    return [(value, unescape(re.sub(r"<[^>]*>", "", text))) for value, text in found]


def markup(page):
    """The page without the texts of its scripts."""
    return re.sub(r"<script.*?</script>", "", page, flags=re.S)


def data(page):
    """What the page's script draws."""
    (text,) = re.findall(r'<script type="application/json" id="page-data">(.*?)</script>', page)
    return json.loads(text)


def test_page_is_self_contained(tmp_path):
    page = write_report(tmp_path, made_up()).read_text()
    assert not re.search(r"<img|@import|url\(|src=", markup(page))
    assert re.findall(r'href="([^"]*)"', markup(page)) == ["data:,"]
    policy = unescape(re.findall(r'Content-Security-Policy" content="([^"]*)"', page)[0])
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy


def test_numbers_of_the_page_are_those_of_the_results(tmp_path):
    results = made_up(every=3)
    page = write_report(tmp_path, results).read_text()
    found = cells(page)
    for arm in arms(results):
        for metric in metrics_of(results).shown:
            runs = [run["epochs"] for run in results["runs"] if run["arm"] == arm]
            numbers = [metric.of(rows) for rows in runs]
            text = f"{metric.show(mean(numbers))} ± {metric.show(stdev(numbers))}"
            assert (str(mean(numbers)), text) in found
    for verdict in verdicts(results):
        show, difference = verdict.metric.show, verdict.difference
        assert (verdict.question, verdict.question) in found
        assert (str(difference.mean), show(difference.mean, signed=True)) in found
        assert (str(difference.p), f"{difference.p:.2g}") in found
        assert (str(difference.corrected), f"{difference.corrected:.2g}") in found
        assert (str(difference.detectable), show(difference.detectable)) in found
        interval = f"{show(difference.low, signed=True)} to {show(difference.high, signed=True)}"
        assert (str(difference.low), interval) in found


def test_curves_are_those_of_the_results(tmp_path):
    results = made_up(every=3)
    panels = data(write_report(tmp_path, results).read_text())["figures"]["curves"]["panels"]
    loss = next(panel for panel in panels if panel["title"] == "Test loss")
    accuracy = next(panel for panel in panels if panel["title"] == "Test accuracy (%)")
    rows = {(row["arm"], row["epoch"]): row for row in loss["data"]["values"]}
    for arm in arms(results):
        runs = [run["epochs"] for run in results["runs"] if run["arm"] == arm]
        for epoch in range(8):
            here = [
                r["test_loss"]
                for one in runs
                for r in one
                if r["epoch"] == epoch and "test_loss" in r
            ]
            assert ((arm_title(arm), epoch) in rows) == bool(here)
            if len(here) > 1:
                row = rows[arm_title(arm), epoch]
                assert row["seeds"] == len(here)
                ends = (mean(here), mean(here) - stdev(here), mean(here) + stdev(here))
                assert (row["mean"], row["low"], row["high"]) == pytest.approx(ends, rel=1e-5)
    # Early stopping ends at different epochs: an epoch has the mean of the seeds that reached it.
    assert rows["early stopping", 5]["seeds"] == 2
    first = accuracy["data"]["values"][0]
    expected = [r["epochs"][0]["test_accuracy"] for r in results["runs"] if r["arm"] == "none"]
    assert first["mean"] == pytest.approx(100 * mean(expected), rel=1e-5)


def test_differences_and_kept_shares_are_those_of_the_results(tmp_path):
    results = made_up()
    figures = data(write_report(tmp_path, results).read_text())["figures"]
    metric = metrics_of(results).judged[1]
    rows = figures["differences"]["panels"][1]["data"]["values"]
    ours, plain = (values(results, arm, metric) for arm in ("fisher:keep=0.25", "none"))
    dots = {r["seed"]: r["dot"] for r in rows if "dot" in r and r["arm"].startswith("Fisher")}
    assert dots == pytest.approx({s: ours[s] - plain[s] for s in ours}, rel=1e-5)
    difference = compare_arms(results, "fisher:keep=0.25", "none", metric)
    row = next(r for r in rows if "mean" in r)
    found = (row["mean"], row["low"], row["high"])
    assert found == pytest.approx((difference.mean, difference.low, difference.high), rel=1e-5)
    kept = figures["kept"]["panels"][0]["data"]["values"]
    assert [row["layer"] for row in kept] == ["weight (1,000)", "bias (10)"]
    fisher = [run["epochs"] for run in results["runs"] if run["arm"] == "fisher:keep=0.25"]
    for place, row in enumerate(kept):
        shares = [mean(rows[e]["kept_per_parameter"][place] for rows in fisher) for e in range(8)]
        assert row["share"] == pytest.approx(shares, abs=6e-4)


def test_a_sweep_has_its_front_and_the_values_that_were_chosen(tmp_path):
    front = ["test_loss@last", "test_accuracy@last"]
    results = made_up(sweep=(0.001, 0.01, 0.1), front=front)
    page = write_report(tmp_path, results).read_text()
    rows = data(page)["figures"]["front"]["panels"][0]["data"]["values"]
    assert len(rows) == 3 * 5
    row = next(r for r in rows if r["arm"] == "no mask" and r["values"] == "lr 0.1")
    last = [
        run["epochs"][-1]
        for run in results["runs"]
        if run["arm"] == "none" and run["values"]["lr"] == 0.1
    ]
    losses, accuracies = ([r[key] for r in last] for key in ("test_loss", "test_accuracy"))
    assert (row["x"], row["y"]) == pytest.approx((mean(losses), 100 * mean(accuracies)), rel=1e-5)
    assert row["yhigh"] == pytest.approx(100 * (mean(accuracies) + stdev(accuracies)), rel=1e-5)
    assert [r["chosen"] for r in rows if r["arm"] == "no mask"] == [0, 4, 0]
    assert "chosen by 4 of 4 seeds" in page
    assert ("lr 0.01", "lr 0.01") in cells(page)  # beside the means
    print_summary(results, console := Console(record=True, width=120))
    (line,) = (line for line in console.export_text().splitlines() if line.startswith("│ no mask "))
    assert line.split("│")[2].strip() == "lr 0.01"
    assert (tmp_path / "figures" / "front.svg").is_file()
    for run in results["runs"]:
        for one in run["epochs"]:
            del one["val_accuracy"]
    page = write_report(tmp_path / "no validation", results).read_text()
    assert "the first value stands for every arm" in page


def test_same_results_same_files(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    first, second = (write_report(folder, made_up()) for folder in folders)
    assert first.read_bytes() == second.read_bytes()
    for path in (folders[0] / "figures").iterdir():
        assert path.read_bytes() == (folders[1] / "figures" / path.name).read_bytes()


def test_all_texts_are_escaped(tmp_path):
    results = made_up(arms=("none", f"own{EVIL}"), sweep=(0.01, 0.1), train=EVIL)
    results["config"]["options"] = {EVIL: EVIL}
    results["environment"][EVIL] = EVIL
    results["parameters"][0][0] = EVIL
    for run in results["runs"]:
        run["values"][EVIL] = EVIL
        for row in run["epochs"]:
            row[f"test_{EVIL}_loss"] = row["test_loss"]
            row["kept_per_parameter"] = [0.5, 0.5]
    page = write_report(tmp_path, results, title=EVIL, notes=[EVIL]).read_text()
    assert "<img" not in markup(page)
    assert page.count("</script>") == 3
    assert EVIL in json.dumps(data(page), ensure_ascii=False).replace('\\"', '"')
    mark_folder(tmp_path)
    both = write_comparison_report({tmp_path: results, tmp_path / EVIL[9:12]: results}).read_text()
    assert "<img" not in markup(both)
    assert both.count("</script>") == 3


@pytest.mark.parametrize(
    ("options", "figures"),
    [
        ({"arms": ("none",), "seeds": 1}, {"curves"}),
        ({"arms": ("fisher",), "seeds": 2, "epochs": 1}, {"curves", "kept"}),
        ({"arms": ("none", "inverse"), "seeds": 1}, {"curves", "differences"}),
        ({"arms": ("a", "b"), "seeds": 2, "start": 5}, {"curves"}),
    ],
)
def test_parts_of_a_study(options, figures, tmp_path):
    results = made_up(**options)
    for run in results["runs"]:
        if run["arm"] == "fisher" and run["seed"] == 1:  # rows may lack what others have
            del run["epochs"][0]["kept_per_parameter"]
    page = write_report(tmp_path, results).read_text()
    files = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in figures for kind in ("png", "svg"))
    assert set(data(page)["figures"]) == figures
    assert (tmp_path / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_diverged_are_named_and_left_out(tmp_path):
    results = made_up()
    results["runs"][0]["diverged"] = {"epoch": 3, "reason": "loss is nan"}
    page = write_report(tmp_path, results).read_text()
    assert "No mask: 1 of 4 runs diverged" in page
    panels = data(page)["figures"]["curves"]["panels"]
    assert panels[0]["data"]["values"][0]["seeds"] == 3
    for run in results["runs"]:
        run |= {"diverged": {"epoch": 1, "reason": "loss is nan"}, "epochs": []}
    page = write_report(tmp_path / "all", results).read_text()
    assert data(page)["figures"] == {}
    print_summary(results, Console(quiet=True))


@pytest.mark.parametrize("folder", EARLIER, ids=lambda p: str(p.relative_to(RESULTS)))
def test_results_of_earlier_versions_have_a_report(folder, tmp_path):
    results = read_results(folder, check=check_comparison)
    page = recipes_report.write_report(tmp_path, results).read_text()
    found = [text for _, text in cells(page)]
    for arm, metrics in results["summary"].items():
        assert arm_title(arm) in found
        names = ("last_test_loss", "test_loss@last", "test_gap@last", "test_old_loss@last")
        loss = next(metrics[name] for name in names if name in metrics)
        assert f"{loss['mean']:.3f} ± {loss['std']:.3f}" in found
    if "data" in results:  # a comparison on images
        assert f"{results['data']['train']} training" in page
    claims = any("influence" in run for run in results["runs"])
    assert ("the paper's claims" in unescape(page)) == claims
    assert (tmp_path / "figures" / "influence.svg").is_file() == claims
    recipes_report.print_summary(results, console := Console(record=True, width=80))
    assert ("The paper's claims on influence" in console.export_text()) == claims


def test_influence_of_an_image_comparison(tmp_path):
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
    results = run_comparison(config, Progress(Console(quiet=True)))
    page = recipes_report.write_report(config.output, results).read_text()
    panels = data(page)["figures"]["influence"]["panels"]
    titles = [panel["title"] for panel in panels]
    assert titles[:2] == [
        "Equation 4 (quadratic form), nats",
        "Equation 3 (exact divergence), nats",
    ]
    row = panels[0]["data"]["values"][0]
    key = "influence/quadratic/mean"
    first = [run["influence"][0][key] for run in results["runs"] if run["arm"] == "none"]
    assert row["mean"] == pytest.approx((first[0] * first[1]) ** 0.5, rel=1e-5)
    assert "Influence is lower on random labels (equation 8, figure 1)" in page
    assert "Test loss, Fisher mask, keep 0.7: after its minimum" in page
    assert len((config.output / "influence.csv").read_text().splitlines()) == 1 + 6 * 4
    assert "Memorised: share" not in page


def test_csv_files_hold_every_number(tmp_path):
    results = made_up(sweep=(0.01, 0.1), every=3)
    files = data(write_report(tmp_path, results).read_text())["files"]
    assert sorted(files) == ["epochs.csv", "means.csv", "verdicts.csv"]
    for name, text in files.items():
        assert (tmp_path / name).read_text() == text
    rows = list(csv.DictReader(io.StringIO(files["epochs.csv"])))
    assert len(rows) == sum(len(run["epochs"]) for run in results["runs"])
    assert rows[1]["test_loss"] == ""
    assert float(rows[0]["test_loss"]) == results["runs"][0]["epochs"][0]["test_loss"]
    found = list(csv.DictReader(io.StringIO(files["verdicts.csv"])))
    first = verdicts(results)[0]
    assert float(found[0]["corrected"]) == first.difference.corrected
    assert (found[0]["control"], found[0]["answer"]) == ("none", first.answer)


def test_studies_side_by_side(tmp_path):
    studies = {tmp_path / "a": made_up(), tmp_path / "b": made_up(arms=("none", "sam"), seeds=2)}
    for folder in studies:
        folder.mkdir()
        mark_folder(folder)
    path = write_comparison_report(studies)
    assert path == tmp_path / "a" / "report-with-b.html"
    page = path.read_text()
    found = cells(page)
    assert [text for _, text in found].count("b") == 2
    metric = metrics_of(studies[tmp_path / "b"]).judged[0]
    numbers = list(values(studies[tmp_path / "b"], "sam", metric).values())
    assert f"{metric.show(mean(numbers))} ± {metric.show(stdev(numbers))}" in dict(found).values()
    panels = data(page)["figures"]["curves"]["panels"]
    assert [p["title"] for p in panels[:2]] == ["Test accuracy (%): a", "Test accuracy (%): b"]
    domains = [panel["layer"][1]["encoding"]["y"]["scale"]["domain"] for panel in panels[:2]]
    assert domains[0] == domains[1]


def test_shares_and_percentages_are_shown_on_one_scale(tmp_path):
    share, percent = made_up(), made_up()
    for run in percent["runs"]:
        for row in run["epochs"]:
            row.update({k: 100 * v for k, v in row.items() if "accuracy" in k})
    studies = {tmp_path / "a": share, tmp_path / "b": percent}
    for folder in studies:
        folder.mkdir()
        mark_folder(folder)
    page = write_comparison_report(studies).read_text()
    _, *rows = [
        [unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)]
        for row in re.findall(r"<tr.*?</tr>", markup(page), flags=re.S)
    ]
    half = len(rows) // 2
    assert [row[1:] for row in rows[:half]] == [row[1:] for row in rows[half:]]
    ours, theirs = data(page)["figures"]["curves"]["panels"][:2]
    assert ours["title"] == "Test accuracy (%): a"
    for one, other in zip(ours["data"]["values"], theirs["data"]["values"], strict=True):
        assert one["mean"] == pytest.approx(other["mean"], rel=1e-5)
        assert one["shown"] == other["shown"]


def test_pages_go_into_folders_of_ours_only(tmp_path):
    (tmp_path / "mine").write_text("mine")
    studies = {tmp_path: made_up(), tmp_path / "b": made_up()}
    with pytest.raises(OptionError, match="no run that gradmask made"):
        write_comparison_report(studies)
    with pytest.raises(OptionError, match="no run that gradmask made"):
        write_report(tmp_path, made_up())
    with pytest.raises(OptionError, match="must be the name of a page"):
        write_comparison_report(studies, tmp_path / "mine")
    with pytest.raises(OptionError, match="two different folders"):
        write_comparison_report({tmp_path / "b": made_up()})
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(OptionError, match="is no report of ours"):
        write_comparison_report(studies, tmp_path / "mine.html")
    assert write_comparison_report(studies, tmp_path / "new" / "x.html").is_file()
    write_comparison_report(studies, tmp_path / "new" / "x.html")  # again, over our own
    assert (tmp_path / "mine.html").read_text() == "mine"


@pytest.mark.parametrize("count", [4, 12, 40])
def test_arms_can_be_told_apart(count):
    strategies = [name for name in STRATEGIES if name != "fixed"]
    names = [*strategies, *(f"fisher:keep=0.{i}" for i in range(10, 60))][:count]
    found = looks(names)
    assert [look.arm for look in found] == names
    assert len({look.title for look in found}) == count
    if count <= 12:
        assert len({(look.light, look.dash) for look in found}) == count
    if count <= 9:
        assert len({look.light for look in found}) == count
    assert looks(["fisher"])[0].light == found[1].light
    alike = looks(["fisher:keep=0.5", "fisher:keep=0.50"])
    assert [look.title for look in alike] == ["Fisher mask, keep 0.5", "fisher:keep=0.50"]


@pytest.mark.parametrize(
    ("width", "missing"),
    [
        (160, []),
        (80, ["test accuracy, best epoch", "train loss, last epoch"]),
        (64, ["test accuracy, best epoch", "train loss, last epoch", "test accuracy, last epoch"]),
    ],
)
def test_narrow_terminal_leaves_whole_columns_out(width, missing):
    results = made_up()
    print_summary(results, console := Console(record=True, width=width))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    rows = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == list(map(arm_title, arms(results)))
    shown = [m for m in metrics_of(results).shown if m.heading.removesuffix(" (%)") not in missing]
    for arm, row in zip(arms(results), rows, strict=True):
        found = [list(values(results, arm, m).values()) for m in shown]
        pairs = zip(shown, found, strict=True)
        expected = [f"{m.show(mean(v))} ± {m.show(stdev(v))}" for m, v in pairs]
        assert [cell.strip() for cell in row[1:]] == expected
    told = f"terminal: {'; '.join(missing)}."
    assert (told in " ".join(text.split())) == bool(missing)


def test_answers_on_the_terminal_are_whole():
    results = made_up(arms=("none", f"fisher:keep=0.{'3' * 30}", "early", "random_matched"))
    results["runs"] += made_up(arms=("fisher",))["runs"]
    print_summary(results, console := Console(record=True, width=80))
    text = console.export_text()
    assert "…" not in text
    for verdict in verdicts(results):
        assert verdict.metric.show(verdict.difference.mean, signed=True) in text
        assert verdict.answer in text
    assert "Conclusion on the Fisher mask in this run" in " ".join(text.split())
