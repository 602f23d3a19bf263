"""What is released: built from the tree, installed, used and type-checked by others."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src" / "gradmask"
USE = """
import torch, gradmask
model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(64, 3))
data = [(torch.randn(8, 1, 6, 6), torch.randint(3, (8,)))]
mask = gradmask.FisherMask(model, keep=0.5)
mask.refresh(data)
assert sum(int(m.sum()) for m in mask.masks.values()) == (4 * 9 + 4 + 3 * 64 + 3 + 1) // 2
from gradmask.kernels import can_add_squared_products
print(gradmask.__file__, can_add_squared_products(torch.zeros(1)))
"""
TYPED = """
import torch
from torch.utils.data import DataLoader
import gradmask
from gradmask import FisherMask, fisher_diagonal
from gradmask.study import Trial, compare

model = torch.nn.Linear(3, 2)
loader: DataLoader[tuple[torch.Tensor, torch.Tensor]]
reveal_type(FisherMask(model, keep=0.5))
reveal_type(fisher_diagonal(model, loader))
reveal_type(gradmask.SCORES["snip"].formula)

def train(trial: Trial) -> None:
    mask = trial.mask(model, torch.optim.SGD(model.parameters(), 0.1))
    reveal_type(mask.refresh)
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The wheel and the sdist."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(released, tmp_path_factory):
    """Runs Python where the wheel is installed, and everything else but the tree."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = [*folder.glob("lib/python*/site-packages"), *folder.glob("Lib/site-packages")]
    zipfile.ZipFile(released[0]).extractall(site)
    # No .pth of that folder is read, so that an editable installation is not found there.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = next(p for p in folder.glob("*/python*") if p.stem == "python")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}

    def run(*words, **variables):
        command = [str(python), *map(str, words)]
        cache = {"GRADMASK_CACHE": str(folder / "cache")}
        return subprocess.run(
            command, cwd=folder, env=environment | cache | variables, capture_output=True, text=True
        )

    return run, site


def test_kernels_and_types_are_in_both(released):
    with zipfile.ZipFile(released[0]) as one, tarfile.open(released[1]) as other:
        wheel, sdist = one.namelist(), other.getnames()
    for path in (*SOURCES.rglob("*.c"), *SOURCES.rglob("*.j2"), SOURCES / "py.typed"):
        name = path.relative_to(SOURCES.parent).as_posix()
        assert name in wheel
        assert any(found.endswith(f"/src/{name}") for found in sdist)
    assert any(name.endswith("LICENSE") for name in wheel)
    assert not [name for name in wheel if name.startswith(("tests", "docs"))]
    for name in ("README.md", "CHANGELOG.md", "tests/conftest.py", "Makefile"):
        assert any(found.endswith(f"/{name}") for found in sdist)


@pytest.mark.parametrize("kernels", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_it_runs_where_it_is_installed(installed, kernels):
    run, site = installed
    done = run("-c", USE, GRADMASK_KERNELS=kernels)
    assert done.returncode == 0, done.stderr
    place, compiled = done.stdout.split()
    assert Path(place).is_relative_to(site)
    if kernels == "0":
        assert compiled == "False"


@pytest.mark.slow
def test_who_uses_it_has_its_types(installed, tmp_path):
    run, _ = installed
    (tmp_path / "user.py").write_text(TYPED)
    check = "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache"
    done = run(*check, tmp_path / "user.py")
    assert done.returncode == 0, done.stdout
    mask, fisher, formula, refresh = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert mask.endswith("FisherMask")
    assert re.fullmatch(r"(\w+\.)*dict\[(\w+\.)*str, (\w+\.)*Tensor\]", fisher)
    assert formula.split(".")[-1] == "str"
    assert "Iterable" in refresh
    (tmp_path / "user.py").write_text(f"{TYPED}\nFisherMask(model, keep='much')\n")
    assert 'incompatible type "str"' in run(*check, tmp_path / "user.py").stdout
