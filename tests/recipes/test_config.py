import math

import pytest

from gradmask.errors import OptionError
from gradmask.recipes.config import Comparison


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("keep", 0.0),
        ("keep", 1.5),
        ("arms", ("none", "fishes")),
        ("arms", ()),
        ("seeds", (1, 1)),
        ("epochs", 0),
        ("train_size", 0),
        ("label_noise", 1.1),
        ("validation", 0.0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("momentum", -0.1),
        ("momentum", 1.0),
        ("momentum", math.nan),
        ("weight_decay", -1e-4),
        ("weight_decay", math.inf),
        ("weight_decay", math.nan),
    ],
)
def test_bad_option_is_named(option, value):
    with pytest.raises(OptionError, match=option.rstrip("s")):
        Comparison(**{option: value})


def test_unknown_arm_names_the_nearest():
    with pytest.raises(OptionError, match="Did you mean 'fisher'"):
        Comparison(arms=("fishes",))
