"""Runs of a study on many workers: dask.distributed starts them, feeds them and mourns them.

Each worker is a process with a share of the cores and a GPU of its own. A worker that dies costs
the step it was at: its run is given to another, which goes on from the run's checkpoint. With the
address of a scheduler the workers are those of a cluster (Slurm, SSH, Kubernetes).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from gradmask.errors import GradmaskError, OptionError, TrialError
from gradmask.study.results import Row
from gradmask.study.spec import Spec

if TYPE_CHECKING:
    from distributed import Client

# Trains one run in its folder, and tells each epoch's row.
Work = Callable[[Spec, Path, Callable[[Row], None]], Row]
_TOPIC = "gradmask-epochs"
_CORES = "GRADMASK_CORES"
_GUARD = "Workers import the script again: put what it does under `if __name__ == '__main__':`."
_DEATHS = 3  # of workers at the same run, after which the run is to blame


def execute(
    work: Work,
    runs: Sequence[tuple[Spec, Path]],
    on_epoch: Callable[[Spec, Row], None],
    *,
    jobs: int = 1,
    threads: int | None = None,
    scheduler: str | None = None,
) -> Iterator[tuple[Spec, Row | TrialError]]:
    """Train runs, as many at a time as there are workers.

    Args:
        work: Trains one run; pickled by value with `jobs` or a scheduler.
        runs: Runs and their folders, in the order in which they are begun.
        on_epoch: Called with each row as it comes.
        jobs: Processes on this machine; 1 trains in this one.
        threads: CPU threads of each (default: an equal share of the cores).
        scheduler: Address of a dask scheduler, whose workers are used in place of processes here.

    Yields:
        Runs and their results, or why they failed, in the order in which they end.

    Raises:
        GradmaskError: If workers cannot be had.
    """
    if jobs == 1 and scheduler is None:
        for spec, directory in runs:
            try:
                yield spec, work(spec, directory, partial(on_epoch, spec))
            except TrialError as error:
                yield spec, error
        return
    import cloudpickle
    from distributed import KilledWorker, as_completed

    try:
        sent = cloudpickle.dumps(work)
    except Exception as error:  # what is within it may raise anything
        raise _not_sent(error) from error
    with _client(jobs, threads, scheduler) as client:
        specs = [spec for spec, _ in runs]
        client.subscribe_topic(_TOPIC, lambda event: on_epoch(specs[event[1][0]], event[1][1]))
        futures = {
            client.submit(_task, sent, index, *run, threads, pure=False, priority=-index): run[0]
            for index, run in enumerate(runs)
        }
        for future in as_completed(futures):
            spec = futures[future]
            try:
                yield spec, future.result()
            except TrialError as error:
                yield spec, error
            except KilledWorker:
                reason = f"{_DEATHS + 1} workers died at it: out of memory, perhaps"
                yield spec, TrialError(f"{spec.title}: {reason}. Use fewer jobs.")
            future.release()


def check_workers(jobs: int, scheduler: str | None) -> None:
    """Check that there can be workers, before anything is written.

    Raises:
        OptionError: If a worker is importing the script that asks for workers, or cannot.
        ImportError: If dask is not installed.
    """
    if jobs == 1 and scheduler is None:
        return
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise OptionError(_GUARD)
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is not None and scheduler is None and not Path(script).exists():
        raise OptionError(
            f"Workers import the script again, and {script!r} is no file: save it, or leave out "
            "jobs."
        )


def _not_sent(error: Exception) -> OptionError:
    return OptionError(
        f"The training function cannot be sent to workers ({type(error).__name__}: {error}): put "
        "it into a module that they can import, and let it make what it needs."
    )


def ship_module(function: Callable[..., Any]) -> None:
    """Let workers on other machines have the module of a function, which they may not have."""
    import cloudpickle

    module = sys.modules.get(function.__module__)
    if module is not None and module.__name__ != "__main__":  # that is sent in any case
        cloudpickle.register_pickle_by_value(module)


@contextmanager
def _client(jobs: int, threads: int | None, scheduler: str | None) -> Iterator[Client]:
    import dask
    from distributed import Client

    settings = {
        # Without dask's own MALLOC_TRIM_THRESHOLD_, by which every tensor's memory goes back to the
        # system at once: training took twice as long. Quiet: a worker's coming and going.
        "distributed.nanny.pre-spawn-environ": {"DASK_LOGGING__DISTRIBUTED": "critical"},
        "distributed.worker.profile.enabled": False,
        "distributed.worker.daemon": False,  # runs may start data loaders
        "distributed.worker.multiprocessing-method": "spawn",
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": False,
        "distributed.scheduler.allowed-failures": _DEATHS,
        "distributed.admin.log-length": 100,
    }
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with dask.config.set(settings):
        if scheduler is not None:
            try:
                client = Client(scheduler, timeout="30s")
            except (OSError, ValueError) as error:
                raise OptionError(f"scheduler={scheduler!r} cannot be reached: {error}") from error
            with client:
                yield client
            return
        try:
            with _interrupts_later():
                cluster = _local(jobs, threads)
        except RuntimeError as error:
            raise GradmaskError(f"Workers cannot be started ({error}). {_GUARD}") from error
        with cluster, Client(cluster) as client:
            yield client


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Let an interrupt wait while workers start, which inherit that it is none of theirs."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # it lets interrupts through again as it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _local(jobs: int, threads: int | None) -> Any:
    """Processes of this machine, each with cores and a GPU of its own."""
    from distributed import Nanny, Scheduler, SpecCluster

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    devices = (os.environ.get("CUDA_VISIBLE_DEVICES") or "").split(",")
    if torch.cuda.is_available() and devices == [""]:
        devices = [str(i) for i in range(torch.cuda.device_count())]
    workers = {}
    for index in range(jobs):
        share = cores[index * len(cores) // jobs : (index + 1) * len(cores) // jobs]
        environment = {_CORES: ",".join(map(str, share)) if jobs <= len(cores) else ""}
        if torch.cuda.is_available():
            environment["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]
        options = {"nthreads": 1, "env": environment, "host": "127.0.0.1", "dashboard": False}
        workers[index] = {"cls": Nanny, "options": options}
    hidden = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": ":0"}
    return SpecCluster(
        workers=workers, scheduler={"cls": Scheduler, "options": hidden}, silence_logs=50
    )


def _task(sent: bytes, index: int, spec: Spec, directory: Path, threads: int | None) -> Row:
    """What a worker does: one run, with no other process in its folder."""
    from distributed import get_worker

    cores = [int(core) for core in os.environ.get(_CORES, "").split(",") if core]
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads or max(1, len(cores)))
    worker = get_worker()
    try:
        work = pickle.loads(sent)  # not by dask, which tries for ever what it cannot
    except Exception as error:  # of the user's module
        raise _not_sent(error) from error

    def tell(row: Row) -> None:
        worker.log_event(_TOPIC, (index, row))

    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / ".lock"):  # of one that was given up, and is still alive
        found: Row = work(spec, directory, tell)
        return found
