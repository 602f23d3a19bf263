import processes
import pytest


@pytest.fixture(scope="module")
def server():
    return processes.server()
