"""Runs that are killed end with the same bits."""

import json
import random
import signal
import time

import killed_run
import pytest
from checkpoints import (
    TINY,
    assert_same_comparison,
    wait_until_it_trains,
)


def start(server, folder, *more):
    command = [*TINY, "--output", str(folder)]
    process = server.Process(target=killed_run.run, args=(command, *more))
    process.start()
    return process


def finish(process):
    process.join(120)
    return process.exitcode


def kill_and_compare(server, kills, tmp_path):
    whole = tmp_path / "whole"
    assert finish(start(server, whole)) == 0  # once, so that what is slow the first time is over
    counts_file = tmp_path / "counts.json"
    process = start(server, tmp_path / "counted", None, counts_file)
    began = wait_until_it_trains(tmp_path / "counted")
    assert finish(process) == 0
    duration = time.perf_counter() - began
    counts = json.loads(counts_file.read_text())
    assert counts.keys() == set(killed_run.KINDS)
    generator = random.Random(0)
    kinds = ["time", *killed_run.KINDS]
    for number in range(kills):
        folder = tmp_path / f"kill{number}"
        kill(server, folder, kinds[number % len(kinds)], counts, duration, generator)
        assert finish(start(server, folder)) == 0
        assert_same_comparison(folder, whole)


def kill(server, folder, kind, counts, duration, generator):
    if kind != "time":
        moment = (kind, generator.randint(1, counts[kind]), generator.random())
        assert finish(start(server, folder, moment)) == -signal.SIGKILL
        return
    while True:  # under load a moment may come after the end: then an earlier one
        process = start(server, folder)
        wait_until_it_trains(folder)
        process.join(generator.uniform(0.0, duration))
        process.kill()
        if finish(process) == -signal.SIGKILL:
            return
        duration /= 2
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(server, tmp_path):
    kill_and_compare(server, 5, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_killed_runs_end_with_the_same_bits(server, tmp_path):
    kill_and_compare(server, 50, tmp_path)
