"""Runs on several workers: the same bits, and nothing lost when one of them dies."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from training_functions import train, train_and_die

from gradmask.errors import OptionError
from gradmask.study import compare

pytest.importorskip("distributed", reason="several jobs need dask")

HERE = Path(__file__).parents[1] / "helpers"
ARMS = ["none", "fisher:keep=0.25", "early"]


def timeless(runs):
    changing = ("seconds", "source")
    return [{k: v for k, v in run.items() if k not in changing} for run in runs]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    output = tmp_path_factory.mktemp("one-worker")
    return timeless(compare(train, ARMS, range(3), output, threads=1)["runs"])


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Workers import the functions of the tests."""
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{path}")


@pytest.mark.slow
def test_two_workers_one_of_which_dies(alone, tmp_path):
    """Its run is taken up again from its checkpoint; all else as with one worker."""
    results = compare(train_and_die, ARMS, range(3), tmp_path, jobs=2, threads=1)
    assert timeless(results["runs"]) == alone
    assert len(list(tmp_path.glob("runs/*/died"))) == 1
    assert not list(tmp_path.rglob("checkpoint*"))


def test_what_workers_cannot_have_is_refused_before_any_work(tmp_path, monkeypatch):
    lock = threading.Lock()
    with pytest.raises(OptionError, match=r"cannot be sent to workers \(TypeError: cannot pickle"):
        compare(lambda trial: lock, ["none"], [0], tmp_path / "lock", jobs=2)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "<stdin>", raising=False)
    with pytest.raises(OptionError, match="'<stdin>' is no file: save it"):
        compare(train, ["none"], [0], tmp_path / "script", jobs=2)
    assert not list(tmp_path.glob("*/runs"))


@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True])
def test_an_interrupt_ends_in_one_line(begun, tmp_path):
    """While workers start, and while they train."""
    options = ["--jobs", "2", "--threads", "1", "--output", str(tmp_path / "out")]
    words = ["study", "training_functions:train_slowly", *options]
    command = [sys.executable, "-m", "gradmask.cli", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    pattern = "out/runs/*/metrics.jsonl" if begun else "out/config.yaml"
    while not list(tmp_path.glob(pattern)):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1.5)  # of the seconds that workers take to start
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = told.splitlines()
    assert line.startswith("gradmask: interrupted.")
    assert line.endswith("the same command goes on.")


STUDY = """
import sys
from training_functions import train_slowly
from gradmask.study import compare
if __name__ == "__main__":
    arms = ["none", "fisher:keep=0.25", "early"]
    compare(train_slowly, arms, range(3), sys.argv[1], jobs=2, threads=1)
"""


def start(output):
    environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{os.environ['PYTHONPATH']}"}
    script = output.parent / "study.py"
    script.write_text(STUDY)
    return subprocess.Popen([sys.executable, str(script), str(output)], env=environment)


def workers(parent):
    """Processes that train below a driver."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, ppid = int(entry.parent.name), int(entry.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if ppid == parent:
            found += [pid, *workers(pid)]
    return found


def kill_at_random(output, kills, generator):
    """Kill the driver, a worker or both, until the study has survived so many kills."""
    done = 0
    while True:
        driver = start(output)
        while driver.poll() is None:
            wait = generator.uniform(0.5, 6.0)
            end = time.monotonic() + wait
            while time.monotonic() < end and driver.poll() is None:
                time.sleep(0.05)
            if done < kills and driver.poll() is None:
                targets = workers(driver.pid)
                what = generator.choice(["driver", "worker", "both"])
                hit = [driver.pid] * (what != "worker")
                hit += [generator.choice(targets)] if targets and what != "driver" else []
                for pid in hit:
                    try:
                        os.kill(pid, signal.SIGKILL)
                        done += 1
                    except ProcessLookupError:
                        pass
        if driver.returncode == 0:
            return done
        assert driver.returncode in (-signal.SIGKILL, 1), driver.returncode


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("kills", [2, 50])
def test_drivers_and_workers_killed_at_any_moment(alone, tmp_path, kills):
    output = tmp_path / "out"
    generator = random.Random(kills)
    survived = kill_at_random(output, kills, generator)
    runs = json.loads((output / "results.json").read_text())["runs"]
    assert timeless(runs) == alone
    assert survived <= kills + 1


@pytest.mark.slow
def test_a_cluster_that_loses_a_node(alone, tmp_path):
    """A scheduler and two nodes, as on a cluster, one of which is killed in its first run."""
    environment = os.environ | {"DASK_DISTRIBUTED__WORKER__DAEMON": "False"}

    def command(*words):
        module = [sys.executable, "-m", "distributed.cli." + words[0], *words[1:]]
        return subprocess.Popen(module, env=environment, stderr=subprocess.DEVNULL)

    file = str(tmp_path / "scheduler.json")
    local = ["--no-dashboard", "--host", "127.0.0.1"]
    scheduler = command("dask_scheduler", "--scheduler-file", file, "--port", "0", *local)
    nodes = []
    try:
        options = ["--scheduler-file", file, "--nworkers", "1", "--nthreads", "1", *local]
        nodes = [command("dask_worker", *options) for _ in range(2)]
        while not Path(file).exists():
            time.sleep(0.05)
        address = json.loads(Path(file).read_text())["address"]
        from training_functions import train_slowly

        seen = []

        def kill_first(spec, row):
            seen.append(spec)
            if len(seen) == 3:
                for pid in [nodes[0].pid, *workers(nodes[0].pid)]:
                    os.kill(pid, signal.SIGKILL)

        from gradmask.study.progress import Progress

        progress = Progress()
        progress.epoch = kill_first
        output = tmp_path / "out"
        results = compare(
            train_slowly, ARMS, range(3), output, scheduler=address, threads=1, progress=progress
        )
        assert timeless(results["runs"]) == alone
        assert nodes[0].wait(5) == -signal.SIGKILL
    finally:
        for process in [*nodes, scheduler]:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_scripts_without_a_guard_are_told(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from training_functions import train\nfrom gradmask.study import compare\n"
        f"compare(train, ['none'], [0], {str(tmp_path / 'out')!r}, jobs=2, threads=1)\n"
    )
    found = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120
    )
    assert "put what it does under `if __name__ == '__main__':`" in found.stderr
