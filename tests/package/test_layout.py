"""The tests' own house: it mirrors the source's, in files that can be read at once."""

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
SOURCE = TESTS.parent / "src" / "gradmask"
ACROSS = {"helpers", "docs", "faults", "package"}  # about no single part
FILES = sorted(TESTS.rglob("*.py"))


def test_folders_are_those_of_the_source():
    folders = {path.parent.relative_to(TESTS) for path in FILES}
    assert not {path for path in folders if path.parts and path.parts[0] not in ACROSS} - {
        path.parent.relative_to(SOURCE) for path in SOURCE.rglob("*.py")
    }


def test_files_are_short_and_share_what_is_in_helpers():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        tree = ast.walk(ast.parse(text))
        imported = {node.module or "" for node in tree if isinstance(node, ast.ImportFrom)}
        assert not {name for name in imported if name.startswith("test_")}, path
