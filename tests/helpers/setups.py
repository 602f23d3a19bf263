"""What `<!-- setup: NAME -->` gives to the code of a page: tiny models and data."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradmask
from gradmask.audit import Dynamics, Indexed


def basics():
    """What every page finds: a network of four classes, its optimizer, and data."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(48, 6), torch.arange(48) % 4
    dataset = TensorDataset(inputs, labels)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    loader = DataLoader(dataset, batch_size=4, shuffle=True)

    def train_one_epoch(model, optimizer, loader):
        for inputs, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    return {
        "gradmask": gradmask,
        "torch": torch,
        "nn": nn,
        "F": F,
        "DataLoader": DataLoader,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4),
        "criterion": nn.CrossEntropyLoss(),
        "inputs": inputs[:8],
        "targets": labels[:8],
        "probe": inputs[8:24],
        "dataset": dataset,
        "labels": labels,
        "loader": loader,
        "numbered_loader": DataLoader(Indexed(dataset), batch_size=16, shuffle=True),
        "old_loader": loader,
        "new_loader": loader,
        "forget_loader": DataLoader(TensorDataset(inputs[:16], labels[:16]), batch_size=16),
        "retain_loader": DataLoader(TensorDataset(inputs[16:], labels[16:]), batch_size=16),
        "relabelled_loader": loader,
        "epochs": 2,
        "train_one_epoch": train_one_epoch,
    }


def study(names):
    """A training that `gradmask.study` compares."""
    import gradmask.study

    def build(seed, lr=0.1):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        loader = DataLoader(names["dataset"], batch_size=24, shuffle=True)
        return model, torch.optim.SGD(model.parameters(), lr=lr), loader

    def measured(model):
        with torch.no_grad():
            logits = model(names["inputs"])
        accuracy = (logits.argmax(1) == names["targets"]).double().mean().item()
        loss = F.cross_entropy(logits, names["targets"]).item()
        return {"val_accuracy": accuracy, "test_accuracy": accuracy, "test_loss": loss}

    return {"build": build, "measured": measured, "compare": gradmask.study.compare}


def trainer(names):
    """A classifier of tokens, and a `Trainer`'s arguments."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=20, max_position_embeddings=4, intermediate_size=8, **sizes)
    data = [{"input_ids": row, "labels": row[0] % 2} for row in torch.randint(20, (24, 4))]
    args = TrainingArguments(
        "runs/trainer",
        num_train_epochs=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    labels = torch.tensor([int(sample["labels"]) for sample in data])
    model = BertForSequenceClassification(config)
    return {"Trainer": Trainer, "model": model, "args": args, "data": data, "labels": labels}


def lightning(names):
    """A module, and Lightning's `Trainer` that says nothing and takes two epochs."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(6, 4)

        def forward(self, inputs):
            return self.net(inputs)

        def training_step(self, batch, index):
            inputs, targets = batch
            return F.cross_entropy(self(inputs), targets)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    found = basics()
    ours = {"data": found["dataset"], "module": Module(), "Trainer": quiet_trainer()}
    return {**found, **ours}


def quiet_trainer():
    import lightning

    class Trainer(lightning.Trainer):
        def __init__(self, **options):
            quiet = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing")
            options |= {"max_epochs": 2, "accelerator": "cpu", "logger": False}
            super().__init__(**options, **dict.fromkeys(quiet, False))

    return Trainer


def autoencoder(names):
    """Images of 28 by 28, and Lightning without its bars."""
    import lightning

    images = TensorDataset(torch.rand(16, 1, 28, 28), torch.zeros(16))
    lightning.Trainer = quiet_trainer()
    return {"loader": DataLoader(images, batch_size=8)}


def accelerate(names):
    """Accelerate, on the CPU."""
    from accelerate import Accelerator

    return basics() | {"accelerator": Accelerator(cpu=True)}


def peft(names):
    """A network with layers of the names that the page adapts."""
    import peft

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Linear(6, 32)
            self.query, self.value = nn.Linear(32, 32), nn.Linear(32, 32)
            self.head = nn.Linear(32, 4)

        def forward(self, inputs):
            return self.head(self.value(self.query(self.tokens(inputs))))

    return {"peft": peft, "model": Attention(), "loader": basics()["loader"]}


def script(names):
    """As the training scripts name things."""
    return basics() | {"loader_train": names["loader"]}


def processes(names):
    """A process group of one."""
    from torch.distributed import HashStore, init_process_group, is_initialized

    if not is_initialized():
        init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    from torch.nn.parallel import DistributedDataParallel

    return {"DistributedDataParallel": DistributedDataParallel}


def writer(names):
    """Something with `add_scalar`."""
    written = []
    silent = SimpleNamespace(add_scalar=lambda *values: written.append(values))
    data = TensorDataset(torch.randn(400, 6), torch.arange(400) % 4)
    return {"writer": silent, "train_loader": DataLoader(data, batch_size=50)}


def scale(names):
    """A layer of the user's own, in a network, and what goes through it."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, inputs):
            return inputs * self.scale[:, None]

    scaled = nn.Sequential(Scale(), nn.Flatten(), nn.Linear(15, 4))
    return {"Scale": Scale, "scaled": scaled, "images": torch.randn(8, 3, 5)}


def images(names):
    """Images of ten classes, a network and the names of the classes."""
    labels = torch.arange(400) % 10
    pixels = torch.rand(400, 1, 6, 6) + F.one_hot(labels, 36).reshape(400, 1, 6, 6)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 10))
    classes = [f"class {number}" for number in range(10)]
    data = TensorDataset(pixels, labels)

    def train_on(labels):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        dynamics = Dynamics(len(labels))
        for _ in range(40):
            logits = model(pixels)
            dynamics.update(torch.arange(len(labels)), logits, labels)
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
        return dynamics

    found = {"dataset": data, "labels": labels, "model": model, "names": classes}
    return {**found, "train_on": train_on}


SETUPS = {
    function.__name__.replace("_", "-"): function
    for function in (
        *(study, trainer, lightning, autoencoder, accelerate, peft, script),
        *(processes, writer, scale, images),
    )
}
