"""`gradmask audit` and `gradmask audit clean` on runs of digits."""

import csv
import json

import pytest
import torch

from gradmask.audit import Dynamics
from gradmask.cli import main
from gradmask.recipes.audit.clean import ARMS, sentences
from gradmask.recipes.audit.dynamics import audit_dynamics
from gradmask.recipes.audit.options import DynamicsAudit
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.images import load_images
from gradmask.study.folder import read_results

WORDS = [
    *("run", "--data=digits", "--model=mlp", "--width=32", "--epochs=8", "--label-noise=0.2"),
    *("--plant=0.05", "--threads=1", "--device=cpu"),
]


# These trainings are short.
pytestmark = pytest.mark.filterwarnings("ignore:At the end of training")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audited") / "out"
    words = [*WORDS, "--arms", "none", "slow", "--seeds", "0", "1"]
    assert main([*words, f"--output={folder}"]) == 0
    return folder


def state(folder, name="none-seed0"):
    return torch.load(folder / "runs" / name / "dynamics.pt", weights_only=True)["made"]


def test_every_image_is_visited_once_an_epoch(folder):
    found = state(folder)
    assert (found["counts"][:-1, 0] == 8).all()


def test_audit_writes_a_folder_for_each_run_and_a_table_of_80_columns(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for arm in ("none", "slow"):
        assert main(["audit", str(folder), "--arm", arm]) == 0
    shown = capsys.readouterr().out
    table = [line for line in shown.splitlines() if "│" in line]
    assert table
    assert max(map(len, table)) <= 80
    assert "combined rank" in shown
    assert "…" not in "".join(table)
    places = {path.name for path in (folder / "audit").iterdir()}
    assert places == {"none-seed0", "none-seed1", "slow-seed0", "slow-seed1"}
    run, _ = audit_dynamics(DynamicsAudit(folder))[1]
    with (folder / "audit" / "none-seed0" / "samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(run.data.train_labels)
    wrong = run.data.train_labels != run.data.train_clean_labels
    audited = [int(row["sample"]) for row in rows if row["planted"] == "0"]
    assert wrong[audited[:100]].double().mean() > 0.7
    first = [cells[1].strip() for line in table if len(cells := line.split("│")) == 6]
    assert first[:10] == [row["sample"] for row in rows[:10]]
    for row in rows[:20]:
        assert row["label"] == str(run.data.train_labels[int(row["sample"])].item())
    written = json.loads((folder / "audit" / "none-seed0" / "audit.json").read_text())
    assert written["detection"]["combined rank"]["auroc"] > 0.95
    assert written["threshold"]["wrong_share"] == pytest.approx(0.2, abs=0.08)
    page = (folder / "audit" / "none-seed0" / "report.html").read_text()
    assert page.count("data:image/png") == 200


def test_options_of_the_other_audit_are_refused_by_name(folder, capsys):
    for words, name in (
        (["--fisher", "exact"], "influence"),
        (["--by", "influence", "--share", "0.1"], "dynamics"),
    ):
        assert main(["audit", str(folder), *words]) == 2
        assert f"--by {name}" in capsys.readouterr().err
    assert main(["audit", str(folder), "--share", "2"]) == 2
    assert main(["audit", str(folder), "--arm", "fisher"]) == 2
    assert main(["audit", str(folder), "--seeds", "7"]) == 2


def test_an_interrupted_run_has_the_same_dynamics(folder, tmp_path):
    words = [*WORDS, "--arms=none", "--seeds=0", f"--output={tmp_path / 'b'}"]
    while (code := main([*words, "--stop-after=3", "--checkpoint-every=4"])) == 75:
        pass
    assert code == 0
    ours, theirs = state(tmp_path / "b"), state(folder)
    for name, value in theirs.items():
        same = torch.equal(value, ours[name]) if torch.is_tensor(value) else value == ours[name]
        assert same, name


def test_dynamics_of_another_training_are_refused(folder, capsys):
    path = folder / "runs" / "none-seed1" / "dynamics.pt"
    kept = path.read_bytes()
    try:
        path.write_bytes((folder / "runs" / "none-seed0" / "dynamics.pt").read_bytes())
        assert main(["audit", str(folder), "--seeds", "1"]) == 2
        assert "another training" in capsys.readouterr().err
        path.write_bytes(kept[:100])
        assert main(["audit", str(folder), "--seeds", "1"]) == 2
    finally:
        path.write_bytes(kept)


def test_clean_trains_every_arm_and_says_what_it_shows(folder, tmp_path, capsys):
    words = ["audit", "clean", str(folder), "--threads=1", f"--output={tmp_path / 'clean'}"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    results = read_results(tmp_path / "clean")
    assert {run["arm"] for run in results["runs"]} == set(ARMS)
    assert len(results["runs"]) == 12
    assert "that wrong labels cost" in " ".join(shown.split())
    assert len(sentences(results)) == 8
    accuracy = {
        arm: sum(r["epochs"][-1]["test_loss"] for r in results["runs"] if r["arm"] == arm)
        for arm in ARMS
    }
    clean, dropped, random = (
        accuracy[f"none:labels={kind}"] for kind in ("clean", "dropped", "dropped-at-random")
    )
    assert clean < dropped < random
    assert main(words) == 0  # nothing is trained again
    assert read_results(tmp_path / "clean")["runs"] == results["runs"]


def test_clean_needs_to_know_how_much(tmp_path, capsys):
    words = [word for word in WORDS if not word.startswith("--plant")]
    assert main([*words, "--arms=none", "--seeds=0", f"--output={tmp_path / 'a'}"]) == 0
    assert main(["audit", "clean", str(tmp_path / "a")]) == 2
    assert "--plant 0.05" in capsys.readouterr().err
    assert not (tmp_path / "a" / "clean").exists()


def test_asymmetric_noise_goes_to_the_most_similar_class():
    config = Comparison(data="digits", label_noise=0.3, noise="asymmetric", plant=0.0)
    data = load_images(config, 0)
    wrong = data.train_labels != data.train_clean_labels
    assert wrong.double().mean() == pytest.approx(0.3, abs=0.01)
    pixels = data.train_images.flatten(1).double()
    means = torch.stack([pixels[data.train_clean_labels == k].mean(0) for k in range(10)])
    for label in range(10):
        distances = (means - means[label]).norm(dim=1)
        distances[label] = torch.inf
        found = data.train_labels[wrong & (data.train_clean_labels == label)].unique()
        assert found.tolist() == [int(distances.argmin())]


def test_planted_labels_are_those_of_the_seed():
    config = Comparison(data="digits", label_noise=0.2, plant=0.05)
    plain = load_images(Comparison(data="digits", label_noise=0.2), 3)
    data, other = load_images(config, 3), load_images(config, 4)
    changed = (data.train_labels != plain.train_labels).nonzero().flatten()
    assert torch.equal(changed, data.planted.ids)
    assert not torch.equal(data.planted.ids, other.planted.ids)
    assert plain.planted is None
    assert Dynamics(len(changed)).samples == len(changed)


def test_runs_of_an_own_training_are_refused_by_name(folder, tmp_path, capsys):
    results = read_results(folder)
    results["config"]["train"] = "theirs:train"
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "config.yaml").write_text((folder / "config.yaml").read_text())
    assert main(["audit", str(tmp_path)]) == 2
    assert "theirs:train" in capsys.readouterr().err


def test_one_epoch_is_enough_for_a_rank(tmp_path):
    words = [w for w in WORDS if not w.startswith("--epochs")]
    assert main([*words, "--epochs=1", "--arms=none", "--seeds=0", f"--output={tmp_path}/o"]) == 0
    assert main(["audit", f"{tmp_path}/o"]) == 0


def test_nothing_to_drop_is_told_before_training(folder, tmp_path, capsys):
    words = ["audit", "clean", str(folder), "--share=0", f"--output={tmp_path / 'clean'}"]
    assert main(words) == 2
    assert "Nothing is to be dropped" in capsys.readouterr().err
    assert not (tmp_path / "clean").exists()


def test_a_share_is_not_said_to_promise(folder, capsys):
    assert main(["audit", str(folder), "--share", "0.3"]) == 0
    printed = capsys.readouterr().out
    assert "labels flagged" in printed
    assert "expected to be right" not in printed
    assert "of the flagged to be right" not in printed
