"""Files of every kind that is read, who reads each, and how they are damaged."""

import io
import json
import random
import re
import shutil
import warnings
from collections import Counter
from contextlib import chdir

import pytest
import torch
from checkpoints import timeless
from image_files import pictures, write_folder, write_parquet
from rich.console import Console

from gradmask.errors import GradmaskError
from gradmask.recipes.audit.files import write_audit_files
from gradmask.recipes.audit.options import Audit
from gradmask.recipes.audit.run import run_audit
from gradmask.recipes.compare import run_comparison
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.images import load_images
from gradmask.recipes.report import print_summary, write_report
from gradmask.recipes.results import check_comparison
from gradmask.recipes.results import check_theorem as check
from gradmask.recipes.theorem.config import SIZES, TheoremCheck
from gradmask.recipes.theorem.report import print_theorem, write_theorem
from gradmask.recipes.theorem.run import FILE, run_theorem
from gradmask.recipes.training.shards import read_plain, read_shards, save_shards
from gradmask.study.budget import EpochsSpent
from gradmask.study.folder import read_results
from gradmask.study.progress import Progress
from gradmask.study.world import ALONE

QUIET = Console(quiet=True)
OPTIONS = {
    "data": "digits",
    "train_size": 150,
    "label_noise": 0.2,
    "augment": False,
    "model": "mlp",
    "width": 4,
    "epochs": 2,
    "seeds": (0,),
    "arms": ("none", "fisher"),
    "batch_size": 64,
    "save_every": 1,
    "checkpoint_every": 1,
    "device": "cpu",
}


def train_into(folder, **changes):
    config = Comparison(**OPTIONS | changes | {"output": folder})
    return run_comparison(config, Progress(QUIET))


def audit(folder):
    audited = run_audit(Audit(folder, probe=20, top=2, device="cpu"), QUIET)
    write_audit_files(audited)
    return audited


def report(folder):
    results = read_results(folder, check=check_comparison)
    print_summary(results, QUIET)
    write_report(folder, results)


def go_on(folder):
    results = train_into(folder)
    assert [len(run["epochs"]) for run in results["runs"]] == [2, 2]
    return [run | {"commit": ""} for run in timeless(results["runs"])]


def scores(folder):
    return run_audit(Audit(folder, epochs=(2,), probe=20, device="cpu"), QUIET)


def write_scores(folder):
    write_audit_files(scores(folder))
    json.loads((folder / "audit/none-influence/audit.json").read_text(encoding="utf-8"))
    assert (
        (folder / "audit/none-influence/scores-seed0.csv")
        .read_text(encoding="utf-8")
        .startswith("index,")
    )


def check_theorem(folder):
    small = {"models": ("mlp",), "sources": 3, "probe": 2, "steps": 4, "seeds": (0,), "epochs": 1}
    options = SIZES["digits"] | small | {"train_size": 150, "device": "cpu", "output": folder}
    return run_theorem(TheoremCheck(**options), QUIET)


def report_theorem(folder):
    results = read_results(folder, FILE, check)
    print_theorem(results, QUIET)
    write_theorem(folder, results)


def look(folder, **options):
    """The images of a folder, by paths that are the same in its copies, as caches know them."""
    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADMASK_CACHE", "cache")
        data = load_images(Comparison(data="images", **options), 0)
    return data.train_images.tolist(), data.train_labels.tolist()


def look_on(folder):
    return look(folder, skip_damaged=True)


def save_in_shards(folder):
    tensors = {"model": {"weight": torch.arange(1000.0), "bias": torch.ones(3)}}
    place = folder / "checkpoint.shards"
    save_shards(place, folder / "checkpoint.shards.previous", {"epoch": 3}, tensors, ALONE)


def load_shards(folder):
    place = folder / "checkpoint.shards"
    plain = read_plain(place, ALONE)
    tensors = {"model": {"weight": torch.zeros(1000), "bias": torch.zeros(3)}}
    read_shards(place, tensors)
    return plain, {name: tensor.tolist() for name, tensor in tensors["model"].items()}


READ = {  # a folder, a file in it, and who reads it
    "results.json": ("done", "results.json", report),
    "config.yaml": ("done", "config.yaml", go_on),
    "checkpoint": ("stopped", "runs/fisher-seed0/checkpoint.pt", go_on),
    "previous checkpoint": ("stopped", "runs/fisher-seed0/checkpoint.previous.pt", go_on),
    "log": ("stopped", "runs/fisher-seed0/metrics.jsonl", go_on),
    "weights": ("done", "runs/none-seed0/weights/epoch-0002.pt", scores),
    "measured": ("done", "audit/none-influence/measured/none-seed0-0002.pt", scores),
    "audit.json": ("done", "audit/none-influence/audit.json", write_scores),
    "scores": ("done", "audit/none-influence/scores-seed0.csv", write_scores),
    "marker": ("done", ".gradmask", go_on),
    "lock": ("done", ".lock", go_on),
    "theorem1.json": ("theorem", "theorem1.json", report_theorem),
    "options of theorem1": ("theorem", "config.yaml", check_theorem),
    "image": ("images", "images/train/cat/000.png", look),
    "cached images": ("images", "cache/images/*.pt", look),
    "cached damage": ("holes", "cache/damaged/*.pt", look_on),
    "parquet": ("parquet", "images/train-0.parquet", look),
    "index of shards": ("shards", "checkpoint.shards/.metadata", load_shards),
    "shards": ("shards", "checkpoint.shards/__0_0.distcp", load_shards),
    "run of shards": ("shards", "checkpoint.shards/run.pt", load_shards),
}
SAME = ("checkpoint", "previous checkpoint", "log", "cached images", "cached damage")
SAME += ("index of shards", "shards", "run of shards")  # these are recovered whole, or not at all


