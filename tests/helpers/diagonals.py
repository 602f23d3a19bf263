"""What masks are made of, and what hooks they leave."""


def assert_near(found, expected, near):
    assert found.keys() == expected.keys()
    # Keys' biases have no gradient: what they show is the square of a rounding error.
    nothing = 1e-12 * max(value.norm() for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).norm() <= near * value.norm() + nothing, name


def hooks_of(model):
    parts = list(model.modules())
    before = [hook for part in parts for hook in part._forward_pre_hooks.values()]
    return before + [hook for part in parts for hook in part._forward_hooks.values()]


# Options without use, and what is said of them.
USELESS = [
    ({"data": []}, "data= is for passes.*leave data out"),
    ({"max_samples": 9}, "leave max_samples out, or use refresh='epoch'"),
    ({"unpack": list}, "leave unpack out"),
    ({"kind": "exact"}, "kind='empirical'"),
    ({"strategy": "random"}, "measures nothing: use refresh='epoch'"),
    ({"steps": 0}, "steps=0"),
    ({"every": 0}, "every=0"),
    ({"steps": 5, "refresh": "epoch"}, "refresh=<number of steps>"),
]
