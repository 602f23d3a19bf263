"""A study whose training is a framework's: the arm's mask in, what is measured out."""

import pytest
import torch
from torch import nn

from gradmask.errors import OptionError
from gradmask.integrations.trials import Reporter
from gradmask.study import Trial, compare
from gradmask.study.spec import Spec

ARMS = ["none", "fisher:keep=0.5", "slow:keep=0.25", "slow_matched:keep=0.25", "early"]


def data(count=48):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 6, generator=generator)
    return inputs, (inputs.sum(1) > 0).long()


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def check(results, epochs):
    runs = {run["arm"]: run["epochs"] for run in results["runs"]}
    assert list(runs) == ARMS
    for arm in ARMS[:-1]:
        assert [row["epoch"] for row in runs[arm]] == epochs
        assert {"val_loss", "val_accuracy"} <= set(runs[arm][0])
    losses = {arm: rows[-1]["val_loss"] for arm, rows in runs.items() if arm != "early"}
    assert len(set(losses.values())) == len(losses)  # every arm does something of its own
    assert runs["fisher:keep=0.5"][-1]["kept"] == pytest.approx(0.5, abs=0.02)
    assert losses["slow:keep=0.25"] > losses["none"]
    assert runs["early"] == runs["none"][: len(runs["early"])]


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from gradmask.integrations.lightning import FisherMaskCallback

    class Module(lightning.LightningModule):
        def __init__(self, seed):
            super().__init__()
            self.net = network(seed)

        def forward(self, inputs):
            return self.net(inputs)

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, _):
            logits = self(batch[0])
            self.log("val/loss", nn.functional.cross_entropy(logits, batch[1]))
            self.log("val/accuracy", (logits.argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def train(trial):
        dataset = torch.utils.data.TensorDataset(*data())
        loader = torch.utils.data.DataLoader(dataset, 8)
        trainer = lightning.Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[FisherMaskCallback.of(trial)],
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )
        trainer.fit(Module(trial.seed), loader, torch.utils.data.DataLoader(dataset, 48))

    check(compare(train, ARMS, [0], tmp_path, threads=1), [1, 2, 3])


def test_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    from gradmask.integrations.transformers import FisherMaskCallback

    class Model(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.net = network(seed)

        def forward(self, inputs, labels=None):
            logits = self.net(inputs)
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return transformers.modeling_outputs.SequenceClassifierOutput(loss, logits)

    inputs, labels = data()
    rows = [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]

    def accuracy(prediction):
        return {
            "accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())
        }

    begun = []

    def train(trial):
        begun.append(trial.spec)
        arguments = transformers.TrainingArguments(
            output_dir=str(trial.directory),
            num_train_epochs=3,
            per_device_train_batch_size=8,
            learning_rate=0.1,
            optim="sgd",
            eval_strategy="steps",
            eval_steps=3,
            save_strategy="epoch",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=trial.seed,
        )
        trainer = transformers.Trainer(
            Model(trial.seed),
            arguments,
            train_dataset=rows,
            eval_dataset=rows,
            compute_metrics=accuracy,
            callbacks=[FisherMaskCallback.of(trial)],
        )
        saved = transformers.trainer_utils.get_last_checkpoint(str(trial.directory))
        trainer.train(resume_from_checkpoint=saved)
        if len(begun) == 2 and saved is None:
            raise KeyboardInterrupt  # after its last checkpoint

    with pytest.raises(KeyboardInterrupt):
        compare(train, ARMS, [0], tmp_path, threads=1)
    check(compare(train, ARMS, [0], tmp_path, threads=1), [0.5, 1, 1.5, 2, 2.5, 3])
    assert begun[1] == begun[2]  # which went on from the Trainer's own checkpoint


def test_a_reporter_gathers_an_epoch(tmp_path):
    reporter = Reporter(Trial(Spec("none", 0), tmp_path))
    reporter.add(0.5, {"eval_loss": 2.0, "eval_runtime": 1.0, "epoch": 0.5})
    reporter.add(1.0, {"eval_loss": torch.tensor(1.0), "eval_test_f1": 0.5, "name": "x"})
    reporter.add(2.0, {"val/auc": 0.7})
    reporter.flush()
    assert reporter.trial.rows == [
        {"epoch": 0.5, "val_loss": 2.0},
        {"epoch": 1, "val_loss": 1.0, "test_f1": 0.5},
        {"epoch": 2, "val_auc": 0.7},
    ]
    reporter.save()
    again = Reporter(Trial(Spec("none", 0), tmp_path))
    again.resume(1.0)
    assert [row["epoch"] for row in again.trial.rows] == [0.5, 1]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_arm_that_is_a_function_needs_a_loop_of_ones_own(tmp_path):
    trial = Trial(Spec("mine", 0), tmp_path, arms={"mine": lambda *_: None})
    with pytest.raises(OptionError, match="needs the optimizer: call"):
        trial.new_mask(network(0))
