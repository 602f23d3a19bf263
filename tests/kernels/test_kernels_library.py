"""How kernels are built, kept and found again: by whom, whole, and by many at once."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from gradmask.kernels import cache, can_add_squared_products, compiler, library

needs_compiler = pytest.mark.skipif(
    not can_add_squared_products(torch.zeros(1)), reason="no C compiler"
)
SOURCE = "keep_where.c"


def forget():
    """As a new process begins."""
    library.load.cache_clear()
    library._told.clear()
    compiler._hung.clear()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing loaded or built yet; temporary files apart."""
    forget()
    temporary = tmp_path / "temporary"
    temporary.mkdir(0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("GRADMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GRADMASK_KERNELS", raising=False)
    yield tmp_path / "cache" / "kernels"
    forget()


def load():
    library.load.cache_clear()
    return library.load(SOURCE, Word="uint32_t")


def files(folder):
    return sorted(path.suffix for path in folder.iterdir())


@pytest.fixture
def builds(monkeypatch):
    """What the compiler was run for."""
    commands, run = [], library.run
    monkeypatch.setattr(library, "run", lambda *words: (commands.append(words), run(*words)))
    return commands


def shell(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_a_library_is_built_once(fresh, builds):
    assert load() is not None
    assert load() is not None
    assert len(builds) == 2  # compiled, linked
    assert files(fresh) == [".sha256", ".so"]
    library.load(SOURCE, Word="uint16_t")
    assert files(fresh) == [".sha256", ".sha256", ".so", ".so"]
    assert not list((fresh.parents[1] / "temporary").iterdir())


@pytest.mark.parametrize("how", ["off", "no compiler", "broken compiler", "hopeless compiler"])
def test_without_a_library(how, fresh, monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.INFO, "gradmask")
    if how == "off":
        monkeypatch.setenv("GRADMASK_KERNELS", "0")
    elif how == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
    else:
        script = shell(tmp_path / "compiler", "echo it broke >&2\nexit 1")
        if how == "hopeless compiler":
            os.chmod(script, 0o644)
        monkeypatch.setenv("CC", script)
    assert load() is None
    assert not can_add_squared_products(torch.zeros(1))
    messages = {"no compiler": "no C compiler was found", "broken compiler": "it broke"}
    assert messages.get(how, "") in caplog.text
    assert len(caplog.records) == (how != "off")  # told once


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def relink(path):
    path.rename(path.with_suffix(".other"))
    path.symlink_to(path.with_suffix(".other"))


def total(path):
    return path.with_suffix(".sha256")


SPOILT = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "one bit": flip,
    "no sum": lambda path: total(path).unlink(),
    "another sum": lambda path: total(path).write_text("0" * 64),
    "a link": relink,
    "sum is a link": lambda path: relink(total(path)),
    "others may write": lambda path: path.chmod(0o606),
    "the group may write": lambda path: path.chmod(0o660),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@needs_compiler
@pytest.mark.parametrize("how", SPOILT)
def test_what_is_not_whole_or_not_ours_is_built_anew(how, fresh, builds):
    assert load() is not None
    (stored,) = fresh.glob("*.so")
    # Not the file itself, which this process has loaded: a change of it would be its end.
    shutil.copy(stored, copy := stored.with_suffix(".copy"))
    os.replace(copy, stored)
    SPOILT[how](stored)
    assert load() is not None
    assert len(builds) == 4
    assert load() is not None
    assert len(builds) == (6 if how == "a folder" else 4)  # in whose place none can be put
    if how != "a folder":
        assert stored.is_file()
        assert not stored.is_symlink()
        assert stored.stat().st_mode & 0o777 == 0o600


@needs_compiler
@pytest.mark.parametrize("how", ["writable", "by group", "above", "link", "file", "other owner"])
def test_a_folder_that_is_not_ours_alone_is_not_used(how, fresh, builds, monkeypatch):
    assert load() is not None
    (stored,) = fresh.glob("*.so")
    stamp = stored.stat().st_mtime_ns
    if how == "writable":
        fresh.chmod(0o777)
    elif how == "by group":
        fresh.chmod(0o770)
    elif how == "above":
        fresh.parent.chmod(0o777)
    elif how == "link":
        fresh.rename(fresh.with_name("elsewhere"))
        fresh.symlink_to("elsewhere")
    elif how == "file":
        shutil.rmtree(fresh.parent)
        fresh.parent.touch()
    else:
        real = os.lstat

        def changed(path, **options):
            status = list(real(path, **options))
            status[4] += str(path) == str(fresh)  # its user
            return os.stat_result(status)

        monkeypatch.setattr(os, "lstat", changed)
        monkeypatch.setattr(cache.Path, "lstat", lambda path: changed(path))
    assert load() is not None
    assert len(builds) == 4
    (mine,) = (fresh.parents[1] / "temporary").iterdir()  # kept there instead
    assert files(mine / "kernels") == [".sha256", ".so"]
    assert mine.stat().st_mode & 0o777 == 0o700
    assert load() is not None
    assert len(builds) == 4
    mine.chmod(0o777)  # nor is that one: built anew each time, and removed
    assert load() is not None
    assert len(builds) == 6
    assert len(list(mine.parent.iterdir())) == 1
    assert how in ("link", "file") or stored.stat().st_mtime_ns == stamp


@needs_compiler
def test_nowhere_to_build(fresh, caplog, monkeypatch, tmp_path):
    caplog.set_level(logging.INFO, "gradmask")
    monkeypatch.setenv("GRADMASK_CACHE", os.devnull)
    (tmp_path / "temporary").chmod(0o777)
    assert load() is None
    assert "others can change" in caplog.text


@needs_compiler
def test_a_full_disk_costs_only_the_cache(fresh, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write", full)
    assert load() is not None
    assert not files(fresh)


def runs(process):
    """Whether a process still runs, on Linux."""
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rsplit(")")[-1].split()[0] != "Z"


@pytest.mark.parametrize("step", ["at once", "in a child"])
def test_a_compiler_that_hangs_is_waited_for_once(step, fresh, monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.INFO, "gradmask")
    monkeypatch.setattr(compiler, "SECONDS", 0.3)
    child = f"sleep 100 & echo $! > {tmp_path}/child; wait"
    wait = {"at once": "exec sleep 100", "in a child": child}[step]
    script = shell(tmp_path / "compiler", f"echo >> {tmp_path}/calls\n{wait}")
    monkeypatch.setenv("CC", script)
    before = time.monotonic()
    assert load() is None
    assert library.load("count_digits.c", Word="uint32_t") is None  # another library
    forget()
    assert load() is None  # another process
    assert time.monotonic() - before < 20
    calls = lambda: len((tmp_path / "calls").read_text())  # noqa: E731
    assert calls() == 1
    assert "stopped after" in caplog.text
    assert step == "at once" or not runs(int((tmp_path / "child").read_text()))
    (note,) = fresh.glob("hung-*")
    os.utime(note, (1, time.time() - 3601))  # an hour later
    forget()
    load()
    assert calls() == 2
    forget()
    shell(tmp_path / "compiler", "exit 1 # mended, more or less")
    caplog.clear()
    assert load() is None
    assert "hung" not in caplog.text


def test_a_compiler_that_hangs_where_nothing_can_be_kept(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(compiler, "SECONDS", 0.3)
    monkeypatch.setattr(library, "find_folder", lambda: None)
    script = shell(tmp_path / "compiler", f"echo >> {tmp_path}/calls\nexec sleep 100")
    monkeypatch.setenv("CC", script)
    for word in ("uint16_t", "uint32_t"):
        assert library.load(SOURCE, Word=word) is None
    assert len((tmp_path / "calls").read_text()) == 1


@needs_compiler
def test_what_killed_processes_left_is_cleared(fresh):
    temporary = fresh.parents[1] / "temporary"
    old, new = (temporary / f"{library._BUILD}{name}" for name in ("old", "new"))
    stranger = temporary / "gradmask-results"
    fresh.mkdir(parents=True, mode=0o700)
    for folder in (old, new, stranger, fresh / "tmpold"):
        folder.mkdir()
        (folder / "built.o").touch()
    (fresh / "tmpfile").touch()
    long_ago = time.time() - cache.STALE - 1
    for path in (old, stranger, fresh / "tmpold", fresh / "tmpfile"):
        os.utime(path, (long_ago, long_ago))
    assert load() is not None
    assert sorted(temporary.iterdir()) == sorted([new, stranger])
    assert files(fresh) == [".sha256", ".so"]


AT_ONCE = """
import os, random, signal, time
from gradmask.kernels import cache, library

def begin():
    child = os.fork()
    if not child:
        loaded = library.load("keep_where.c", Word="uint32_t")
        os._exit(0 if loaded else 1)
    return child

children = [begin() for _ in range(12)]
for child in children[::2]:
    time.sleep(random.Random(child).uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
assert set(ends[1::2]) == {0}, ends
assert set(ends[::2]) <= {0, -signal.SIGKILL}, ends
cache.STALE = 0
assert library.load("keep_where.c", Word="uint16_t")  # clears what is left
"""


@needs_compiler
def test_many_processes_at_once_and_some_killed(fresh):
    environment = os.environ | {"TMPDIR": tempfile.gettempdir(), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", AT_ONCE], env=environment, check=True, timeout=100)
    assert files(fresh) == [".sha256", ".sha256", ".so", ".so"]
    assert not list((fresh.parents[1] / "temporary").iterdir())
    for stored in fresh.glob("*.so"):
        assert cache.find(fresh, stored.stem) == stored
