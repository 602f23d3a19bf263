"""Which training samples a network memorises: audit by what training itself says."""

from gradmask.audit.dynamics import Dynamics
from gradmask.audit.gradients import gradient_scores
from gradmask.audit.indexed import Indexed
from gradmask.audit.planted import Planted, plant
from gradmask.audit.rank import Ranking, rank
from gradmask.audit.scores import SCORES, Score

__all__ = [
    "SCORES",
    "Dynamics",
    "Indexed",
    "Planted",
    "Ranking",
    "Score",
    "gradient_scores",
    "plant",
    "rank",
]