def make(root):
    """Folders with all of these files.

    Args:
        root: Where.

    Returns:
        What each of `SAME` gives when nothing is damaged, by name.
    """
    train_into(root / "done")
    audit(root / "done")
    with pytest.raises(EpochsSpent):
        train_into(root / "stopped", stop_after=3)
    check_theorem(root / "theorem")
    write_folder(root / "images" / "images", pictures(20))
    write_folder(root / "holes" / "images", pictures(20))
    (root / "holes" / "images" / "train" / "dog" / "001.png").write_bytes(b"no image")
    for name in ("parquet", "shards"):
        (root / name).mkdir()
    write_parquet(root / "parquet" / "images", "train", pictures(15), [0, 1, 2] * 5)
    save_in_shards(root / "shards")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        look(root / "images")
        look_on(root / "holes")
        return {name: READ[name][2](copy(root, name, root / f"whole {name}")) for name in SAME}


def copy(root, name, folder):
    return shutil.copytree(root / READ[name][0], folder, symlinks=True)


def cut(data, draw, _):
    return data[: draw.randrange(len(data) + 1)]


def hole(data, draw, _):
    start = draw.randrange(len(data) + 1)
    return data[:start] + data[start + 100 :]


def flipped(data, draw, _):
    spoilt = bytearray(data)
    for _ in range(8):
        if spoilt:
            spoilt[draw.randrange(len(spoilt))] ^= 1 << draw.randrange(8)
    return bytes(spoilt)


def noise(data, draw, _):
    return draw.randbytes(len(data))


def empty(*_):
    return b""


def huge(*_):
    return b"[" * 300_000


def not_utf8(data, draw, _):
    place = draw.randrange(len(data) + 1)
    return data[:place] + b"\xff\xfe\x00" + data[place:]


def swapped(_data, draw, others):
    return draw.choice(others)


def wrong_type(data, draw, _):
    """One value of a JSON or YAML file, or a whole file of tensors, of another type."""
    wrong = draw.choice(["null", "[]", "{}", '"../../x"', "1e999", "-1", "NaN", "true", "9" * 400])
    places = list(re.finditer(rb"(?<=: )[^\s,{}\[\]]+", data))
    if data.startswith(b"PK") or not places:
        contents = io.BytesIO()
        torch.save(draw.choice([None, [1], {"version": 3}, {"model": 1, "version": 3}]), contents)
        return contents.getvalue()
    place = draw.choice(places)
    return data[: place.start()] + wrong.encode() + data[place.end() :]


KINDS = (cut, hole, flipped, noise, empty, huge, not_utf8, swapped, wrong_type)


def corrupt(root, whole, place, count, seed):
    """Damage files, and have them read.

    Args:
        root: What `make` made.
        whole: What it returned.
        place: An empty folder, to work in.
        count: How many faults.
        seed: Of their choice.

    Returns:
        How many were recovered from, and how many had named errors.
    """
    draw, found = random.Random(seed), Counter()
    others = [next((root / folder).glob(file)).read_bytes() for folder, file, _ in READ.values()]
    pairs = [(name, kind) for name in READ for kind in KINDS]
    for number in range(count):
        name, kind = pairs[number % len(pairs)]
        _, file, read = READ[name]
        folder = copy(root, name, place / f"{number}")
        path = next(folder.glob(file))
        path.write_bytes(kind(path.read_bytes(), draw, others))
        kept = {p: p.read_bytes() for p in (folder / "runs").rglob("*.pt")}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                given = read(folder)
        except GradmaskError as error:
            message = str(error)
            told = str(folder) in message or "images" in message  # these have relative paths
            assert told, (name, kind.__name__, message)
            assert len(message) < 800, (name, kind.__name__, message)
            assert {p: p.read_bytes() for p in kept if p.exists()} == kept  # nothing is lost
            found["named"] += 1
        except BaseException as error:
            raise AssertionError(f"{name}, {kind.__name__}, fault {number}: {error!r}") from error
        else:
            assert name not in whole or given == whole[name], (name, kind.__name__)
            found["recovered"] += 1
        shutil.rmtree(folder)
    return found
