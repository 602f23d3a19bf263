import multiprocessing

import pytest


@pytest.fixture(scope="module")
def server():
    """It imports everything once, and forks a process for each command."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "gradmask.cli.run",
            "gradmask.recipes.compare",
            "gradmask.recipes.theorem.run",
            "yaml",
            "sklearn.datasets",
            "tensorboard.compat.proto.event_pb2",
        ]
    )
    return context
