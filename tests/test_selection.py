import math

import pytest
import torch

from gradmask import global_threshold, make_masks
from gradmask.errors import DataError, GradmaskWarning, OptionError
from gradmask.kernels import digits
from gradmask.selection import STRATEGIES, kept_count, kth_largest


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.rand(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


CASES = {
    "uniform": [rand(7, 5), rand(90, seed=1), rand(2, 3, 4, seed=2)],
    "float64": [rand(50, dtype=torch.float64), rand(3, 3, dtype=torch.float64, seed=1)],
    "float64 beyond float32": [1 + 1e-12 * rand(40, dtype=torch.float64)],
    "mixed types": [rand(9), rand(9, dtype=torch.float64, seed=1), rand(9, seed=2).half()],
    "half": [rand(100).bfloat16(), rand(30, seed=1).half()],
    "all zero": [torch.zeros(11), torch.zeros(2, 2)],
    "ties": [torch.tensor([3.0, 1, 1, 2]), torch.tensor([1.0, 1, 3, 0, 0])],
    "negative zero": [torch.tensor([-0.0, 0.0, 1.0]), torch.tensor([-0.0, 2.0])],
    "subnormal": [torch.tensor([1e-45, 2e-45, 0.0, 1e-38, 1e-40])],
    "float64 subnormal": [torch.tensor([5e-324, 1e-323, 0.0, 1e-310, 2e-308], dtype=torch.float64)],
    "float64 wide range": [10.0 ** torch.arange(-323, 309, 9, dtype=torch.float64)],
    "largest": [torch.tensor([torch.finfo(torch.float32).max, 0.0, 1.0])],
    "wide range": [10.0 ** torch.arange(-38, 38).float()],
    "empty among them": [torch.zeros(0), rand(5), torch.zeros(3, 0)],
    "scalars": [torch.tensor(2.0), torch.tensor(1.0), rand(3)],
    "strided": [rand(6, 8).t()[::2], rand(4, 4, seed=1)[:, 1]],
    "single": [torch.tensor([0.5])],
}


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_kth_largest_is_that_of_sorting(case, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(digits, "load", lambda *_, **__: None)
        monkeypatch.setattr(digits, "_CHUNK", 7)
    tensors = CASES[case]
    wide = any(t.dtype == torch.float64 for t in tensors)
    joined = torch.cat(
        [t.reshape(-1).to(torch.float64 if wide else torch.float32) for t in tensors]
    )
    ordered = joined.sort(descending=True).values
    for k in range(1, len(ordered) + 1):
        found = kth_largest(tensors, k)
        assert found.dtype == ordered.dtype
        assert found == ordered[k - 1]


LARGE = {
    "uniform": rand(3, 1 << 18, seed=5),
    "narrow": 1 + 1e-4 * rand(1 << 18, seed=6),
    "ties": (9 * rand(1 << 18, seed=7)).floor(),
    "zeros": rand(1 << 18, seed=8) * (rand(1 << 18, seed=9) > 0.5),
    "negative zeros": -0.0 * rand(1 << 18, seed=10),
    "float64": rand(1 << 17, dtype=torch.float64, seed=11).log().exp(),
}


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", LARGE)
def test_many_values(case, threads, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(digits, "load", lambda *_, **__: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    values = LARGE[case]
    ordered = values.flatten().sort(descending=True).values
    for k in (1, 2, 12345, values.numel() // 2, values.numel() - 1, values.numel()):
        assert kth_largest([values, *values[:0]], k) == ordered[k - 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, -math.inf])
def test_values_that_cannot_be_ordered(bad):
    fisher = {"a": torch.ones(70_000), "b": torch.tensor([1.0, bad])}
    for strategy in ("fisher", "random_matched", "inverse"):
        with pytest.raises(DataError, match="NaN, infinite or negative"):
            make_masks(fisher, 0.5, strategy=strategy, generator=seeded())
    with pytest.raises(DataError, match="NaN, infinite or negative"):
        global_threshold(fisher, 0.5)


def test_rank_must_exist():
    for k in (0, 4):
        with pytest.raises(DataError, match="largest of 3"):
            kth_largest([torch.ones(3)], k)
    with pytest.raises(DataError, match="of 0 values"):
        global_threshold({}, 0.5)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.0001, math.nan])
def test_keep_is_a_share(keep):
    for function in (global_threshold, make_masks):
        with pytest.raises(OptionError, match=r"must be in \(0, 1\]"):
            function({"a": torch.ones(3)}, keep)


@pytest.mark.parametrize(
    ("keep", "total", "count"),
    [
        (0.07, 100, 7),
        (0.55, 100, 55),
        (0.1, 30, 3),
        (0.25, 8, 2),
        (0.25, 9, 3),
        (1e-9, 5, 1),
        (1.0, 7, 7),
        (0.7, 10, 7),
        (0.3, 10, 3),
    ],
)
def test_count_is_the_ceiling_of_the_share_as_written(keep, total, count):
    assert kept_count({"a": torch.ones(total)}, keep) == count


@pytest.mark.parametrize("total", [1, 3, 7, 30, 64, 100, 999, 25_557_032])
def test_count_is_exact_for_every_percentage(total):
    values = torch.empty(total, device="meta")
    for percent in range(1, 101):
        assert kept_count({"a": values}, percent / 100) == -(-percent * total // 100)


FISHER = {
    "first.weight": torch.tensor([[9.0, 1.0], [4.0, 0.0]]),
    "first.bias": torch.tensor([7.0, 2.0]),
    "last.weight": torch.tensor([[3.0, 5.0]]),
}


def test_by_hand():
    # In order: 9 7 5 4 | 3 2 1 0. Half of 8 entries: the threshold is 4.
    assert global_threshold(FISHER, 0.5) == 4.0
    masks = make_masks(FISHER, 0.5)
    assert masks["first.weight"].tolist() == [[True, False], [True, False]]
    assert masks["first.bias"].tolist() == [True, False]
    assert masks["last.weight"].tolist() == [[False, True]]
    lowest = make_masks(FISHER, 0.5, strategy="inverse", generator=seeded())
    assert all(torch.equal(lowest[name], ~masks[name]) for name in masks)


def test_ties_at_the_threshold_are_kept():
    masks = make_masks({"a": torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])}, 0.4)
    assert masks["a"].tolist() == [True, True, True, True, False]


def test_threshold_of_zero_keeps_everything_and_says_so():
    fisher = {"a": torch.tensor([1.0, 0.0, 0.0, 0.0]), "b": torch.zeros(3)}
    with pytest.warns(GradmaskWarning, match="threshold at keep=0.5 is 0"):
        masks = make_masks(fisher, 0.5)
    assert all(mask.all() for mask in masks.values())
    make_masks({"a": torch.zeros(3)}, 1.0)  # keeping everything is what was asked for


@pytest.mark.parametrize(
    ("low", "high"), [(torch.float32, torch.float64), (torch.half, torch.float32)]
)
def test_threshold_is_not_rounded_to_the_precision_of_a_tensor(low, high):
    # In the lower precision 0.7 and 0.1 are smaller numbers, and would seem to reach the threshold.
    value = 0.7 if low == torch.float32 else 0.1
    fisher = {"a": torch.tensor([value], dtype=low), "b": torch.tensor([value], dtype=high)}
    assert global_threshold(fisher, 0.5) == fisher["b"]
    masks = make_masks(fisher, 0.5)
    assert (masks["a"].item(), masks["b"].item()) == (False, True)
    inverse = make_masks(fisher, 0.5, strategy="inverse", generator=seeded())
    assert (inverse["a"].item(), inverse["b"].item()) == (True, False)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_default_device_changes_nothing(strategy):
    fisher = random_fisher()
    expected = make_masks(fisher, 0.3, strategy=strategy, generator=seeded())
    with torch.device("meta"):
        masks = make_masks(fisher, 0.3, strategy=strategy, generator=seeded())
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


def random_fisher():
    shapes = {"conv": (8, 3, 3, 3), "norm": (8,), "head": (5, 40), "scalar": ()}
    # Few distinct values: ties everywhere.
    return {
        name: (rand(*shape, seed=i) * 10 * (i + 1)).round()
        for i, (name, shape) in enumerate(shapes.items())
    }


def counts(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


@pytest.mark.parametrize("keep", [0.05, 0.25, 0.5, 0.9, 1.0])
def test_sizes_of_the_controls(keep):
    fisher = random_fisher()
    ours = make_masks(fisher, keep)
    for strategy in STRATEGIES:
        masks = make_masks(fisher, keep, strategy=strategy, generator=seeded(3))
        assert masks.keys() == fisher.keys()
        for name, mask in masks.items():
            assert (mask.shape, mask.dtype) == (fisher[name].shape, torch.bool)
    random = make_masks(fisher, keep, strategy="random", generator=seeded(3))
    assert sum(counts(random).values()) == kept_count(fisher, keep)
    matched = make_masks(fisher, keep, strategy="random_matched", generator=seeded(3))
    assert counts(matched) == counts(ours)
    inverse = make_masks(fisher, keep, strategy="inverse", generator=seeded(3))
    assert sum(counts(inverse).values()) == sum(counts(ours).values())
    chosen = torch.cat([fisher[n][m] for n, m in inverse.items()])
    left = torch.cat([fisher[n][~m] for n, m in inverse.items()])
    assert not len(left) or chosen.max() <= left.min()


@pytest.mark.parametrize("options", [{"strategy": "inverse"}, {"which": "lowest"}])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_the_lowest_of_many_zeros(keep, options):
    fisher = {"a": torch.zeros(90), "b": torch.arange(1.0, 11.0)}
    masks = make_masks(fisher, keep, generator=seeded(0), **options)
    assert sum(counts(masks).values()) == kept_count(fisher, keep)
    assert not masks["b"].any()


@pytest.mark.parametrize("strategy", ["random", "random_matched", "inverse"])
def test_draws_are_fixed_by_the_generator_and_uniform(strategy):
    fisher = {"a": torch.ones(4), "b": torch.ones(6)}
    fisher["a"][0] = 2.0  # `fisher` keeps this one alone at keep 0.1
    options = {"strategy": strategy, "generator": None}
    with pytest.raises(OptionError, match="seeded generator"):
        make_masks(fisher, 0.1, **options)
    same = [make_masks(fisher, 0.1, strategy=strategy, generator=seeded(7)) for _ in range(2)]
    assert all(torch.equal(same[0][name], same[1][name]) for name in fisher)
    generator, hits = seeded(0), torch.zeros(10)
    for _ in range(600):
        masks = make_masks(fisher, 0.1, strategy=strategy, generator=generator)
        hits += torch.cat(list(masks.values()))
    expected = {
        "random": [0.1] * 10,
        "random_matched": [0.25] * 4 + [0.0] * 6,
        "inverse": [0.0] + [1 / 9] * 9,  # the nine ties are equally likely
    }[strategy]
    assert (hits / 600).tolist() == pytest.approx(expected, abs=0.05)


def test_unknown_strategy_names_the_nearest():
    with pytest.raises(OptionError, match="Did you mean 'random_matched'"):
        make_masks(FISHER, 0.5, strategy="random-matched")


@pytest.mark.parametrize("case", ["uniform", "ties", "mixed types", "empty among them", "scalars"])
@pytest.mark.parametrize("which", ["highest", "lowest"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_each_tensor_keeps_its_own_share(case, which, keep):
    fisher = {str(i): t for i, t in enumerate(CASES[case])}
    masks = make_masks(fisher, keep, which=which, per="tensor", generator=seeded())
    for name, values in fisher.items():
        count = math.ceil(keep * values.numel() - 1e-9)
        mask = masks[name]
        if not values.numel():
            assert mask.shape == values.shape
            continue
        ordered = values.double().flatten().sort(descending=True).values
        kept = int((values.double() >= ordered[count - 1]).sum())  # ties are kept
        assert int(mask.sum()) == kept
        if which == "highest":
            assert torch.equal(mask, values.double() >= ordered[count - 1])
        elif kept < values.numel():
            assert values.double()[mask].max() <= values.double()[~mask].min()


def test_the_lowest_are_the_inverse():
    fisher = dict(zip("abc", CASES["uniform"], strict=True))
    lowest = make_masks(fisher, 0.3, which="lowest", generator=seeded(4))
    inverse = make_masks(fisher, 0.3, strategy="inverse", generator=seeded(4))
    assert all(torch.equal(lowest[name], inverse[name]) for name in fisher)


def test_matched_masks_have_the_counts_of_the_mask_that_they_control():
    fisher = dict(zip("abc", CASES["uniform"], strict=True))
    for which in ("highest", "lowest"):
        for per in ("network", "tensor"):
            options = {"which": which, "per": per}
            mask = make_masks(fisher, 0.3, generator=seeded(1), **options)
            control = make_masks(
                fisher, 0.3, strategy="random_matched", generator=seeded(2), **options
            )
            for name in fisher:
                assert mask[name].sum() == control[name].sum()
            assert any(not torch.equal(mask[name], control[name]) for name in fisher)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"which": "low"}, "which"),
        ({"per": "layer"}, "per"),
        ({"which": "lowest"}, "which='lowest' draws"),
        ({"which": "lowest", "strategy": "inverse"}, "leave one"),
        ({"which": "lowest", "strategy": "random"}, "leave one"),
    ],
)
def test_selections_that_cannot_be_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        make_masks({"a": rand(4)}, 0.5, **options)


def test_tensors_without_information_are_named():
    fisher = {"a": rand(8), "b": torch.zeros(8)}
    with pytest.warns(GradmaskWarning, match=r"is 0 in b:"):
        masks = make_masks(fisher, 0.5, per="tensor")
    assert masks["a"].sum() == 4
    assert masks["b"].all()
