"""Records the logits of the forward pass that a training step makes anyway."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradmask.audit import Dynamics
from gradmask.errors import DataError, ModelError

# Language models whose own loss does not shift, though they predict the next token.
_UNSHIFTED = {
    *("BartForCausalLM", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM"),
    *("BlenderbotSmallForCausalLM", "CpmAntForCausalLM", "FlaubertWithLMHeadModel"),
    *("MBartForCausalLM", "MarianForCausalLM", "MvpForCausalLM", "PLBartForCausalLM"),
    *("PegasusForCausalLM", "ProphetNetForCausalLM", "TrOCRForCausalLM", "WhisperForCausalLM"),
    *("XLMWithLMHeadModel", "XLNetLMHeadModel"),
}


class StepRecorder:
    """Updates dynamics with the first logits, one row a sample, of each training step.

    Args:
        dynamics: What is updated.
        mend: What the user can do if a step has no such logits.
        shift: Whether logits at one place are of the label at the next.
        classes_last: Whether logits of a sequence end in their classes, whatever the sizes.
        first: Called once, before the first update.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        mend: str,
        *,
        shift: bool = False,
        classes_last: bool = False,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        self.dynamics, self.mend, self.shift, self.first = dynamics, mend, shift, first
        self.classes_last = classes_last
        self._recorded = self._taken = self._shifted = False
        self._shapes: list[str] = []
        self._handle: Any = None
        self._ids = self._labels = torch.zeros(0, dtype=torch.int64, device="cpu")

    def begin(self, module: nn.Module, ids: Tensor, labels: Tensor, shift: bool = True) -> None:
        """Watch a module from here on.

        Args:
            module: Whose outputs are or have the logits.
            ids: Numbers of the batch's samples.
            labels: Their labels.
            shift: Whether these labels are to be shifted, if any are.

        Raises:
            ModelError: If the module is compiled in place, where hooks are part of its code.
        """
        self.cancel()
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ModelError(
                f"{type(module).__name__} was compiled in place (module.compile()), which leaves "
                "no place to see its outputs: use torch.compile(module), or torch_compile=True of "
                "the Trainer."
            )
        self._ids, self._labels, self._shifted = ids, labels, shift and self.shift
        self._taken, self._shapes = False, []
        self._handle = module.register_forward_hook(self._note)

    def end(self) -> None:
        """The step has ended.

        Raises:
            ModelError: If no call had logits of the batch's samples, unless a later step called
                nothing at all.
        """
        self.cancel()
        if not self._taken and (self._shapes or not self._recorded):
            found = "; ".join(self._shapes[:3]) or "it was not called in training"
            raise ModelError(
                f"No logits of the {len(self._ids)} samples of a training batch were seen "
                f"({found}): {self.mend}"
            )

    def cancel(self) -> None:
        """Take the hook off."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _note(self, module: nn.Module, _: Any, outputs: Any) -> None:
        if self._taken or not (module.training and torch.is_grad_enabled()):
            return
        logits = logits_of(outputs)
        if logits is None or len(logits) != len(self._ids):
            what = type(outputs).__name__ if logits is None else f"shape {tuple(logits.shape)}"
            self._shapes.append(f"it returned {what}")
            return
        if not self._recorded:
            self.first()
        self._taken = self._recorded = True
        logits, labels = logits.detach(), self._labels
        sequences = logits.dim() == 3 and labels.dim() == 2
        if sequences and self._shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        if sequences and self.classes_last and logits.shape[:2] == labels.shape:
            logits, labels = logits[:, :, None], labels[:, :, None]  # also of as many classes
        with torch.autocast(logits.device.type, enabled=False):
            self.dynamics.update(self._ids, logits, labels)


def logits_of(outputs: Any) -> Tensor | None:
    """The logits among what a model returned: `logits`, or the first tensor that is no loss.

    Args:
        outputs: A tensor, an output of Hugging Face's, a mapping or a tuple.
    """
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    elif isinstance(outputs, tuple | list):
        found = next((o for o in outputs if isinstance(o, Tensor) and o.dim() > 0), None)
    else:
        found = getattr(outputs, "logits", outputs)
    fits = isinstance(found, Tensor) and found.is_floating_point() and found.dim() > 0
    return found if fits else None


def unwrapped(model: Any) -> Any:
    """The model inside those that distribute, compile or adapt it.

    Args:
        model: The model.
    """
    while isinstance(model, nn.Module):
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__.endswith("DataParallel"):
            inner = model.module
        if inner is None and hasattr(model, "get_base_model"):  # of PEFT
            inner = cast(Any, model).get_base_model()
        if inner is None or inner is model:
            break
        model = inner
    return model


def is_hugging_face(model: Any) -> bool:
    """Whether a model is one of Hugging Face's, whose logits of sequences end in the classes.

    Args:
        model: The model.
    """
    return any(kind.__name__ == "PreTrainedModel" for kind in type(unwrapped(model)).__mro__)


def shifts(model: Any) -> bool:
    """Whether a model's own loss compares the logits at one place with the label at the next.

    Args:
        model: The model, of Hugging Face's or another one (which does not).
    """
    if "transformers" not in sys.modules:
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model = unwrapped(model)
    names = {kind.__name__ for kind in type(model).__mro__}
    config = getattr(model, "config", None)
    if names & _UNSHIFTED or getattr(config, "is_encoder_decoder", False):
        return False
    if names & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return True
    try:
        from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
    except ImportError:  # of another version
        return False
    return LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss


def labels_of(batch: Any, names: tuple[str, ...], mend: str) -> Tensor:
    """The labels of a training batch.

    Args:
        batch: A mapping, or a tuple or list whose second entry they are.
        names: Their names in a mapping.
        mend: What the user can do if there are none.

    Raises:
        DataError: If there are none.
    """
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in names if name in batch), None)
        where = f"names {', '.join(map(str, batch))}"
    elif isinstance(batch, tuple | list):
        found = batch[1] if len(batch) > 1 else None
        where = f"{len(batch)} entries"
    else:
        found, where = None, f"type {type(batch).__name__}"
    if not isinstance(found, Tensor):
        raise DataError(f"A training batch ({where}) has no tensor of labels: {mend}")
    return found
