"""Names of gradmask are imported when they are used, and are what they were."""

import ast
import inspect
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import gradmask
import gradmask.study

PACKAGES = ["gradmask", "gradmask.study"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_what_its_module_has(package):
    """What type checkers see and what is imported are written down twice: both must agree."""
    found = import_module(package)
    tree = ast.parse(Path(found.__file__).read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n))
    places = {a.name: n.module for n in block.body for a in n.names}
    assert set(found.__all__) - {"__version__"} == places.keys()
    assert set(found.__all__) <= set(dir(found))
    for name, module in places.items():
        assert getattr(found, name) is getattr(import_module(module), name)


@pytest.mark.parametrize(
    "code",
    [
        "gradmask.study.compare; gradmask.errors.OptionError; gradmask.FisherMask\n"
        "from gradmask import FisherMask; from gradmask.study import *; Diverged, Trial, compare",
        "from gradmask import *; SCORES, influence([], [], [])",
    ],
)
def test_ways_to_a_name(code):
    before = "import sys, gradmask, gradmask.study; assert 'torch' not in sys.modules\n"
    found = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True)
    if "influence" in code:  # called, and not a module
        assert "ModelError: Expected the model" in found.stderr
    else:
        assert found.returncode == 0, found.stderr


def test_influence_is_the_function_though_a_package_has_that_name():
    import gradmask.influence

    assert inspect.isfunction(gradmask.influence)
    assert inspect.ismodule(sys.modules["gradmask.influence"])


def test_unknown_names_are_attribute_errors():
    for package in (gradmask, gradmask.study):
        with pytest.raises(AttributeError, match=f"{package.__name__}.* 'FisherMusk'"):
            _ = package.FisherMusk
        assert not hasattr(package, "__wrapped__")


def test_classes_are_pickled_and_know_their_module():
    for value in (gradmask.FisherMask, gradmask.study.StudyOptions(train="a:b")):
        assert pickle.loads(pickle.dumps(value)) == value
    assert inspect.getmodule(gradmask.FisherMask) is sys.modules["gradmask.mask"]
    assert inspect.getmodule(gradmask.study.compare) is sys.modules["gradmask.study.comparison"]
