"""Several processes of which one is killed, or all: the others end, and the run goes on."""

import json
import random
import signal
import socket
import sys
import time

import killed_run
import pytest
import torch.distributed as dist
from checkpoints import TINY, assert_same_comparison, wait_until_it_trains

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        sys.platform == "win32" or not dist.is_available(), reason="needs torch.distributed"
    ),
]
WORDS = [word for word in TINY if "monitor" not in word]
LIMIT = 60  # seconds in which all must have ended


def start(server, folder, engine, moments=(None, None), counts_file=None):
    """Two processes as `torchrun` starts them; each kills itself at its moment, if it has one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [*WORDS, f"--engine={engine}", "--output", str(folder)]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    processes = [
        server.Process(
            target=killed_run.run,
            args=(
                words,
                moments[rank],
                counts_file and counts_file.with_suffix(f".{rank}"),
                shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            ),
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes):
    end = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert None not in codes, "a process waits for the one that was killed"
    return codes


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_killed_runs_end_with_the_same_bits(engine, server, tmp_path):
    whole, counts_file = tmp_path / "whole", tmp_path / "counts"
    assert finish(start(server, whole, engine)) == [0, 0]
    processes = start(server, tmp_path / "counted", engine, counts_file=counts_file)
    began = wait_until_it_trains(tmp_path / "counted")
    assert finish(processes) == [0, 0]
    duration = time.perf_counter() - began
    counts = [json.loads(counts_file.with_suffix(f".{r}").read_text()) for r in range(2)]
    assert set(counts[0]) == set(killed_run.KINDS)
    generator = random.Random(0)
    moments = [(rank, kind) for rank in range(2) for kind in sorted(counts[rank])]
    for number, (rank, kind) in enumerate([*moments * 3, *[(None, "time")] * 5]):
        folder = tmp_path / f"kill{number}"
        if kind == "time":  # a machine is lost, with all of its processes
            processes = start(server, folder, engine)
            wait_until_it_trains(folder)
            processes[0].join(generator.uniform(0.0, duration))
            for process in processes:
                process.kill()
            finish(processes)
        else:
            moment = (kind, generator.randint(1, counts[rank][kind]), generator.random())
            codes = finish(start(server, folder, engine, [moment, None][:: 1 - 2 * rank]))
            assert codes[rank] == -signal.SIGKILL
        assert finish(start(server, folder, engine)) == [0, 0]
        assert_same_comparison(folder, whole)
