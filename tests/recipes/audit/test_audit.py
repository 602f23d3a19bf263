import contextlib
import csv
import io
import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from gradmask.cli import main
from gradmask.errors import StateError
from gradmask.recipes.audit import run as audit
from gradmask.recipes.audit.detection import (
    MEAN,
    MEAN_RANK,
    auroc,
    by_rule,
    choose,
    detect,
    precision_at,
)
from gradmask.recipes.audit.options import Audit
from gradmask.recipes.audit.report import audit_verdicts
from gradmask.recipes.audit.run import run_audit
from gradmask.recipes.audit.scores import AUDIT_SCORES, Measured, measure
from gradmask.recipes.compare import run_comparison
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.images import load_images
from gradmask.recipes.data.transforms import channel_statistics, normalize
from gradmask.recipes.training.components import new_model
from gradmask.recipes.training.weights import load_weights, weights_path
from gradmask.study.folder import run_directory
from gradmask.study.progress import Progress
from gradmask.study.spec import Spec

QUIET = Console(quiet=True)
OPTIONS = {
    "data": "digits",
    "train_size": 150,
    "label_noise": 0.2,
    "augment": False,
    "model": "mlp",
    "width": 16,
    "arms": ("none",),
    "epochs": 2,
    "seeds": (0, 1, 2),
    "save_every": 1,
    "device": "cpu",
}


def train(folder, **changes):
    config = Comparison(**OPTIONS | changes | {"output": folder})
    run_comparison(config, Progress(QUIET))
    return config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return train(tmp_path_factory.mktemp("audit") / "out")


@pytest.fixture(scope="module")
def printed(config):
    """What the whole command prints."""
    out = io.StringIO()
    words = [
        "audit",
        "--by=influence",
        str(config.output),
        "--probe",
        "40",
        "--top",
        "7",
        "--device",
        "cpu",
    ]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setenv("COLUMNS", "200")
        assert main(words) == 0
    return out.getvalue()


def rows_of(folder, seed):
    with (folder / "audit" / "none-influence" / f"scores-seed{seed}.csv").open() as file:
        return list(csv.DictReader(file))


# Scores, against gradients by autograd, one sample after the other.


