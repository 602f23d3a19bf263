"""The mask in the loops of timm's and torchvision's training scripts, with their own parts."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradmask import FisherMask


def images(n=24):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, 32, 32, generator=generator)
    data = TensorDataset(x, torch.randint(4, (n,), generator=generator))
    return DataLoader(data, batch_size=n // 3, shuffle=True, generator=generator)


def assert_masked_entries_stay(model, before, mask):
    moved = {n: p.detach() != before[n] for n, p in model.named_parameters()}
    assert not any((moved[n] & ~mask.masks[n]).any() for n in moved)
    assert sum(m.sum() for m in moved.values()) > 0


def copied(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb", "nadamw"])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_timm(name, opt):
    timm = pytest.importorskip("timm")
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, img_size=32) if "vit" in name else (
        timm.create_model(name, num_classes=4)
    )  # fmt: skip
    optimizer = create_optimizer_v2(model, opt=opt, lr=0.05, weight_decay=0.1)
    scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=3, warmup_epochs=1)
    ema, scaler = ModelEmaV3(model, decay=0.5), NativeScaler(device="cpu")
    loader, loss_function = images(), nn.CrossEntropyLoss(label_smoothing=0.1)
    mask = FisherMask(model, keep=0.25, scope="update").attach(optimizer)
    for epoch in range(2):
        before = copied(model)
        model.train()
        for place, (x, y) in enumerate(loader):
            loss = loss_function(model(x), y)
            if opt == "adamw":
                scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            else:
                loss.backward()
                dispatch_clip_grad(model.parameters(), 1.0, mode="agc")
                optimizer.step()
            ema.update(model)
            optimizer.zero_grad()
            scheduler.step_update(epoch * len(loader) + place)
        if mask.masks:
            assert_masked_entries_stay(model, before, mask)
        mask.refresh(loader)
        scheduler.step(epoch + 1)
    assert epochs >= 3
    assert mask.kept_fraction == pytest.approx(0.25, abs=0.01)


def test_torchvision():
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)
    decayed = [p for n, p in model.named_parameters() if "bn" not in n]
    others = [p for n, p in model.named_parameters() if "bn" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    loader, scaler = images(12), torch.amp.GradScaler("cpu")
    mask = FisherMask(model, keep=0.25, scope="update").attach(optimizer)
    for _ in range(2):
        before = copied(model)
        model.train()
        for x, y in loader:
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), y, label_smoothing=0.1)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            average.update_parameters(model)
        if mask.masks:
            assert_masked_entries_stay(model, before, mask)
        mask.refresh(loader)
        scheduler.step()
