"""Whatever a command line meets ends in one line and the right status: counted, by kind.

The short form runs every case in this process and a few as processes; the long one all of them.
"""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hostile import CASES, RUN

import gradmask
from gradmask.cli import main
from gradmask.experiments.data import batches

posix = pytest.mark.skipif(os.name != "posix", reason="needs signals and /dev")
ALL = [
    pytest.param(case, id=f"{kind}-{number}")
    for kind, cases in CASES.items()
    for number, case in enumerate(cases)
]
LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SOURCE = str(Path(gradmask.__file__).parents[1])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder, beside an empty home."""
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    return work


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def one_line(err):
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1, err
    assert err.rstrip("\n").isprintable()
    return err


def check(case, folder, status, out, err):
    assert status == case.status, err
    assert one_line(err).startswith("gradmask: error: ")
    assert re.search(case.message, err), err
    assert out == ""
    assert sorted(os.listdir(folder)) == sorted(case.files), "something was left behind"


def command(words, folder, *, shell='"$@"', environment=None, **others):
    """Run the command line as a process, in `folder`; `shell` says where its streams go."""
    found = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    found |= {"PYTHONPATH": os.pathsep.join([str(folder.parent / "site"), SOURCE])}
    found |= environment or {}
    found = {name: value for name, value in found.items() if value is not None}
    line = ["sh", "-c", shell, "sh", sys.executable, "-m", "gradmask.cli", *words]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | others
    return subprocess.run(line, cwd=folder, env=found, timeout=120, encoding="utf-8", **streams)


@pytest.mark.parametrize("case", ALL)
def test_hostile_words(case, place, monkeypatch, capsys):
    write(place, case.files)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    status = main(case.words)
    check(case, place, status, *capsys.readouterr())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@posix
def test_hostile_words_as_processes(tmp_path):
    """All that can be words of a process (no NUL), on two processors; prints the counts."""

    def process(case, folder):
        write(folder, case.files)
        found = command(case.words, folder, environment=case.environment)
        check(case, folder, found.returncode, found.stdout, found.stderr)

    counts, tried = Counter(), []
    with ThreadPoolExecutor(2) as pool:
        for kind, cases in CASES.items():
            for number, case in enumerate(cases):
                if "\0" not in "".join(case.words):
                    folder = tmp_path / f"{kind}{number}"
                    folder.mkdir()
                    tried.append(pool.submit(process, case, folder))
                    counts[kind] += 1
    failures = [str(job.exception()) for job in tried if job.exception()]
    print(f"\n{dict(counts)}, {len(tried)} in all, {len(failures)} fell short")
    assert not failures, "\n\n".join(failures)


STREAMS = [  # where the streams go, words, what stderr says, status
    (">&-", ["recipes"], "", 0),
    (">/dev/full", ["recipes"], "No space left", 2),
    ("2>&-", ["rum"], "", 2),
    ("2>/dev/full", ["rum"], "", 2),
    (">&- 2>&-", ["rum"], "", 2),
    (">&- 2>&- <&-", ["recipes"], "", 0),
    ("<&-", ["rum"], "'run'", 2),
    (">/dev/full", ["--help"], "No space left", 2),
    (">/dev/full", ["run", "demo", "--help"], "No space left", 2),
    (">/dev/full", ["--version"], "No space left", 2),
    (">/dev/full", ["bench", "threshold", "--entries=100"], "No space left", 2),
    (">/dev/full 2>/dev/full", ["recipes"], "", 2),
]


@posix
@pytest.mark.parametrize(
    ("shell", "words", "message", "status"),
    [pytest.param(*s, marks=[pytest.mark.slow] * (n not in (1, 4))) for n, s in enumerate(STREAMS)],
)
def test_closed_and_full_streams(shell, words, message, status, place):
    found = command(words, place, shell=f'"$@" {shell}')
    assert found.returncode == status, found.stderr
    assert message in one_line(found.stderr) if message else found.stderr == ""


@posix
@pytest.mark.parametrize(
    "words", [["recipes"], *(pytest.param(w, marks=pytest.mark.slow) for w in (["--help"], RUN))]
)
def test_a_reader_that_left(words, place):
    reader, writer = os.pipe()
    os.close(reader)
    found = command(words, place, stdout=writer)
    os.close(writer)
    assert found.returncode in (1, 141)
    assert found.stderr == ""


ENVIRONMENTS = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C", "PYTHONUTF8": "0"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    {"LC_ALL": "none.such"},
    {"HOME": None},
    {"HOME": "/proc/none", "GRADMASK_CACHE": None},
    {"HOME": "", "GRADMASK_CACHE": None},
    {"TMPDIR": "/proc/none"},
    {"TERM": "dumb", "COLUMNS": "1"},
    {"COLUMNS": "many"},
    {"NO_COLOR": "1", "FORCE_COLOR": "1"},
    {"OMP_NUM_THREADS": "0"},
    {"GRADMASK_CACHE": "/dev/null/cache"},
]


@pytest.mark.slow
@posix
@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=str)
def test_odd_environments_do_no_harm(environment, place):
    found = command([*RUN, "--output=out"], place, environment=environment)
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr
    assert "Conclusion" in found.stdout or "test accuracy" in found.stdout
    for words in (["report", "out"], ["--help"], ["run", "demo", "--help"]):
        found = command(words, place, environment=environment)
        assert (found.returncode, found.stderr) == (0, "")


def at_import(place, module, deed):
    """Let processes do something when they begin to import a module."""
    site = place.parent / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        f"            {deed}\n"
        "sys.meta_path.insert(0, Finder())\n"
    )


@posix
@pytest.mark.parametrize(
    "module",
    [
        "torch",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "gradmask.fisher",
                "torch._C",
                "numpy",
                "torch.distributed",
                "gradmask.mask",
                "gradmask.cli",
                "gradmask.cli.bench",
                "jsonargparse",
                "gradmask.experiments.recipes",
                "torchvision",
                "scipy",
                "sklearn",
                "rich.progress",
            )
        ),
    ],
)
def test_interrupts_during_the_imports(module, place):
    at_import(place, module, "os.kill(os.getpid(), signal.SIGINT)")
    found = command([*RUN, "--output=out"], place)
    assert found.returncode == 130, found.stderr
    assert one_line(found.stderr) == "gradmask: interrupted.\n"
    assert os.listdir(place) == []


@posix
@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, -signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_signals_at_work(number, status, place):
    words = [sys.executable, "-m", "gradmask.cli", *RUN, "--epochs=100000", "--output=out"]
    environment = os.environ | {"PYTHONPATH": SOURCE}
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 60
    while time.monotonic() < end and not list(place.glob("out/runs/*/checkpoint.pt")):
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status, err
    if number == signal.SIGTERM:  # ends the process as the system does; nothing is lost
        assert err == ""
        return
    assert "the same command goes on" in one_line(err)
    assert not list(place.rglob("*.tmp"))


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
    ("owner", "name", "moment"), PLACES, ids=lambda v: getattr(v, "__name__", v)
)
@pytest.mark.parametrize(
    "fault",
    [full, interrupted, *(pytest.param(f, marks=pytest.mark.slow) for f in (read_only, broken))],
)
def test_faults_in_the_middle(owner, name, moment, fault, place, monkeypatch, capsys):
    words = [*RUN, "--augment=true", "--epochs=3", "--output=deep/out"]
    calls, original = Counter(), getattr(owner, name)

    def call(*args, **options):
        calls[name] += 1
        return (fault if calls[name] == moment else original)(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        status = main(words)
    assert calls[name] >= moment, "the fault was not met"
    err = one_line(capsys.readouterr().err)
    assert status == (130 if fault is interrupted else 2)
    assert ("goes on" if fault is interrupted else "somewhere") in err
    assert not [p for p in place.rglob("*") if p.name.endswith(".tmp")]
    assert main(words) == 0, "the same command goes on"
    assert len(json.loads((place / "deep/out/results.json").read_text())["runs"]) == 1


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
def test_errors_of_the_work(error, message, status, place, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("gradmask.experiments.compare.run_comparison", fail)
    assert main(RUN) == status
    assert re.search(message, one_line(capsys.readouterr().err))
    for words in (["--debug", *RUN], [*RUN, "--debug"]):
        assert main(words) == status
        told = capsys.readouterr().err
        assert "Traceback" in told
        assert told.splitlines()[-1].startswith("gradmask: error: ")


@pytest.mark.slow
@posix
@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("jsonargparse", RUN),
        ("torchvision", RUN),
        ("yaml", RUN),
        ("sklearn", RUN),
        ("rich", ["recipes"]),
        ("rich", ["bench", "threshold"]),
        ("matplotlib", ["bench", "refresh"]),
        ("jinja2", ["report", "."]),
    ],
)
def test_a_missing_extra_is_named(module, words, place):
    at_import(place, module, f"raise ModuleNotFoundError('No module named {module}')")
    found = command(words, place)
    assert found.returncode == 2
    assert f"No module named {module}" in one_line(found.stderr)
    assert "pip install 'gradmask[experiments]'" in found.stderr
    assert os.listdir(place) == []


@pytest.mark.parametrize(
    "name", ["o/x[/bold]y", "[red]", "~/below", "ümlaut ÷", "a b\tc", "x{0}%s$1"]
)
def test_odd_names_of_folders_work(name, place, capsys):
    assert main([*RUN, f"--output={name}"]) == 0
    folder = Path(name).expanduser()
    assert (folder / "report.html").is_file()
    printed = capsys.readouterr().out
    assert name.startswith(("~", "a b")) or f"Report: {name}" in printed
    assert main(["report", name]) == 0
    assert os.listdir(place) == ([] if name.startswith("~") else [name.split("/")[0]])


def test_there_are_enough():
    assert sum(map(len, CASES.values())) >= 200
