"""Optimizers that wrap others, those that no mask fits, and that a failed attach leaves nothing."""

import copy

import pytest
import torch
from small_models import FIRST, pair, two_layers
from torch import nn
from torch.optim.lr_scheduler import StepLR
from wrapping_optimizers import (
    Accelerated,
    BareLookahead,
    LightningLike,
    Lookahead,
    Sam,
    ScheduleFree,
)

from gradmask import FisherMask
from gradmask.errors import OptimizerError

SCOPES = ["gradient", "update"]


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.5, **options)


def first_only(model, optimizer, **options):
    mask = FisherMask(model, keep=0.5, **options).attach(optimizer)
    mask.update(FIRST)
    return mask


def hooks(optimizer):
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


class Named:
    """Something that steps and holds an optimizer, but is none itself."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def step(self):
        for optimizer in vars(self).values():
            optimizer.step()

    def zero_grad(self):
        """As optimizers have."""


WRAPPERS = {
    "accelerate": Accelerated,
    "twice": lambda inner: Accelerated(Accelerated(inner)),
    "lightning": LightningLike,
    "lightning of accelerate": lambda inner: LightningLike(inner),
    "not an Optimizer": lambda inner: Named(base=inner),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_optimizers_step_masked(wrap, scope):
    model = pair()
    inner = sgd(model)
    optimizer = wrap(inner)
    mask = first_only(model, optimizer, scope=scope)
    for expected in ([[0.5, 2.0]], [[0.0, 2.0]]):
        model.weight.grad = torch.ones(1, 2)
        optimizer.step()
        assert model.weight.tolist() == expected
    for again in (optimizer, inner):
        with pytest.raises(OptimizerError, match="attached already"):
            mask.attach(again)
    assert hooks(inner) == (1 if scope == "gradient" else 2)
    mask.update(FIRST)
    mask.detach()
    model.weight.grad = torch.ones(1, 2)
    optimizer.step()
    assert model.weight.tolist() == [[-0.5, 1.5]]
    assert not hooks(inner)


def test_an_inner_optimizer_and_then_its_wrapper():
    model = pair()
    inner = sgd(model)
    mask = first_only(model, inner)
    with pytest.raises(OptimizerError, match=r"attached already.*mask\.detach\(\) first"):
        mask.attach(Accelerated(inner))
    assert hooks(inner) == 1


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["base_optimizer", "base", "inside", "several"])
def test_sam_in_two_steps(name, scope):
    model = pair().double()
    optimizer = Sam(model.parameters(), name, lr=0.5)
    mask = FisherMask(model, keep=0.5, scope=scope).attach(optimizer)
    mask.update({"weight": FIRST["weight"].double()})
    for expected in (0.5, 0.0):
        model.weight.grad = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
        optimizer.first_step()
        model.weight.grad = torch.ones(1, 2, dtype=torch.float64)
        optimizer.second_step()
        assert model.weight.tolist() == [[expected, 2.0]]
    mask.update({"weight": FIRST["weight"].double()})


@pytest.mark.parametrize("scope", SCOPES)
def test_a_wrapper_that_moves_weights_in_a_hooked_step(scope):
    model = pair()
    optimizer = Lookahead(sgd(model))
    mask = first_only(model, optimizer, scope=scope)
    model.weight.grad = torch.ones(1, 2)
    optimizer.step()
    # 0.3 of the way from 0: 0.3 · 0.5 and 0.3 · 2, and the second is held in `update`.
    expected = 2.0 if scope == "update" else pytest.approx(0.6)
    assert model.weight.tolist() == [[pytest.approx(0.15), expected]]
    mask.update(FIRST)


def test_inner_optimizers_of_other_models_are_left_alone():
    model, other = pair(), nn.Linear(3, 1)
    ours, theirs = sgd(model), sgd(other)
    optimizer = Named(first=theirs, second={"deep": [(ours,)]})
    first_only(model, optimizer, scope="update")
    assert (hooks(ours), hooks(theirs)) == (2, 0)


def test_wrappers_in_a_circle():
    model = pair()
    inner = sgd(model)
    outer = Accelerated(inner)
    inner.parent, inner.everything = outer, [outer]
    inner.everything.append(inner.everything)
    first_only(model, outer)
    assert hooks(inner) == 1


def test_hooks_that_a_wrapper_shares_run_once():
    class Sharing(torch.optim.SGD):
        def __init__(self, inner):
            vars(self).update(vars(inner))
            self.inner = inner

    model = pair()
    inner = sgd(model)
    mask = first_only(model, Sharing(inner), scope="update")  # the wrapper is let go at once
    assert hooks(inner) == 2
    with pytest.raises(OptimizerError, match="attached already"):
        mask.attach(inner)
    mask.detach()
    assert not hooks(inner)


def deepspeed(module, name="Wrapped"):
    return type(name, (Named,), {"__module__": module})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: Accelerated(Named(hidden=1)), "none of the model's"),
        (lambda m: torch.optim.LBFGS(m.parameters()), "L-BFGS"),
        (lambda m: Accelerated(torch.optim.LBFGS(m.parameters())), "L-BFGS"),
        (lambda m: Named(base=[torch.optim.LBFGS(m.parameters())]), "L-BFGS"),
        (lambda m: deepspeed("deepspeed.runtime.engine")(), "is DeepSpeed's"),
        (lambda m: Accelerated(deepspeed("deepspeed.runtime.zero")(base=sgd(m))), "DeepSpeed's"),
        (lambda m: Named(a=sgd(m), b=deepspeed("x", "DeepSpeedZeroOptimizer")()), "DeepSpeed's"),
        (lambda m: StepLR(sgd(m), 1), r"a StepLR.*mask\.attach\(steplr\.optimizer\)"),
        (lambda m: [sgd(m)], "a list: give it a torch"),
        (lambda m: torch.optim.SGD, "a type: give it a torch"),
        (lambda m: None, "a NoneType"),
    ],
)
@pytest.mark.parametrize("scope", SCOPES)
def test_what_cannot_be_masked(build, message, scope):
    model = pair()
    mask = FisherMask(model, keep=0.5, scope=scope)
    with pytest.raises(OptimizerError, match=message):
        mask.attach(build(model))
    mask.attach(sgd(model))  # nothing was recorded


def test_a_wrapper_whose_inside_is_hidden_is_refused_with_the_line_to_write():
    class Hidden(Accelerated):
        def __init__(self, inner):
            self.get = lambda: inner

        optimizer = property(lambda self: self.get())

    model = pair()
    optimizer, mask = Hidden(sgd(model)), FisherMask(model, keep=0.5)
    with pytest.raises(
        OptimizerError, match=r"runs no hooks.*mask\.attach\(optimizer\.optimizer\)"
    ):
        mask.attach(optimizer)
    mask.attach(optimizer.optimizer)
    mask.update(FIRST)
    model.weight.grad = torch.ones(1, 2)
    optimizer.step()
    assert model.weight.tolist() == [[0.5, 2.0]]


def test_a_step_put_in_place_of_the_hooked_one_is_refused():
    class Patched(torch.optim.SGD):
        """Its class gets another step after the hooks are in place."""

    model = pair()
    optimizer = Patched(model.parameters())
    Patched.step = lambda self, closure=None: None
    with pytest.raises(OptimizerError, match="Patched runs no hooks"):
        FisherMask(model).attach(optimizer)


@pytest.mark.parametrize(
    "build",
    [
        lambda m: ScheduleFree(m.parameters()),
        lambda m: Accelerated(ScheduleFree(m.parameters())),
        lambda m: type("ScheduleFreeWrapper", (Accelerated,), {})(sgd(m)),
        lambda m: type("Averaged", (torch.optim.SGD,), {"swap_swa_sgd": None})(m.parameters()),
        lambda m: BareLookahead(sgd(m)),
    ],
)
def test_optimizers_that_rewrite_weights_outside_their_step(build):
    model = pair()
    with pytest.raises(OptimizerError, match="scope='update' cannot hold them: use scope='gradien"):
        FisherMask(model, keep=0.5, scope="update").attach(build(model))
    FisherMask(model, keep=0.5).attach(build(model))


class Failing(torch.optim.SGD):
    def register_step_post_hook(self, hook):
        raise RuntimeError("no more hooks")


def test_attach_is_atomic():
    model = two_layers()
    first, second = sgd(model[0]), Failing(model[1].parameters())
    optimizer = Named(first=first, second=second)
    mask = FisherMask(model, scope="update")
    for _ in range(2):  # not "attached already"
        with pytest.raises(RuntimeError, match="no more hooks"):
            mask.attach(optimizer)
        assert (hooks(first), hooks(second)) == (0, 0)
    mask.attach(first)


@pytest.mark.cpu
@pytest.mark.parametrize("scope", SCOPES)
def test_accelerate_itself(scope):
    accelerate = pytest.importorskip("accelerate")
    model = pair()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, sgd(model))
    mask = first_only(model, optimizer, scope=scope)
    with pytest.raises(OptimizerError, match="attached already"):
        mask.attach(optimizer)
    accelerator.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    assert model.weight.tolist() == [[0.5, 2.0]]
    twin, ours, theirs = copy.deepcopy((model, optimizer, mask))
    mask.update(FIRST)
    twin.weight.grad = torch.ones(1, 2)
    ours.step()
    assert twin.weight.tolist() == [[0.0, 2.0]]
    theirs.update(FIRST)


ALL = [
    getattr(torch.optim, name)
    for name in sorted(torch.optim.__all__)
    if isinstance(getattr(torch.optim, name), type)
    and name not in ("Optimizer", "LBFGS", "SparseAdam")
]


@pytest.mark.parametrize("way", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
@pytest.mark.parametrize("kind", ALL)
def test_update_holds_masked_weights_with_every_optimizer(kind, way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)).double()
    options = {"lr": 0.05, "weight_decay": 0.1, **way}
    options |= {"momentum": 0.9} if kind in (torch.optim.SGD, torch.optim.RMSprop) else {}
    options = {} if kind is torch.optim.Rprop else options
    try:
        optimizer = kind(model.parameters(), **options)
    except (TypeError, RuntimeError) as error:
        pytest.skip(str(error))
    mask = FisherMask(model, keep=0.4, scope="update").attach(optimizer)
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,))
    if kind is torch.optim.Adagrad and way.get("fused") and x.is_cuda:
        pytest.skip("PyTorch has no fused Adagrad on CUDA")
    moved = dict.fromkeys(["0.weight", "1.weight"], False)
    for step in range(9):
        if step % 3 == 1:
            mask.refresh([(x, y)])
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        for name, p in model.named_parameters():
            changed = p != before[name]
            assert not mask.masks or not (changed & ~mask.masks[name]).any()
            moved[name] |= bool(changed.any())
    assert all(moved.values())
