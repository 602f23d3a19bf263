"""Every kernel with arguments that do not fit: each is refused, or done right; memory stays whole.

The C sources are built under AddressSanitizer, which ends the program at the first byte that is
read or written outside of a tensor.
"""

import json
import os
import shutil
import subprocess
import sys

import kernel_fuzzing
import pytest
from kernel_fuzzing import KERNELS


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Runs a program with the kernels built under AddressSanitizer."""
    compiler = shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no AddressSanitizer")
    # The second one for exceptions, which the first one asks it about.
    names = [[compiler, f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6")]
    runtimes = [subprocess.check_output(name, text=True).strip() for name in names]
    if not all(map(os.path.isabs, runtimes)):
        pytest.skip("no AddressSanitizer")
    folder = tmp_path_factory.mktemp("sanitized")
    script = folder / "compiler"
    script.write_text(f'#!/bin/sh\nexec {compiler} -fsanitize=address "$@"\n')
    script.chmod(0o755)
    environment = os.environ | {
        "CC": str(script),
        "GRADMASK_CACHE": str(folder),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "2",
    }

    def run(*words):
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def check(done, count):
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert sum(found.values()) == count
    for kernel in KERNELS:  # neither everything is refused, nor everything taken
        assert min(found[f"{kernel} {end}"] for end in ("refused", "right")) > count / 30, found


def test_arguments_that_do_not_fit(sanitized):
    check(sanitized(kernel_fuzzing.__file__, 0, 250), 250)


@pytest.mark.slow
def test_many_arguments_that_do_not_fit(sanitized):
    check(sanitized(kernel_fuzzing.__file__, 250, 10_000), 10_000)


WITHOUT_THE_GATE = """
import torch
from gradmask.kernels import keep_where, select
select.check_kept = lambda *columns: {"uint32_t": list(zip(*columns))}
keep_where([torch.zeros(1000)], [torch.zeros(900, dtype=torch.bool)])
"""


def test_the_sanitizer_sees_what_the_gate_keeps_out(sanitized):
    done = sanitized("-c", WITHOUT_THE_GATE)
    assert done.returncode
    assert "heap-buffer-overflow" in done.stderr
