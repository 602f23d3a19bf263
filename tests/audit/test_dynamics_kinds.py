"""`Dynamics` on ids, batches and states of other kinds."""

import pytest
import torch

from gradmask.audit import Dynamics
from gradmask.errors import DataError, GradmaskWarning, OptionError

IDS, LOGITS, TARGETS = torch.arange(3), torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.uint16])
def test_ids_of_other_kinds_are_of_the_same_samples(dtype):
    dynamics = Dynamics(300)
    dynamics.update(torch.tensor([50, 100, 120]).to(dtype), LOGITS, TARGETS)
    assert dynamics.scores()["visits"].nonzero().flatten().tolist() == [50, 100, 120]


@pytest.mark.parametrize(
    ("logits", "targets", "options"),
    [
        (torch.zeros(0, 4), torch.zeros(0).long(), {}),
        (torch.zeros(0, 5, 4), torch.zeros(0, 5).long(), {}),
        (torch.zeros(0, 5, 4), torch.zeros(0, 5).long(), {"positions": 5}),
        (torch.zeros(0, 4), torch.zeros(0, 4), {"multilabel": True}),
    ],
)
def test_empty_batches_count_for_nothing(logits, targets, options):
    dynamics = Dynamics(3, **options)
    dynamics.update(IDS[:0], logits, targets)
    assert dynamics.scores()["visits"].sum() == 0


def test_logits_beyond_single_precision_are_left_out():
    dynamics = Dynamics(3)
    dynamics.update(IDS, torch.eye(3).double() * 1e39, IDS)
    with pytest.warns(GradmaskWarning, match="not finite"):
        assert dynamics.scores()["visits"].sum() == 0


def test_classes_of_a_dimension_that_is_not_there_are_refused():
    with pytest.raises(DataError, match="class_dim=7"):
        Dynamics(3, class_dim=7).update(IDS, LOGITS, TARGETS)
    with pytest.raises(OptionError, match="class_dim"):
        Dynamics(3, class_dim=1.5)


def test_state_of_numpy_sizes_can_be_loaded(tmp_path):
    numpy = pytest.importorskip("numpy")
    state = Dynamics(numpy.int64(3), positions=numpy.int64(2)).state_dict()
    torch.save(state, tmp_path / "state.pt")
    Dynamics(3, positions=2).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
