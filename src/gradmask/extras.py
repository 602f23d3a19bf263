"""What parts of the package need beside torch, checked before they begin."""

from __future__ import annotations

from importlib.util import find_spec

_MODULES = {
    "study": (
        *("distributed", "filelock", "jinja2", "yaml", "rich", "scipy", "tensorboard"),
        "vl_convert",
    ),
    "experiments": ("torchvision", "datasets", "sklearn", "matplotlib"),
    "peft": ("peft",),
}


def require(extra: str, what: str) -> None:
    """Refuse to begin where an extra of the package is not installed; nothing is imported.

    Args:
        extra: Its name in `pip install 'gradmask[...]'`.
        what: What needs it.

    Raises:
        ImportError: If a module of it is not there; `name` is the first one.
    """
    missing = [module for module in _MODULES[extra] if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"{what} needs {', '.join(missing)}: pip install 'gradmask[{extra}]'.", name=missing[0]
        )
