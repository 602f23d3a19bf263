"""What several ranks note is what one process would have noted."""

import pytest
import torch
from processes import run_processes

from gradmask.audit import Dynamics
from gradmask.errors import StateError

SAMPLES = 40


def batches(rank, world):
    """Each epoch in another order, parts of unlike size, one rank without an update at times."""
    for epoch in range(9):
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(SAMPLES, generator=generator)
        logits = torch.randn(SAMPLES, 4, generator=generator)
        for step, ids in enumerate(order.split(11)):
            mine = ids[rank::world][: 3 + rank]
            if not (rank == 1 and step == 2):
                yield epoch, step, mine, logits[mine], mine % 4


def check(rank, world):
    dynamics, last = Dynamics(SAMPLES), 0
    for epoch, _, *batch in batches(rank, world):
        if epoch != last:
            dynamics.gather()
            last = epoch
        dynamics.update(*batch)
    with pytest.raises(StateError, match="gather"):
        dynamics.scores()
    with pytest.raises(StateError, match="gather"):
        dynamics.state_dict()
    dynamics.gather()
    if rank == 2:  # as one process would have seen all updates
        from unittest import mock

        with mock.patch("torch.distributed.is_initialized", return_value=False):
            alone = Dynamics(SAMPLES)
            every = [list(batches(r, world)) for r in range(world)]
            for epoch in range(9):
                rounds = [[b for b in part if b[0] == epoch] for part in every]
                for place in range(max(map(len, rounds))):
                    for part in rounds:
                        if place < len(part):
                            alone.update(*part[place][2:])
            expected = alone.state_dict()
        found = dynamics.state_dict()
        for name in ("counts", "sums", "probability", "votes", "margins", "last_loss"):
            assert torch.equal(found[name][:-1], expected[name][:-1]), name
        assert dynamics.scores()["visits"].sum() > 200


def test_ranks_together_have_what_one_process_has(tmp_path):
    run_processes(check, 3, tmp_path)
