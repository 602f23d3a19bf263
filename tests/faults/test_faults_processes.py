"""Hostile words, streams, signals and environments, with the command line as a process.

The short form has one of each kind; the long one all of them, and counts.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hostile import CASES, LAUNCHER, RUN, check, one_line, write

import gradmask

posix = pytest.mark.skipif(os.name != "posix", reason="needs signals and /dev")
PATIENCE = 550  # seconds, for machines that have other work
SOURCE = str(Path(gradmask.__file__).parents[1])


def heed_interrupts():
    """A suite in the background of a shell ignores them, and its children would too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def command(words, folder, *, shell='"$@"', environment=None, **others):
    """Run the command line as a process, in `folder`; `shell` says where its streams go."""
    found = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    found |= {"PYTHONPATH": os.pathsep.join([str(folder.parent / "site"), SOURCE])}
    found |= environment or {}
    found = {name: value for name, value in found.items() if value is not None}
    line = ["sh", "-c", shell, "sh", sys.executable, "-m", "gradmask.cli", *words]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | others
    return subprocess.run(
        line,
        cwd=folder,
        env=found,
        timeout=PATIENCE,
        encoding="utf-8",
        preexec_fn=heed_interrupts,
        **streams,
    )


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
    [pytest.param(*s, marks=[pytest.mark.slow] * (n != 1)) for n, s in enumerate(STREAMS)],
)
def test_closed_and_full_streams(shell, words, message, status, empty_folder):
    found = command(words, empty_folder, shell=f'"$@" {shell}')
    assert found.returncode == status, found.stderr
    assert message in one_line(found.stderr) if message else found.stderr == ""


@posix
@pytest.mark.parametrize(
    ("words", "unbuffered"),
    [
        (["--help"], "1"),
        *(
            pytest.param(words, unbuffered, marks=pytest.mark.slow)
            for words in (["recipes"], ["--help"], RUN)
            for unbuffered in ("", "1")
        ),
    ],
)
def test_a_reader_that_left(words, unbuffered, empty_folder):
    reader, writer = os.pipe()
    os.close(reader)
    environment = {"PYTHONUNBUFFERED": unbuffered}
    found = command(words, empty_folder, stdout=writer, environment=environment)
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
def test_odd_environments_do_no_harm(environment, empty_folder):
    found = command([*RUN, "--output=out"], empty_folder, environment=environment)
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr
    assert "Conclusion" in found.stdout or "test accuracy" in found.stdout
    found = command(["run", "demo", "--help"], empty_folder, environment=environment)
    said = [line for line in found.stderr.splitlines() if line and not line.startswith("libgomp:")]
    assert (found.returncode, said) == (0, [])


def at_import(empty_folder, module, deed):
    """Let processes do something when they begin to import a module."""
    site = empty_folder.parent / "site"
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
                "gradmask.cli.run",
                "cyclopts",
                "gradmask.recipes.catalogue",
                "torchvision",
                "scipy",
                "sklearn",
                "rich.progress",
            )
        ),
    ],
)
def test_interrupts_during_the_imports(module, empty_folder):
    at_import(empty_folder, module, "os.kill(os.getpid(), signal.SIGINT)")
    found = command([*RUN, "--output=out"], empty_folder)
    assert found.returncode == 130, found.stderr
    assert one_line(found.stderr) == "gradmask: interrupted.\n"
    assert os.listdir(empty_folder) == []


@pytest.mark.slow
@posix
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_signals_at_work(number, status, empty_folder):
    words = [sys.executable, "-m", "gradmask.cli", *RUN, "--epochs=100000", "--output=out"]
    environment = os.environ | {"PYTHONPATH": SOURCE}
    process = subprocess.Popen(
        words,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not list(empty_folder.glob("out/runs/*/checkpoint.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == status, err
    if number == signal.SIGTERM:  # ends the process as the system does; nothing is lost
        assert err == ""
        return
    assert "the same command goes on" in one_line(err)
    assert not list(empty_folder.rglob("*.tmp"))


@pytest.mark.slow
@posix
@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("cyclopts", RUN),
        ("torchvision", RUN),
        ("yaml", RUN),
        ("sklearn", RUN),
        ("rich", ["recipes"]),
        ("rich", ["bench", "threshold"]),
        ("matplotlib", ["bench", "refresh"]),
    ],
)
def test_a_missing_extra_is_named(module, words, empty_folder):
    at_import(empty_folder, module, f"raise ModuleNotFoundError('No module named {module}')")
    found = command(words, empty_folder)
    assert found.returncode == 2
    assert f"No module named {module}" in one_line(found.stderr)
    assert "pip install 'gradmask[experiments]'" in found.stderr
    assert os.listdir(empty_folder) == []
