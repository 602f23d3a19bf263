import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "gradmask"

# A module may import from those before it only; `experiments` and what follows it, from anything
# public. The foundations at the front know nothing of the rest.
ORDER = ["errors", "seeding", "parameters", "fisher", "selection", "mask"]
OUTSIDE = ["experiments", "benchmarks", "cli"]
HEAVY = {
    "torchvision",
    "sklearn",
    "datasets",
    "matplotlib",
    "numpy",
    "scipy",
    "rich",
    "jsonargparse",
}


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE).with_suffix("").parts, path


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize(
    ("parts", "path"), list(modules()), ids=lambda v: ".".join(v) if isinstance(v, tuple) else ""
)
def test_imports_go_one_way(parts, path):
    part = parts[0]
    assert part in [*ORDER, *OUTSIDE, "__init__"], f"{part} has no place in the order"
    for name in imported(path):
        inner = name.split(".")[1] if name.startswith("gradmask.") else None
        if part in ORDER:
            assert name.split(".")[0] not in HEAVY, f"the core imports {name}"
            assert name != "gradmask"
            if inner is not None and inner != part:
                assert inner in ORDER[: ORDER.index(part)], f"{part} imports {name}"


def test_core_is_light():
    code = f"import sys, gradmask; print({HEAVY - {'numpy'}} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
