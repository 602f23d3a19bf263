"""Whatever a command line meets ends in one line and the right status, in this process."""

import errno
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hostile import CASES, RUN, check, one_line, write

from gradmask.cli import main
from gradmask.recipes.data import batches

ALL = [
    pytest.param(case, id=f"{kind}-{number}")
    for kind, cases in CASES.items()
    for number, case in enumerate(cases)
]


@pytest.mark.parametrize("case", ALL)
def test_hostile_words(case, empty_folder, monkeypatch, capsys):
    write(empty_folder, case.files)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    status = main(case.words)
    check(case, empty_folder, status, *capsys.readouterr())


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def read_only(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), "somewhere")


def broken(*_, **__):
    raise OSError(errno.EIO, os.strerror(errno.EIO), "somewhere")


def interrupted(*_, **__):
    raise KeyboardInterrupt


PLACES = [  # what fails, at which of its calls
    *((os, "replace", n) for n in (1, 2, 3, 4)),
    *((os, "fsync", n) for n in (1, 2, 3, 4)),
    *((Path, "mkdir", n) for n in (1, 2)),
    *((torch, "save", n) for n in (1, 2)),
    (batches, "augment_batch", 1),
]


@pytest.mark.parametrize(
    ("fault", "owner", "name", "moment"),
    [
        pytest.param(fault, *where, marks=[pytest.mark.slow] * (number % step > 0))
        for fault, step in ((full, 1), (interrupted, 2), (read_only, 6), (broken, 6))
        for number, where in enumerate(PLACES)
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_faults_in_the_middle(fault, owner, name, moment, empty_folder, monkeypatch, capsys):
    words = [*RUN, "--augment=true", "--epochs=3", "--output=deep/out"]
    calls, original = Counter(), getattr(owner, name)

    def call(*args, **options):
        calls[name] += 1
        return (fault if calls[name] == moment else original)(*args, **options)

    monkeypatch.setattr("gradmask.cli.run.show", lambda *_: 0)  # the report takes seconds
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        status = main(words)
    assert calls[name] >= moment, "the fault was not met"
    err = one_line(capsys.readouterr().err)
    assert status == (130 if fault is interrupted else 2)
    assert ("goes on" if fault is interrupted else "somewhere") in err
    assert not [p for p in empty_folder.rglob("*") if p.name.endswith(".tmp")]
    assert main(words) == 0, "the same command goes on"
    assert len(json.loads((empty_folder / "deep/out/results.json").read_text())["runs"]) == 1


@pytest.mark.parametrize(
    ("error", "message", "status"),
    [
        (MemoryError(), "out of memory", 1),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory", 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory", 1),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "another process ended early", 1),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "another process ended early", 1),
        (EOFError("Ran out of input"), "another process ended early", 1),
        (RuntimeError("first\nsecond"), "RuntimeError: first .--debug", 1),
        (KeyError("\x1b]0;x"), "KeyError: ", 1),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates"), "cannot be used as a path", 2),
        (TimeoutError("after 600 s"), "after 600 s", 2),
        (RecursionError("deep"), "RecursionError: deep", 1),
        (AssertionError(), "AssertionError", 1),
        (ImportError("No module named 'rich'"), "pip install 'gradmask.experiments.'", 2),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Exception) else None,
)
def test_errors_of_the_work(error, message, status, empty_folder, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("gradmask.recipes.compare.run_comparison", fail)
    assert main(RUN) == status
    assert re.search(message, one_line(capsys.readouterr().err))
    for words in (["--debug", *RUN], [*RUN, "--debug"]):
        assert main(words) == status
        told = capsys.readouterr().err
        assert "Traceback" in told
        assert told.splitlines()[-1].startswith("gradmask: error: ")


@pytest.mark.parametrize(
    "name",
    [
        "o/x[/bold]{0}%s$1",
        "~/below",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("[red]", "ümlaut ÷", "a b\tc")),
    ],
)
def test_odd_names_of_folders_work(name, empty_folder, capsys):
    assert main([*RUN, f"--output={name}"]) == 0
    folder = Path(name).expanduser()
    assert (folder / "report.html").is_file()
    printed = capsys.readouterr().out
    assert name.startswith(("~", "a b")) or f"Report: {name}" in printed
    assert main(["report", name]) == 0
    assert os.listdir(empty_folder) == ([] if name.startswith("~") else [name.split("/")[0]])


def test_there_are_enough():
    assert sum(map(len, CASES.values())) >= 200