def gradients(model, images, labels):
    found = []
    for x, y in zip(images, labels, strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        parts = torch.autograd.grad(loss, list(model.parameters()))
        found.append(torch.cat([p.flatten() for p in parts]))
    return torch.stack(found)


def exact_pairs(model, g, inputs):
    """gᵀ F(x) g for each gradient and input."""
    columns = []
    for x in inputs:
        total = 0.0
        for y, p in enumerate(model(x[None])[0].softmax(0).detach()):
            h = gradients(model, x[None], torch.tensor([y]))[0]
            total = total + p * (g @ h) ** 2
        columns.append(total)
    return torch.stack(columns, 1)


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("block", [3, 100])
def test_scores_against_single_gradients(fisher, block):
    step, probe = 0.3, torch.tensor([1, 4, 5, 8, 9])
    images, labels = torch.randn(11, 4).double(), torch.randint(0, 3, (11,))
    labels[probe] = torch.tensor([0, 0, 1, 1, 2])  # class 2 has no other sample in the probe
    labels[0] = 2
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    found = measure(
        model, images, labels, lambda x: 2 * x, probe, fisher=fisher, step=step, block=block
    )
    inputs = 2 * images
    g = gradients(model, inputs, labels)
    if fisher == "empirical":
        pairs = 0.5 * step**2 * (g @ g[probe].T) ** 2
        own = 0.5 * step**2 * g.norm(dim=1) ** 4
        diagonal = 0.5 * step**2 * g.square() @ g[probe].square().mean(0)
    else:
        pairs = 0.5 * step**2 * exact_pairs(model, g, inputs[probe])
        own = 0.5 * step**2 * exact_pairs(model, g, inputs).diagonal()
        diagonal = None
    logits = model(inputs).detach()
    for i, label in enumerate(labels.tolist()):
        others = [j for j, p in enumerate(probe.tolist()) if p != i]
        same = [j for j in others if labels[probe[j]] == label]
        different = [j for j in others if labels[probe[j]] != label]
        expected = {
            "loss": -logits[i].log_softmax(0)[label],
            "margin": logits[i, label] - max(logits[i, k] for k in range(3) if k != label),
            "norm": g[i].norm(),
            "own": own[i],
            "everyone": pairs[i].mean(),
            "others": pairs[i, others].mean(),
            "same": pairs[i, same or others].mean(),
            "different": pairs[i, different].mean(),
        }
        if diagonal is not None:
            expected["diagonal"] = diagonal[i]
        for name, value in expected.items():
            assert getattr(found, name)[i].item() == pytest.approx(value.item(), rel=1e-9), name


def test_forms():
    values = torch.tensor([2.0, 3.0]).double()
    m = Measured(*(k * values for k in range(1, 10)))
    m = replace(m, norm=torch.tensor([4.0, 0.0]).double())
    found = {form.name: form.of(m).tolist() for form in AUDIT_SCORES}
    assert found["per_norm"] == [6 * 2 / 16, 0.0]  # no gradient, no influence
    assert found["same_per_norm"] == [7 * 2 / 16, 0.0]
    assert found["diagonal_per_norm"] == [9 * 2 / 16, 0.0]
    assert found["per_self"] == [6 / 4, 6 / 4]
    assert found["same_share"] == [7 / 15, 7 / 15]
    assert len({form.name for form in AUDIT_SCORES}) == len(AUDIT_SCORES)


# Detection, against numbers worked out by hand.


def test_auroc_and_precision_by_hand():
    scores = torch.tensor([0.9, 0.8, 0.8, 0.3, 0.1])
    wanted = torch.tensor([True, False, True, False, True])
    # Pairs (wanted, other): 0.9 beats both, 0.8 draws with one and beats one, 0.1 loses both.
    assert auroc(scores, wanted) == pytest.approx(3.5 / 6)
    assert auroc(-scores, wanted) == pytest.approx(2.5 / 6)
    found = [precision_at(scores, wanted, k) for k in (1, 2, 3, 5)]
    assert found == pytest.approx([1, 1 / 2, 2 / 3, 3 / 5])  # equal scores: the first one first


def test_epoch_rules():
    first, second = torch.tensor([1.0, 100.0, 1.0]), torch.tensor([4.0, 3.0, 2.0])
    rules = by_rule({2: first, 6: second})
    assert list(rules) == ["epoch 2", "epoch 6", MEAN, MEAN_RANK]
    assert rules["epoch 6"].tolist() == [4, 3, 2]
    assert rules[MEAN].tolist() == [2.5, 51.5, 1.5]
    assert rules[MEAN_RANK].tolist() == [(0.5 + 2) / 2, (2 + 1) / 2, 0.25]


def made_up(signs, rng):
    """Scores of each form: at epoch 2 chance, at epoch 6 of the form's sign, as well as others."""
    wrong = torch.rand(200, generator=rng) < 0.3
    noise = [torch.randn(200, generator=rng) for _ in range(2)]
    scores = {
        name: {"epoch 2": noise[0], "epoch 6": noise[1] + sign * wrong}
        for name, sign in signs.items()
    }
    return scores, wrong


def test_choices_are_made_on_the_first_seed_only():
    rng = torch.Generator().manual_seed(0)
    signs = {form.name: 1.0 for form in AUDIT_SCORES} | {"margin": 3.0, "same": -2.0}
    first, wrong = made_up(signs, rng)
    # Another seed on which every score has the opposite order, without noise.
    wrong2 = wrong[torch.randperm(200, generator=rng)]
    turned = {
        name: {"epoch 2": rules["epoch 2"], "epoch 6": -signs[name] * wrong2.double()}
        for name, rules in first.items()
    }
    found = detect({7: first, 8: turned}, {7: wrong, 8: wrong2})
    assert found.choices == choose(first, wrong)
    assert {choice.rule for choice in found.choices.values()} == {"epoch 6"}
    assert found.choices["margin"].high
    assert not found.choices["same"].high
    assert (found.chosen_on, found.seeds) == (7, (8,))
    assert (found.best, found.best_baseline) == ("same", "margin")
    # On the other seed everything is the other way round, and that is what is reported.
    assert found.aurocs["same"] == {8: 0.0}
    k = found.ks[-1]
    assert k == int(wrong.sum())
    assert found.precisions["margin"][k] == {8: 0.0}
    assert found.difference().mean == 0.0


def test_one_seed_chooses_nothing():
    rng = torch.Generator().manual_seed(1)
    scores, wrong = made_up({form.name: 1.0 for form in AUDIT_SCORES}, rng)
    scores = {name: by_rule({2: s["epoch 2"], 6: s["epoch 6"]}) for name, s in scores.items()}
    found = detect({3: scores}, {3: wrong})
    assert found.chosen_on is None
    assert {(c.form, c.rule, c.high) for c in found.choices.values()} == {
        (form.name, MEAN, form.high) for form in AUDIT_SCORES
    }
    assert found.difference().low is None


# The whole command.


def test_files(config, printed):
    folder = config.output / "audit" / "none-influence"
    assert {path.name for path in folder.iterdir()} == {
        *(f"scores-seed{seed}.csv" for seed in config.seeds),
        "audit.json",
        "audit.html",
        "detection.svg",
        "contact-sheet-seed1.png",
        "measured",
    }
    found = json.loads((folder / "audit.json").read_text())
    assert found["audit"]["epochs"] == [1, 2]
    assert found["detection"]["chosen_on"] == 0
    assert found["detection"]["seeds"] == [1, 2]
    assert "precision@27" in found["detection"]["forms"]["loss"]  # 20 % of 135
    for row in found["detection"]["forms"].values():
        by_seed = list(row["auroc"]["by_seed"].values())
        assert row["auroc"]["mean"] == pytest.approx(sum(by_seed) / 2)
    for form in AUDIT_SCORES:
        assert form.title in printed
    assert "Conclusion: influence" in printed
    assert str(folder / "audit.html") in printed


def test_rows_of_the_table_of_scores(config, printed):
    found = json.loads((config.output / "audit" / "none-influence" / "audit.json").read_text())
    for seed in config.seeds:
        rows, data = rows_of(config.output, seed), load_images(config, seed)
        names = data.class_names
        assert [int(row["index"]) for row in rows] == list(range(135))
        assert [row["given_label"] for row in rows] == [names[i] for i in data.train_labels]
        assert [row["clean_label"] for row in rows] == [names[i] for i in data.train_clean_labels]
        wrong = [row["given_label"] != row["clean_label"] for row in rows]
        assert [bool(int(row["wrong"])) for row in rows] == wrong
        assert sum(wrong) == 27
        assert sorted(int(row["rank"]) for row in rows) == list(range(1, 136))
        choice = found["detection"]["forms"]["loss"]
        column = f"loss ({choice['rule']})"
        ranked = sorted(rows, key=lambda row: int(row["rank"]))
        losses = [float(row[column]) for row in ranked]
        assert losses == sorted(losses, reverse=choice["high"])
        if seed != found["detection"]["chosen_on"]:
            # What the JSON file says follows from the rows.
            hits = sum(int(row["wrong"]) for row in ranked[:27]) / 27
            assert choice["precision@27"]["by_seed"][str(seed)] == pytest.approx(hits)


def test_losses_are_those_of_the_kept_weights(config, printed):
    data = load_images(config, 1)
    inputs = normalize(data.train_images, *channel_statistics(data.train_images))
    losses = []
    for epoch in (1, 2):
        model = new_model(config, data, 1).eval()
        load_weights(weights_path(run_directory(config.output, Spec("none", 1)), epoch), model)
        with torch.no_grad():
            losses.append(F.cross_entropy(model(inputs), data.train_labels, reduction="none"))
    options = Audit(config.output, seeds=(1,), probe=40, device="cpu")
    rules = run_audit(options, QUIET).runs[1].scores["loss"]
    torch.testing.assert_close(rules["epoch 2"].float(), losses[1])
    torch.testing.assert_close(rules[MEAN].float(), (losses[0] + losses[1]) / 2)


def test_page_is_self_contained(config, printed):
    page = (config.output / "audit" / "none-influence" / "audit.html").read_text()
    assert not re.search(r"<script|<link|@import|url\((?!#)", page)
    assert re.findall(r'src="(.{22})', page) == ["data:image/png;base64,"]
    assert page.count("<svg") == 1
    for form in AUDIT_SCORES:
        assert f"<td>{form.title}</td>" in page


def test_measured_once(config, printed, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(audit, "measure", refuse)
    options = Audit(config.output, probe=40, device="cpu")
    run_audit(options, QUIET)
    with pytest.raises(AssertionError, match="measured again"):
        run_audit(replace(options, probe=41), QUIET)
    path = weights_path(run_directory(config.output, Spec("none", 2)), 2)
    whole = path.read_bytes()
    path.write_bytes(weights_path(run_directory(config.output, Spec("none", 2)), 1).read_bytes())
    try:
        with pytest.raises(StateError, match=r"not of the run in results\.json, but of another"):
            run_audit(options, QUIET)  # other weights than the run has kept
    finally:
        path.write_bytes(whole)


def test_without_wrong_labels(tmp_path, capsys):
    config = train(tmp_path / "out", label_noise=0.0, seeds=(0,))
    words = [
        "audit",
        "--by=influence",
        str(config.output),
        "--probe=20",
        "--epochs",
        "2",
        "--score",
        "per_norm",
    ]
    assert main([*words, "--fisher", "sampled", "--top", "3"]) == 0
    assert "No wrong label is known" in " ".join(capsys.readouterr().out.split())
    rows = rows_of(config.output, 0)
    assert "wrong" not in rows[0]
    ranked = sorted(rows, key=lambda row: int(row["rank"]))
    scores = [float(row[f"per_norm ({MEAN})"]) for row in ranked]
    assert scores == sorted(scores)  # low values are suspicious
    assert (config.output / "audit" / "none-influence" / "contact-sheet-seed0.png").exists()


def test_verdict_says_what_is_shown(config, printed):
    audited = run_audit(Audit(config.output, probe=40, device="cpu"), QUIET)
    sentences = audit_verdicts(audited)
    difference = audited.detection.difference()
    assert f"influence is {difference.mean:+.3f} against the baseline" in sentences[2]
    assert f"{difference.low:+.3f} to {difference.high:+.3f}, 2 seeds" in sentences[2]
    shown = difference.low > 0 or difference.high < 0
    assert ("is not shown to" in sentences[-1]) == (not shown)
    one = audit_verdicts(run_audit(Audit(config.output, seeds=(1,), probe=40), QUIET))
    assert "from one seed: no interval" in one[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arm", "fisher"], "Unknown arm 'fisher'.*Known: none"),
        (["--seeds", "9"], r"seed=9 is not in .*\[0, 1, 2\]"),
        (["--epochs", "1", "5"], r"epochs=\[5\].*those of \[1, 2\]"),
        (["--probe", "19"], "probe=19 must be from 20.* to 135"),
        (["--probe", "136"], "probe=136 must be from 20.* to 135"),
        (["--score", "los"], "Did you mean 'loss'"),
        (["--fisher", "emprical"], 'Did you mean "empirical"'),
        (["--top", "0"], "top=0 must be at least 1"),
        (["--device", "gpu"], "device='gpu' cannot be used"),
    ],
)
def test_mistakes_are_one_clear_line(words, message, config, capsys):
    assert main(["audit", "--by=influence", str(config.output), *words]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.strip().splitlines()) == 1
    assert re.search(message, printed.err)
    assert printed.out == ""


def test_folders_without_weights(tmp_path, capsys):
    assert main(["audit", "--by=influence", str(tmp_path)]) == 2
    assert "No results.json" in capsys.readouterr().err
    config = train(tmp_path / "out", save_every=None, epochs=1, seeds=(0,))
    assert main(["audit", "--by=influence", str(config.output)]) == 2
    assert "train with --save-every" in capsys.readouterr().err
