"""Lightning: one callback (of `lightning` or `pytorch_lightning`), for any Trainer.

python examples/lightning_callback.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from gradmask.integrations.lightning import FisherMaskCallback


class Digits(LightningModule):
    """A small network; `forward` gives the logits, which the mask measures."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, index):
        images, labels = batch
        return cross_entropy(self(images), labels)

    def validation_step(self, batch, index):
        images, labels = batch
        accuracy = (self(images).argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy, batch_size=len(labels))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


seed_everything(0)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
train = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=32, shuffle=True)
test = DataLoader(TensorDataset(images[1400:], labels[1400:]), batch_size=100)

mask = FisherMaskCallback(keep=0.25)
quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
trainer = Trainer(max_epochs=5, gradient_clip_val=1.0, callbacks=[mask], logger=False, **quiet)
trainer.fit(Digits(), train, test)
found = trainer.callback_metrics
print(f"accuracy {found['accuracy']:.3f}, {found['fisher_mask/kept']:.0%} of the weights learned")
