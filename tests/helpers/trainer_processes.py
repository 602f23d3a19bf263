"""The Trainer on several processes, started by torchrun: `trainer_processes.py FOLDER ENGINE`."""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from trainer_runs import assert_same, collate, made, samples, trainer, weights
from transformers import TrainerControl, TrainerState, TrainingArguments

from gradmask import FisherMask, fisher_diagonal, load_masks
from gradmask.errors import GradmaskWarning
from gradmask.integrations.transformers import FILE, FisherMaskCallback

RANKS = 2


def callback():
    return FisherMaskCallback(0.3, refresh=3, scope="update")


def whole(state):
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}


def assert_as_alone(found, state, kind="text"):
    """The mask is that of one process from all data, but for rounding at the threshold."""
    model = made(kind)
    model.load_state_dict(state)
    with warnings.catch_warnings(action="ignore", category=GradmaskWarning):
        alone = FisherMask(model, 0.3)
    alone.refresh(DataLoader(samples(24, kind), batch_size=4, collate_fn=collate))
    assert sum(int((mask != alone.masks[name]).sum()) for name, mask in found.items()) <= 4


def assert_one_mask(mask):
    sums = [None] * RANKS
    dist.all_gather_object(sums, mask.sha256())
    assert len(set(sums)) == 1


def ddp(folder):
    options = {
        "save_strategy": "steps", "save_steps": 4, "max_steps": 7, "data": samples(24),
        "per_device_train_batch_size": 2, "ddp_find_unused_parameters": False,
    }  # fmt: skip
    first, again = callback(), callback()
    host = trainer(folder, first, **options)
    host.train()
    assert dist.get_world_size() == RANKS
    assert isinstance(host.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    assert_one_mask(first.mask)
    assert_same(load_masks(folder / "checkpoint-7" / FILE), first.mask.masks)

    other = trainer(folder, again, **options)
    other.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert_same(again.mask.masks, first.mask.masks)
    assert_same(weights(other), weights(host))
    first._refresh(host.args, host.state, host.callback_handler.train_dataloader)
    assert_as_alone(first.mask.masks, host.model.state_dict())


def online(folder):
    """The diagonal is that of all ranks; a checkpoint within an epoch of 3 steps has all of it."""
    found, update = [], FisherMask.update
    FisherMask.update = lambda self, fisher: found.append(fisher) or update(self, fisher)
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    options = {
        "save_strategy": "steps", "save_steps": 4, "max_steps": 14, "data": samples(24),
        "per_device_train_batch_size": 2, "ddp_find_unused_parameters": False,
        "gradient_accumulation_steps": 2,
    }  # fmt: skip
    for rate in (0.0, 0.05):
        made_of = {**options, "model": made(**still), "learning_rate": rate}
        first = FisherMaskCallback(0.3, refresh="online", every=1)
        host = trainer(folder, first, **made_of)
        host.train()
        assert_one_mask(first._online)  # without what each rank has collected since
        if not rate:
            loader = DataLoader(samples(24), batch_size=4, collate_fn=collate)
            expected = fisher_diagonal(host.model.eval(), loader)
            for name, value in expected.items():
                assert (found[0][name] - value).norm() <= 1e-5 * value.norm(), name
    again = FisherMaskCallback(0.3, refresh="online", every=1)
    other = trainer(folder, again, **{**options, "model": made(**still), "learning_rate": rate})
    other.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert first.mask.refreshes == again.mask.refreshes == 4
    assert_same(again.mask.masks, first.mask.masks)
    assert_same(weights(other), weights(host))


def fsdp(folder):
    """The callback's hooks alone: on a CPU the Trainer leaves fully_shard out."""
    from torch.distributed.fsdp import fully_shard

    args = TrainingArguments(str(folder), use_cpu=True, report_to="none")
    assert args.world_size == RANKS
    model = made("class")
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    loader = DataLoader(samples(24, "class"), batch_size=4, collate_fn=collate)
    state, control = TrainerState(max_steps=9, num_train_epochs=3), TrainerControl()
    given = {"model": model, "optimizer": optimizer, "train_dataloader": loader}
    first, again = callback(), callback()
    first.on_train_begin(args, state, control, **given)
    state.global_step = 3
    first.on_step_end(args, state, control, **given)
    before = whole(model.state_dict())
    masks = whole(first.mask.masks)
    assert_one_mask(first.mask)
    assert_as_alone(masks, before, "class")
    batch = collate(samples(24, "class")[dist.get_rank() :: RANKS])
    model(**batch).loss.backward()
    optimizer.step()
    for name, weight in whole(dict(model.named_parameters())).items():
        if name in masks:
            assert torch.equal(weight[~masks[name]], before[name][~masks[name]])
    checkpoint = folder / "checkpoint-3"
    checkpoint.mkdir(exist_ok=True, parents=True)
    first.on_save(args, state, control, **given)
    dist.barrier()
    assert_same(load_masks(checkpoint / FILE), masks)
    first.on_train_end(args, state, control, **given)
    state.stateful_callbacks = {"FisherMaskCallback": first.state()}
    again.on_train_begin(args, state, control, **given)
    assert_same(whole(again.mask.masks), masks)


if __name__ == "__main__":
    warnings.simplefilter("error", GradmaskWarning)
    torch.set_num_threads(1)
    {"ddp": ddp, "fsdp": fsdp, "online": online}[sys.argv[2]](Path(sys.argv[1]))
    dist.destroy_process_group()
