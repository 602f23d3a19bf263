"""`python -m gradmask.cli`, which is also what `torchrun` starts."""

import os
import sys

from gradmask.cli import main

status = main()
if os.environ.get("WORLD_SIZE", "1") != "1":
    # Gloo's threads outlive the process group and may let go of their last tensors while Python
    # shuts down, which aborts a process whose work is done (PyTorch pull request 179291).
    os._exit(status)
sys.exit(status)
