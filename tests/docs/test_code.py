"""Every Python block of the documentation runs, page by page, or says why it does not."""

import copy
import unittest

import lightning
import pytest
import torch
from pages import NAMES, ROOT, python, read
from setups import SETUPS, basics

import gradmask
from gradmask.fisher import rules

pytestmark = pytest.mark.cpu  # what pages make, they make there
CODE = [page for page in NAMES if "```python" in (ROOT / page).read_text(encoding="utf-8")]


@pytest.fixture
def as_it_was(monkeypatch, tmp_path, repeatable):
    """In an empty folder; scores, rules, process groups and types of the pages do not stay."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lightning, "Trainer", lightning.Trainer)
    scores, layers = dict(gradmask.SCORES), copy.copy(rules._RULES)
    yield
    for registry, before in ((gradmask.SCORES, scores), (rules._RULES, layers)):
        registry.clear()
        registry.update(before)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(page):
    """Run the code of a page; how many blocks ran, and why others did not."""
    ran, reasons = 0, []
    for example in read(page, python(SETUPS), __name__="__main__", **basics()).examples():
        try:
            example.evaluate()
        except unittest.SkipTest as skipped:
            reasons.append(str(skipped))
        else:
            ran += example.region.evaluator is not None and str(example.parsed).count("\n") > 0
    return ran, reasons


@pytest.mark.parametrize("page", CODE)
@pytest.mark.usefixtures("as_it_was")
def test_code_runs(page):
    run(ROOT / page)


PAGE = """
```python
a = 1
```
<!-- not run: it is wrong -->
```python
assert a == 2
```
"""


def test_marks_are_heeded(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert run(page) == (1, ["it is wrong"])
    page.write_text(PAGE.replace(": it is wrong", ""))
    with pytest.raises(AssertionError, match="reason"):
        run(page)
    page.write_text(PAGE.replace("<!-- not run: it is wrong -->", ""))
    with pytest.raises(AssertionError):
        run(page)
