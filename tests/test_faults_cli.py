"""Whatever a command line meets ends in one line and the right status: counted, by kind."""

import os
import re
from pathlib import Path

import pytest
from hostile import CASES

from gradmask.cli import main

ALL = [
    pytest.param(case, id=f"{kind}-{number}")
    for kind, cases in CASES.items()
    for number, case in enumerate(cases)
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder of its own, which is the home too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def write(files):
    for name, text in files.items():
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())


def check(case, status, out, err):
    assert status == case.status
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("gradmask: error: ")
    assert re.search(case.message, err), err
    assert err.isprintable() or err.rstrip("\n").isprintable()
    assert out == ""
    assert sorted(os.listdir()) == sorted(case.files), "something was left behind"


@pytest.mark.parametrize("case", ALL)
def test_hostile_words(case, place, monkeypatch, capsys):
    write(case.files)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    status = main(case.words)
    check(case, status, *capsys.readouterr())


def test_there_are_enough():
    assert len(ALL) >= 150
