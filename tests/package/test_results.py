"""The index of results says what made each of them."""

import json
import re
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "results"


def commits_in(found):
    """Commits that a file of results names, wherever they stand."""
    items = found.values() if isinstance(found, dict) else found if isinstance(found, list) else []
    own = {found["commit"]} if isinstance(found, dict) and found.get("commit") else set()
    return own.union(*map(commits_in, items))


def test_every_folder_has_its_row_and_every_row_its_commits():
    rows = dict(
        re.findall(r"^\| \[(\S+)\]\(\1\) (.*)\|$", (RESULTS / "README.md").read_text(), re.M)
    )
    assert rows.keys() == {path.name for path in RESULTS.iterdir() if path.is_dir()}
    for name, row in rows.items():
        assert (RESULTS / name / "README.md").exists()
        files = list((RESULTS / name).rglob("*.json"))
        made = set().union(*(commits_in(json.loads(path.read_text())) for path in files))
        assert made == set(re.findall(r"\b[0-9a-f]{7}(?:-dirty)?(?=[ ,])", row)) or not files
