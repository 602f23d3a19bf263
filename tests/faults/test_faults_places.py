"""Volumes that are read-only or full, as the system makes them: one line, and nothing is lost.

Without the right to mount these tests are left out; errors of such volumes are injected at every
moment of a run in `test_faults_cli` and `test_faults_files`.
"""

import json
import os
import subprocess

import pytest
from checkpoints import timeless
from hostile import RUN, one_line
from image_files import pictures, write_folder, write_parquet

from gradmask.cli import main
from gradmask.errors import GradmaskWarning
from gradmask.recipes.data.folders import warn_once

WORDS = [*RUN, "--epochs=3", "--save-every=1", "--output=volume/out"]
IMAGES = [word for word in RUN if "train-size" not in word]


def mount(*words):
    try:
        return subprocess.run(["mount", *words, "volume"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def read_only(on=True):
    assert mount("-o", f"remount,{'ro' if on else 'rw'}")


@pytest.fixture
def volume(empty_folder):
    """A volume of its own in the working folder."""
    volume = empty_folder / "volume"
    volume.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=8m", "tmpfs"):
        pytest.skip("may not mount")
    yield volume
    os.chdir(empty_folder)
    subprocess.run(["umount", volume], check=True)


def fails(words, message, capsys):
    capsys.readouterr()
    assert main(words) == 2
    found = capsys.readouterr()
    assert message in one_line(found.err)
    return found.out


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def runs(folder):
    return timeless(json.loads((folder / "results.json").read_text())["runs"])


def test_no_new_folder_on_a_read_only_volume(volume, capsys):
    read_only()
    assert fails(WORDS, "Read-only file system: choose another --output", capsys) == ""
    refresh = ["bench", "refresh", *WORDS[1:]]
    assert fails(refresh, "Read-only file system: choose another --output", capsys) == ""
    assert os.listdir(volume) == []


def test_finished_runs_on_a_read_only_volume(volume, capsys):
    assert main(WORDS) == 0
    audit = ["audit", "volume/out", "--by=influence", "--probe=40", "--top=2"]
    before = files(volume)
    read_only()
    for words in (WORDS, ["report", "volume/out"], audit, [*WORDS, "--seeds=0,1"]):
        fails(words, "Read-only file system", capsys)
    assert files(volume) == before
    read_only(False)
    for words in (WORDS, audit):
        assert main(words) == 0
    assert runs(volume / "out") == timeless(json.loads(before[volume / "out/results.json"])["runs"])


def test_a_stopped_run_waits_until_the_volume_can_be_written(volume, capsys):
    assert main([*WORDS[:-1], "--output=whole"]) == 0
    assert main([*WORDS, "--stop-after=1"]) == 75
    before = files(volume)
    read_only()
    fails(WORDS, "Read-only file system: choose another --output", capsys)
    assert files(volume) == before
    read_only(False)
    assert main(WORDS) == 0
    assert runs(volume / "out") == runs(volume.parent / "whole")


@pytest.mark.parametrize(  # KiB: full at another file each
    "size", [24, *(pytest.param(size, marks=pytest.mark.slow) for size in (4, 8, 40, 64, 96))]
)
def test_a_full_volume(size, volume, capsys):
    assert main([*WORDS[:-1], "--output=whole"]) == 0
    assert mount("-o", f"remount,size={size}k")
    fails(WORDS, "No space left on device: make room and give the same command again", capsys)
    assert not list(volume.rglob("*.tmp"))
    assert mount("-o", "remount,size=8m")
    assert main(WORDS) == 0
    assert runs(volume / "out") == runs(volume.parent / "whole")


def test_a_read_only_cache_is_done_without(volume, monkeypatch, capsys):
    monkeypatch.setenv("GRADMASK_CACHE", str(volume / "cache"))
    images = write_folder(volume.parent / "images", pictures(40))
    (volume.parent / "parquet").mkdir()
    table = volume.parent / "parquet" / "set"
    write_parquet(table, "train", pictures(40), [i % 3 for i in range(40)])
    for reason in ("Read-only file system", "it is read-only"):  # without the folder, and with it
        read_only()
        warn_once.cache_clear()
        with pytest.warns(GradmaskWarning, match="decoded anew .* point GRADMASK_CACHE to a fold"):
            assert main([*IMAGES, f"--data={images}", f"--output=out {reason}"]) == 0
        words = [*IMAGES, f"--data={table}", "--output=none"]
        fails(words, f"({reason}): point GRADMASK_CACHE to a folder of your own", capsys)
        read_only(False)
        (volume / "cache" / "datasets").mkdir(parents=True, exist_ok=True)
    assert main([*IMAGES, f"--data={table}", "--output=sound"]) == 0


def test_read_only_data(volume):
    images = write_folder(volume / "images", pictures(40))
    read_only()
    assert main([*IMAGES, f"--data={images}", "--output=out"]) == 0
