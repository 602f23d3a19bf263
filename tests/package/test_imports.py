import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "gradmask"

# A part may import from those before it only; the parts on top, the core through its public names
# and these foundations.
CORE = [
    "errors",
    "extras",
    "tensor_files",
    "named",
    "interrupts",
    "lazy",
    "containers",
    "seeding",
    "parameters",
    "distributed",
    "preserve",
    "loaders",
    "measuring",
    "kernels",
    "fisher",
    "influence",
    "monitor",
    "selection",
    "unlearning",
    "scores",
    "scoring",
    "mask_state",
    "averaging",
    "collect",
    "mask_files",
    "attach",
    "watch",
    "steps",
    "mask_warnings",
    "mask_source",
    "mask",
    "__init__",
]
TOP = ["study", "audit", "integrations", "recipes", "benchmarks", "cli", "__main__"]
PUBLIC = ["__init__", "lazy", "errors", "extras", "tensor_files", "named", "interrupts", "seeding"]
PUBLIC += ["distributed", "loaders"]
HEAVY = {
    "distributed",
    "torchvision",
    "sklearn",
    "datasets",
    "matplotlib",
    "scipy",
    "rich",
    "cyclopts",
}


def allowed(part):
    if part in CORE:
        return [*CORE[: CORE.index(part)], part]
    # Whose parts benchmarks compare; a control hooks the optimizers that a mask would.
    # An audit measures gradients as they are measured.
    inner = {
        "benchmarks": ["fisher", "kernels", "averaging"],
        "study": ["attach"],
        "audit": ["measuring"],
    }.get(part, [])
    others = [top for top in TOP[: TOP.index(part)] if (part, top) != ("recipes", "integrations")]
    return [*PUBLIC, *inner, *others, part]


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE).with_suffix("").parts, path


def imported(tree):
    """Full names of the modules that are imported, at the top or inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the direction"
            # `from gradmask import mask` may name a module as well.
            parts = {".".join(parts[:1]) for parts, _ in modules()}
            for alias in node.names:
                inner = node.module == "gradmask" and alias.name in parts
                yield f"gradmask.{alias.name}" if inner else node.module


def part_of(name):
    """The part of gradmask that a module belongs to, or None if it is not of gradmask."""
    first, _, rest = name.partition(".")
    return (rest.split(".")[0] or "__init__") if first == "gradmask" else None


@pytest.mark.parametrize(
    ("parts", "path"), list(modules()), ids=lambda v: ".".join(v) if isinstance(v, tuple) else ""
)
def test_imports_go_one_way(parts, path):
    part = parts[0]
    assert part in [*CORE, *TOP], f"{part} has no place in the order"
    for name in imported(ast.parse(path.read_text())):
        inner = part_of(name)
        if inner is not None:
            assert inner in allowed(part), f"{part} imports {name}"
        elif part in CORE:
            package = name.split(".")[0]
            own = {"triton_products.py": {"triton"}, "tensor_files.py": {"safetensors"}}
            own = own.get(path.name, set())
            assert package in {"torch", *own, *sys.stdlib_module_names}, f"the core imports {name}"


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import gradmask.mask", ["gradmask.mask"]),
        ("from gradmask import mask, FisherMask", ["gradmask.mask", "gradmask"]),
        ("def f():\n    from gradmask.fisher.rules import x", ["gradmask.fisher.rules"]),
    ],
)
def test_imports_are_found(code, names):
    assert list(imported(ast.parse(code))) == names


def test_core_is_light():
    code = (
        "import sys, gradmask\n"
        f"tops = [f'gradmask.{{name}}' for name in {TOP}]\n"
        f"print(({HEAVY} | set(tops)) & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


FACTORIES = {
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "tensor", "zeros"),
    *("rand", "randint", "randn", "randperm"),
}


def test_every_new_tensor_says_where():
    """PyTorch's default device is the user's: ours must not follow it."""
    silent = []
    for (part, *_), path in modules():
        for node in (
            ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if part not in TOP else ()
        ):
            function = getattr(node, "func", None)
            if (
                isinstance(function, ast.Attribute)
                and ast.unparse(function.value) == "torch"
                and function.attr in FACTORIES
                and not any(keyword.arg in ("device", None) for keyword in node.keywords)
            ):
                silent.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not silent, "\n".join(silent)
