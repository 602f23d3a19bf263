"""Dynamics in the Trainer on two processes, started by torchrun: `... FOLDER`."""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from trainer_recording import assert_scores, watched
from trainer_runs import assert_same, samples, trainer, weights

from gradmask.audit import Dynamics
from gradmask.errors import GradmaskWarning
from gradmask.integrations.transformers import DynamicsCallback


class Noted:
    """Stands in for dynamics: keeps what a rank would update them with."""

    def __init__(self):
        self.updates = []

    def update(self, *values):
        self.updates.append([value.detach() for value in values])


def main(folder):
    options = {
        "save_strategy": "steps", "save_steps": 4, "max_steps": 8, "data": samples(24),
        "per_device_train_batch_size": 2, "ddp_find_unused_parameters": False,
    }  # fmt: skip
    host, dynamics = watched(folder, {}, **options)
    host.expected = Noted()
    host.train()
    assert isinstance(host.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, host.expected.updates)
    alone = Dynamics(24, group=dist.new_group([dist.get_rank()]))
    for updates in zip(*every, strict=True):  # of all ranks, in each step
        for values in updates:
            alone.update(*values)
    assert alone.scores()["visits"].sum() == 8 * 2 * 2
    assert_scores(dynamics.dynamics, alone)
    dist.barrier()

    other = trainer(folder, **options)  # from within an epoch of 6 steps
    going = DynamicsCallback.attach(other)
    other.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert_scores(going.dynamics, alone)
    assert_same(weights(other), weights(host))


if __name__ == "__main__":
    warnings.simplefilter("error", GradmaskWarning)
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
