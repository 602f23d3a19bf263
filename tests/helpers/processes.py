"""Run a function in several processes that talk over gloo."""

import multiprocessing
import os
import sys
import traceback

import torch
import torch.distributed as dist

IMPORTED = [
    *("torch.distributed.fsdp", "torch.nn.parallel", "gradmask", "gradmask.cli.run", "pytest"),
    *("gradmask.recipes.compare", "gradmask.recipes.theorem.run", "sklearn.datasets"),
    *("tensorboard.compat.proto.event_pb2", "yaml"),
]


def server():
    """A context whose processes are forked from one that has imported everything, once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def _rank(function, rank, world, folder, failures, environment, args):
    os.chdir(environment.pop("PWD"))
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    status = 0
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
        )
        function(rank, world, *args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        failures.put(f"rank {rank}:\n{traceback.format_exc()}")
        status = 1
    # Not through Python's shutdown, in which gloo's threads may abort: see `gradmask.cli.__main__`.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_processes(function, world, folder, *args, expected=None, limit=120):
    """Run `function(rank, world, *args)` in `world` processes and wait for them.

    `expected` gives the exit codes where they are not all 0.
    """
    context = server()
    failures = context.SimpleQueue()
    environment = os.environ | {"PWD": os.getcwd()}  # as it is now, not when the server began
    given = world, folder, failures, environment, args
    processes = [context.Process(target=_rank, args=(function, r, *given)) for r in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(limit)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    found = []
    while not failures.empty():
        found.append(failures.get())
    assert codes == (expected or [0] * world), "\n".join(found) or f"exit codes {codes}"
    return found
