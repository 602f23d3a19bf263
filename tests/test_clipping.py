"""`FisherMask.clip_grad_norm_` against masking and PyTorch's clipping, one after the other."""

import pytest
import torch
from torch import nn

from gradmask import FisherMask
from gradmask.kernels import clip, clip_where


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(80, 7), nn.Linear(7, 3)).to(
        dtype
    )


def masked(model, keep=0.3, **options):
    mask = FisherMask(model, keep, **options)
    fisher = {n: torch.rand(p.shape, dtype=torch.float64) for n, p in model.named_parameters()}
    mask.update(fisher)
    return mask


def fill(model, scale=1.0):
    torch.manual_seed(1)
    for p in model.parameters():
        p.grad = scale * torch.randn_like(p)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [0.1, 1e3])
@pytest.mark.parametrize("kind", [2.0, 1.0, float("inf")])
def test_as_masking_and_clipping(kind, most, dtype, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(clip, "load", lambda *_, **__: None)
    model = network(dtype)
    mask = masked(model)
    fill(model)
    fill(twin := network(dtype))
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.grad *= mask.masks[name]
    expected = nn.utils.clip_grad_norm_(twin.parameters(), most, kind)
    found = mask.clip_grad_norm_(most, kind)
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert found.item() == pytest.approx(expected.item(), rel=near)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=near, atol=0)


@pytest.mark.parametrize("threads", [1, 3])
def test_many_chunks_and_threads(threads):
    torch.manual_seed(0)
    tensors = [torch.randn(n) for n in (1, 0, 16384, 16385, 100_003)]
    masks = [torch.rand(t.shape) < 0.4 for t in tensors]
    kept = [t.double() * m for t, m in zip(tensors, masks, strict=True)]
    norm = torch.cat(kept).norm()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = clip_where(tensors, masks, 2.0)
    torch.set_num_threads(before)
    assert found.item() == pytest.approx(norm.item(), rel=1e-6)
    for t, k in zip(tensors, kept, strict=True):
        torch.testing.assert_close(t, (2 / norm * k).float(), rtol=1e-5, atol=0)


def test_masked_infinities_do_no_harm_and_kept_ones_are_told():
    model = nn.Linear(2, 1, bias=False)
    mask = FisherMask(model, 0.5)
    mask.update({"weight": torch.tensor([[1.0, 0.0]])})
    model.weight.grad = torch.tensor([[3.0, torch.inf]])
    assert mask.clip_grad_norm_(1.0) == 3.0
    torch.testing.assert_close(model.weight.grad, torch.tensor([[1.0, 0.0]]))
    model.weight.grad = torch.tensor([[torch.nan, 1.0]])
    with pytest.raises(RuntimeError, match="norm"):
        mask.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert mask.clip_grad_norm_(1.0).isnan()


def test_before_the_first_mask_and_without_gradients():
    model = network()
    mask = FisherMask(model, 0.3)
    assert mask.clip_grad_norm_(1.0) == 0
    fill(model)
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    torch.testing.assert_close(mask.clip_grad_norm_(1.0), expected)
    mask = masked(model)
    model[0].weight.grad = None
    mask.clip_grad_norm_(1.0)
    assert model[0].weight.grad is None


@pytest.mark.parametrize("between", ["nothing", "add", "replace", "refresh", "mask"])
def test_the_step_masks_again_only_what_changed(between, monkeypatch):
    from gradmask import steps

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    mask = masked(model).attach(optimizer)
    fill(model)
    mask.clip_grad_norm_(0.5)
    if between == "add":
        model[0].weight.grad += 1.0
    elif between == "replace":
        model[0].weight.grad = torch.ones_like(model[0].weight)
    elif between == "refresh":
        mask.update({n: torch.rand(p.shape) for n, p in model.named_parameters()})
    elif between == "mask":
        mask.masks["0.weight"].fill_(False)
    counts = []
    real = steps.keep_where
    monkeypatch.setattr(steps, "keep_where", lambda g, m: counts.append(len(g)) or real(g, m))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    assert counts == [{"nothing": 0, "refresh": 6}.get(between, 1)]
    for name, p in model.named_parameters():
        assert torch.equal(p[~mask.masks[name]], before[name][~mask.masks[name]]), name


def test_training_is_the_same():
    weights = []
    for together in (True, False):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        torch.manual_seed(3)
        mask = masked(model, scope="update").attach(optimizer)
        for step in range(3):
            fill(model, 1.0 + step)
            if together:
                mask.clip_grad_norm_(0.7)
            else:
                mask.apply_()
                nn.utils.clip_grad_norm_(model.parameters(), 0.7)
            optimizer.step()
        weights.append([p.detach() for p in model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
