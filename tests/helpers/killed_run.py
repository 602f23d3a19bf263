"""`gradmask run` in a process of its own that kills itself at a chosen moment, for its tests."""

import contextlib
import io
import json
import os
import signal
from collections import Counter

import torch

from gradmask import cli
from gradmask import scoring as scoring_module
from gradmask.cli import run as cli_run
from gradmask.recipes.data import batches as batches_module
from gradmask.study.log import RunLog

# What is counted: batches begun, batches read by a Fisher pass, files of tensors written, files
# renamed (before each), lines of the log written.
KINDS = ("batch", "fisher", "write", "rename", "line")


def run(words, moment=None, counts_file=None, environment=None):
    """Run the command line; `moment` is a kind, its number, and the share written by then."""
    os.environ.update(environment or {})
    kind, number, share = moment or (None, 0, 0.0)
    counts = Counter()

    def reached(this):
        counts[this] += 1
        return this == kind and counts[this] == number

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def batch(*args, original=batches_module.augment_batch):
        if reached("batch"):
            die()
        return original(*args)

    def fisher(model, loader, original=scoring_module.fisher_diagonal, **options):
        def batches():
            for batch in loader:
                if reached("fisher"):
                    die()
                yield batch

        return original(model, batches(), **options)

    def save(value, file, original=torch.save, **options):
        if options:  # to pickle a tensor for another process
            original(value, file, **options)
            return
        buffer = io.BytesIO()
        original(value, buffer)
        whole = buffer.getvalue()
        if reached("write"):
            file.write(whole[: int(share * len(whole))])
            file.flush()
            die()
        file.write(whole)

    def rename(source, target, original=os.replace):
        if reached("rename"):
            die()
        original(source, target)

    def line(self, row, original=RunLog.write):
        if reached("line"):
            whole = json.dumps(row).encode()
            self._file.write(whole[: int(share * len(whole))])
            self._file.flush()
            die()
        original(self, row)

    batches_module.augment_batch, scoring_module.fisher_diagonal = batch, fisher
    torch.save, os.replace, RunLog.write = save, rename, line
    cli_run.show = lambda *_: 0  # the report is no part of these tests
    with contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(words)
    if counts_file is not None:
        counts_file.write_text(json.dumps(counts))
    raise SystemExit(status)
