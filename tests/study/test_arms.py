import pytest
import torch

from gradmask.errors import OptionError
from gradmask.recipes.config import Comparison
from gradmask.recipes.data.images import load_images
from gradmask.recipes.training.components import new_mask, new_model
from gradmask.study.arms import arm_title, controls, parse_arm
from gradmask.study.folder import run_directory
from gradmask.study.spec import Spec


def test_an_arm_changes_its_own_options():
    config = Comparison(keep=0.5, arms=("none", "random:keep=0.25:scope=update"))
    arm = config.for_arm(config.arms[1])
    assert (arm.keep, arm.scope, arm.labels) == (0.25, "update", "given")
    assert (config.keep, config.scope) == (0.5, "gradient")
    data = load_images(config, 0)
    mask = new_mask(config, new_model(config, data, 0), config.arms[1], 0)
    assert (mask.keep, mask.scope, mask.strategy) == (0.25, "update", "random")
    assert new_mask(config, new_model(config, data, 0), "none:labels=random", 0) is None


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("fischer", "Unknown arm 'fischer'. Did you mean 'fisher'"),
        ("fisher:kepe=0.5", "Unknown option of arm 'fisher:kepe=0.5', 'kepe'. Did you mean 'keep'"),
        ("fisher:keep=half", "keep='half' is not a number"),
        ("fisher:keep=0", r"keep=0.0 must be in \(0, 1\]"),
        ("fisher:scope=all", "Unknown scope 'all'"),
        ("none:labels=wrong", "Unknown labels 'wrong'"),
        ("none:keep=0.5", "keep has no meaning for no mask: it is an option of fisher"),
        ("sam:scope=update", "scope has no meaning for SAM"),
        ("fisher:rho=0.1", "rho has no meaning for Fisher mask"),
        ("sam:rho=0", "rho=0.0 must be positive"),
        ("fisher:score=snap", "Unknown score 'snap'. Did you mean 'snip'"),
        ("fisher:which=most", "Unknown which 'most'"),
        ("random:per=layer", "Unknown per 'layer'"),
        ("random:score=snip", "score has no meaning for random mask"),
        ("inverse:which=lowest", "which has no meaning for inverse mask"),
        ("fisher:average=1", r"average='1' must be in \[0, 1\)"),
    ],
)
def test_arms_that_cannot_work(arm, message):
    with pytest.raises(OptionError, match=message):
        Comparison(arms=(arm,))


def test_an_arm_written_in_two_ways_is_one():
    with pytest.raises(OptionError, match=r"'fisher:keep=0.5' and 'fisher:keep=0.50' are the same"):
        Comparison(arms=("none", "fisher:keep=0.5", "fisher:keep=0.50"))


def test_titles():
    assert arm_title("fisher:keep=0.7:scope=update") == "Fisher mask, keep 0.7, scope update"
    assert arm_title("none:labels=random") == "no mask, random labels"


def test_masks_are_judged_against_others_with_the_same_options():
    names = [
        "none",
        "none:labels=random",
        "fisher:keep=0.7",
        "random:keep=0.7",
        "random:keep=0.3",
        "inverse",
        "fisher:labels=random",
        "inverse:labels=random",
    ]
    assert controls("fisher:keep=0.7", names) == ["none", "random:keep=0.7"]
    assert controls("fisher:labels=random", names) == [
        "none:labels=random",
        "inverse:labels=random",
    ]
    assert parse_arm("fisher:keep=0.7").baseline == "none"


def test_every_arm_has_a_folder_of_its_own(tmp_path):
    assert run_directory(tmp_path, Spec("fisher:keep=0.7", 3)).name == "fisher-keep=0.7-seed3"


def test_random_labels_are_drawn_from_all_classes_once_per_seed():
    config = Comparison(labels="random")
    data = load_images(config, 0)
    assert torch.equal(data.train_labels, load_images(config, 0).train_labels)
    assert not torch.equal(data.train_labels, load_images(config, 1).train_labels)
    agreeing = (data.train_labels == data.train_clean_labels).float().mean().item()
    assert agreeing == pytest.approx(0.1, abs=0.04)
    assert data.train_labels.bincount().min() > 60
    given = load_images(Comparison(), 0)
    assert torch.equal(given.train_labels, data.train_clean_labels)
    with pytest.raises(OptionError, match="label_noise has no meaning with labels='random'"):
        Comparison(labels="random", label_noise=0.1)


def test_matched_controls_are_those_of_the_same_score():
    method = "fisher:score=snip:which=lowest"
    matched = "random_matched:score=snip:which=lowest", "slow_matched:score=snip:which=lowest"
    others = "random_matched", "random_matched:score=snip", "slow_matched", "fisher"
    assert controls(method, ["none", "random", "slow", *matched, *others]) == [
        *("none", "random", "slow"),
        *matched,
    ]
    assert controls("fisher", ["random_matched", matched[0]]) == ["random_matched"]


def test_scores_of_arms_reach_the_mask():
    config = Comparison(arms=("none", "fisher:score=magnitude:which=lowest:per=tensor"))
    data = load_images(config, 0)
    mask = new_mask(config, new_model(config, data, 0), config.arms[1], 0)
    assert (mask.score, mask.which, mask.per) == ("magnitude", "lowest", "tensor")
    assert arm_title(config.arms[1]) == "Fisher mask, by magnitude, lowest values, of each tensor"
