"""Small runs of the recipe theorem1."""

from gradmask.recipes.theorem.config import SIZES, TheoremCheck


def options(folder, **changes):
    small = {
        "train_size": 200,
        "models": ("mlp", "small_cnn"),
        "sources": 5,
        "probe": 4,
        "steps": 7,
    }
    fixed = {"seeds": (0, 1), "epochs": 1, "device": "cpu", "output": folder}
    return TheoremCheck(**(SIZES["digits"] | small | fixed | changes))
