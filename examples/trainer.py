"""The mask in Hugging Face's `Trainer`: a small language model and text made here.

    pip install 'gradmask[transformers]'
    python examples/trainer.py

On several processes: `torchrun --nproc-per-node 2 examples/trainer.py`.
"""

import random
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from gradmask.integrations.transformers import FisherMaskCallback

SENTENCES = [
    "a {} cat sat on the mat.",
    "the {} dog ran to the door.",
    "one {} bird flew over the house.",
]
WORDS = ["black", "small", "quiet", "quick", "old", "red"]


def texts(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sentences as bytes, with a few letters changed."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        text = bytearray(draw.choice(SENTENCES).format(draw.choice(WORDS)).ljust(40).encode())
        for place in draw.sample(range(40), 2):
            text[place] = draw.randrange(97, 123)
        ids = torch.tensor(list(text))
        found.append({"input_ids": ids, "labels": ids})
    return found


def main() -> None:
    """Train for three epochs, and print the share that learnt and the loss on other texts."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=3,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_steps=5,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        )
        callback = FisherMaskCallback(keep=0.25)
        trainer = Trainer(
            model,
            args,
            train_dataset=texts(192, seed=0),
            eval_dataset=texts(64, seed=1),
            callbacks=[callback],
        )
        trainer.train()
        print(f"share that learns: {callback.mask.kept_fraction:.3f}")
        print(f"loss on other texts: {trainer.evaluate()['eval_loss']:.3f}")


if __name__ == "__main__":
    main()
