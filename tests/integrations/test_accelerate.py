"""The mask in loops with Accelerate, against plain loops with the same masks."""

import os
import warnings

import pytest
import torch
from processes import run_processes
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from gradmask import FisherMask
from gradmask.errors import GradmaskWarning, OptimizerError

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("repeatable", "fresh")


@pytest.fixture
def fresh():
    """Accelerate's state is one for the process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def accelerator_of(seedable=False, **options):
    settings = accelerate.DataLoaderConfiguration(use_seedable_sampler=seedable)
    return accelerate.Accelerator(cpu=True, dataloader_config=settings, **options)


def network(dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def samples(n=40):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (n,), generator=generator)
    return TensorDataset(torch.randn(n, 6, generator=generator), labels)


def loader():
    return DataLoader(samples(), 8, shuffle=True)


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05)


class Run:
    """A training with Accelerate; the mask is made anew after every epoch or so many steps."""

    def __init__(self, accelerator, attach="after", refresh="epoch", net=None, **options):
        model = net or network()
        inner = adam(model)
        mask = FisherMask(model, **options) if attach == "before" else None
        if mask:
            mask.attach(inner)
        parts = accelerator.prepare(model, inner, loader())
        self.model, self.optimizer, self.loader = parts
        self.mask = mask or FisherMask(self.model, **options)
        if not mask:
            self.mask.attach(inner if attach == "inside" else self.optimizer)
        accelerator.register_for_checkpointing(self.mask)
        self.accelerator, self.refresh, self.stepped, self.synced = accelerator, refresh, 0, []

    def epoch(self):
        for inputs, labels in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = functional.cross_entropy(self.model(inputs), labels)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.1)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.synced.append(self.accelerator.sync_gradients)
                self.stepped += self.accelerator.sync_gradients
            due = self.refresh != "epoch" and self.stepped % self.refresh == 0
            if due and self.accelerator.sync_gradients:
                self.mask.refresh(self.loader)
        if self.refresh == "epoch":
            self.mask.refresh(self.loader)

    def weights(self):
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}


def plain(batches, refresh="epoch", accumulate=1, epochs=4, **options):
    """The same on the batches of every epoch, in a loop of one's own."""
    model = network()
    optimizer, stepped = adam(model), 0
    mask = FisherMask(model, **options).attach(optimizer)
    torch.manual_seed(2)
    for epoch in range(epochs):
        for i, (inputs, labels) in enumerate(batches[epoch]):
            (functional.cross_entropy(model(inputs), labels) / accumulate).backward()
            if (i + 1) % accumulate == 0 or i + 1 == len(batches[epoch]):
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
                stepped += 1
                if refresh != "epoch" and stepped % refresh == 0:
                    mask.refresh(loader())
        if refresh == "epoch":
            mask.refresh(loader())
    return {n: p.detach() for n, p in model.named_parameters()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def noting(run):
    """Batches of every epoch as the run gives them, once it has run."""
    epochs, inner = [], run.loader

    class Noting:
        def __iter__(self):
            epochs.append([])
            for batch in inner:
                epochs[-1].append(batch)
                yield batch

        def __getattr__(self, name):
            return getattr(inner, name)

    run.loader = Noting()
    return epochs


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("refresh", ["epoch", 3])
@pytest.mark.parametrize("attach", ["before", "after", "inside"])
def test_equals_a_plain_loop(attach, refresh, accumulate):
    accelerator = accelerator_of(gradient_accumulation_steps=accumulate)
    options = {"keep": 0.3, "scope": "update"}
    run = Run(accelerator, attach, refresh, **options)
    batches = noting(run)
    torch.manual_seed(2)
    for _ in range(4):
        run.epoch()
    assert run.synced == [True] * 20 if accumulate == 1 else [False, True, False, True, True] * 4
    assert len({str(epoch) for epoch in batches}) == 4  # another order each time
    assert_same(run.weights(), plain(batches, refresh, accumulate, **options))


@pytest.mark.parametrize("seedable", [True, False])
@pytest.mark.parametrize("most", [None, 5])
def test_a_refresh_in_an_epoch_changes_nothing_else(most, seedable):
    """The order of later epochs, and when gradients are in step, are those of the loader alone."""

    def drawn(refresh):
        accelerator = accelerator_of(seedable, gradient_accumulation_steps=2)
        options = {"keep": 1.0, "max_samples": most}
        run = Run(accelerator, refresh=refresh, net=network(dropout=0.2), **options)
        torch.manual_seed(2)
        for _ in range(3):
            run.epoch()
        assert not run.loader.gradient_state.in_dataloader
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
        return run.synced, run.weights(), run.mask.refreshes

    (synced, weights, measured), (expected, without, never) = drawn(1), drawn(1000)
    assert measured > 3
    assert never == 0
    assert synced == expected
    assert_same(weights, without)


@pytest.mark.parametrize("refresh", ["epoch", 3])
def test_a_resumed_run_equals_one_that_went_on(refresh, tmp_path):
    def run(folder=None):
        torch.manual_seed(2)
        net = network(dropout=0.2)
        found = Run(accelerator_of(), refresh=refresh, net=net, keep=0.3, scope="update")
        for epoch in range(4):
            if epoch < 2 and folder:
                continue
            if epoch == 2 and folder:
                torch.manual_seed(9)
                found.accelerator.load_state(folder)
                found.stepped = 10
            found.epoch()
            if epoch == 1 and not folder:
                found.accelerator.save_state(tmp_path)
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        return found

    whole, ours = run(), run(tmp_path)
    assert_same(ours.weights(), whole.weights())
    assert_same(ours.mask.masks, whole.mask.masks)
    assert ours.mask.refreshes == whole.mask.refreshes
    saved = torch.load(tmp_path / "custom_checkpoint_0.pkl", weights_only=True)
    assert saved["refreshes"] == {"epoch": 2, 3: 3}[refresh]


@pytest.mark.parametrize("scope", ["gradient", "update"])
@pytest.mark.parametrize("attach", ["before", "after", "inside"])
def test_a_step_that_the_scaler_skips(attach, scope):
    """As with mixed_precision="fp16", whose scaler Accelerate makes on an accelerator alone."""
    accelerator = accelerator_of()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run = Run(accelerator, attach, keep=0.3, scope=scope)
    assert run.optimizer.scaler is accelerator.scaler
    run.mask.refresh(run.loader)
    masks = run.mask.masks
    inputs, labels = next(iter(loader()))
    skipped = []
    for factor in (1.0, float("inf"), 1.0):
        before = run.weights()
        loss = factor * functional.cross_entropy(run.model(inputs), labels)
        accelerator.scaler.scale(loss).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        skipped.append(accelerator.optimizer_step_was_skipped)
        moved = {n: p != before[n] for n, p in run.weights().items()}
        assert any(m.any() for m in moved.values()) is not skipped[-1]
        if scope == "update":
            assert all((moved[n] <= masks[n]).all() for n in masks)
    assert skipped == [False, True, False]
    run.mask.refresh(run.loader)  # raises no error of weights that moved
    run.mask.refresh(run.loader)


def test_a_skipped_step_alone_is_no_error_and_an_unseen_one_is():
    accelerator = accelerator_of()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run = Run(accelerator, keep=0.3)
    run.mask.refresh(run.loader)
    inputs, labels = next(iter(loader()))
    accelerator.scaler.scale(functional.cross_entropy(run.model(inputs), labels) / 0).backward()
    run.optimizer.step()
    assert accelerator.optimizer_step_was_skipped
    run.mask.refresh(run.loader)
    other = adam(run.model)
    run.optimizer.zero_grad()
    functional.cross_entropy(run.model(inputs), labels).backward()
    other.step()
    with pytest.raises(OptimizerError, match="no step"):
        run.mask.refresh(run.loader)


def test_mixed_precision():
    run = Run(accelerator_of(mixed_precision="bf16"), keep=0.3, scope="update")
    for _ in range(2):
        run.epoch()
    assert run.mask.kept_fraction == pytest.approx(0.3, abs=0.01)


# Several processes


def fit_on_ranks(rank, world, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", ACCELERATE_USE_CPU="true")
    warnings.simplefilter("error", GradmaskWarning)
    accelerator = accelerator_of(gradient_accumulation_steps=2)
    assert accelerator.num_processes == world
    run = Run(accelerator, refresh=2, keep=0.3, kind="exact", max_samples=None)
    for _ in range(2):
        run.epoch()
    assert run.synced == [False, True, True] * 2
    accelerator.save_state(folder / "state")
    fresh = Run(accelerator, refresh=2, keep=0.3, kind="exact", max_samples=None)
    fresh.mask.load_state_dict(torch.load(folder / "state" / "custom_checkpoint_0.pkl"))
    assert_same(fresh.mask.masks, run.mask.masks)
    assert not any(name.startswith("module.") for name in run.mask.masks)
    torch.save({"masks": run.mask.masks, "weights": run.weights()}, folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes(tmp_path):
    run_processes(fit_on_ranks, 2, tmp_path, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(first["masks"], second["masks"])
    assert_same(first["weights"], second["weights"])
    assert any(not mask.all() for mask in first["masks"].values())
