"""Every script of examples/ runs as its first lines say."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def absent(path):
    """Packages that a script imports and that are not installed."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        found |= {name.partition(".")[0] for name in names}
    return sorted(name for name in found if importlib.util.find_spec(name) is None)


def run(path, folder, *arguments):
    """What a script prints."""
    start = [sys.executable]
    if "torchrun" in path.name:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*start, str(path), *arguments],
        cwd=folder,
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow  # what the pages in docs/start have runs always
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_examples_run(path, tmp_path):
    if absent(path):
        pytest.skip(f"needs {', '.join(absent(path))}")
    printed = run(path, tmp_path)
    assert printed.strip()
    accuracies = re.findall(r"accuracy (\d\.\d+)", printed)
    if accuracies:
        assert float(accuracies[-1]) > 0.8
    assert not list(tmp_path.iterdir()), "an example leaves files where it is run"


@pytest.mark.slow
def test_the_loop_with_accelerate_goes_on(tmp_path):
    path = ROOT / "examples" / "accelerate_loop.py"
    if absent(path):
        pytest.skip("needs accelerate")
    folder = tmp_path / "state"
    assert len(run(path, tmp_path, "--checkpoint", str(folder)).splitlines()) == 5
    assert not run(path, tmp_path, "--checkpoint", str(folder))
