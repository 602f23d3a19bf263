"""Files that are cut, flipped, swapped, or of a wrong kind.

Every fault ends in a named error that names the file, or is recovered from; nothing is lost.
"""

import pickle
import random
import shutil
from functools import cache

import pytest
from corruption import KINDS, READ, corrupt, go_on, hole, load_shards, make, save_in_shards
from matplotlib.figure import Figure

from gradmask.errors import StateError
from gradmask.recipes.audit import run as audit_module
from gradmask.recipes.data import sources
from gradmask.recipes.theorem import report as theorem_report
from gradmask.study.report import page as study_page

FAULTS = 216
assert len(READ) * len(KINDS) <= FAULTS


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders, and what they give when they are whole."""
    root = tmp_path_factory.mktemp("made")
    return root, make(root)


@pytest.mark.filterwarnings("ignore")
def test_corrupted_files(made, tmp_path):
    with pytest.MonkeyPatch.context() as patch:  # what follows reading is in the long form
        patch.setattr(study_page, "to_files", lambda *_: {})
        patch.setattr(theorem_report, "draw", lambda _: Figure(figsize=(1, 1)))
        patch.setattr(audit_module, "detect", lambda *_: None)
        patch.setattr(sources, "load_digits", cache(sources.load_digits))
        found = corrupt(*made, tmp_path, FAULTS, 0)
    assert found.total() == FAULTS
    assert min(found["named"], found["recovered"]) > FAULTS // 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
def test_many_corrupted_files(made, tmp_path):
    found = corrupt(*made, tmp_path, 3000, 1)
    print(dict(found))
    assert found.total() == 3000


def test_hole_in_the_newest_checkpoint(made, tmp_path):
    """100 bytes cut out: the previous one is gone on from, to the same bits."""
    (root, whole), draw = made, random.Random(0)
    for number in range(5):
        folder = shutil.copytree(root / "stopped", tmp_path / f"{number}")
        file = folder / READ["checkpoint"][1]
        file.write_bytes(hole(file.read_bytes()[:-100], draw, None))
        with pytest.warns(UserWarning, match="going on from the checkpoint before it"):
            assert go_on(folder) == whole["checkpoint"]


class Harm:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_no_index_is_unpickled_that_the_sums_do_not_vouch_for(tmp_path):
    save_in_shards(tmp_path)
    index = tmp_path / READ["index of shards"][1]
    written = index.read_bytes()
    assert pickle.loads(written)  # or this test would be of no use
    harmed = tmp_path / "harmed"
    index.write_bytes(pickle.dumps(Harm(harmed)))
    with pytest.raises(StateError, match=r"\.metadata is damaged"):
        load_shards(tmp_path)
    index.write_bytes(written)
    other = index.with_name("other.distcp")
    other.write_bytes(pickle.dumps(Harm(harmed)))
    with pytest.raises(StateError, match=r"run\.pt is damaged"):
        load_shards(tmp_path)
    other.unlink()
    run = index.with_name("run.pt")
    run.write_bytes(pickle.dumps(Harm(harmed)))
    with pytest.raises(StateError, match=r"run\.pt is damaged"):
        load_shards(tmp_path)
    assert not harmed.exists()
    index.write_bytes(pickle.dumps(Harm(harmed)))
    pickle.loads(index.read_bytes()).close()
    assert harmed.exists()
