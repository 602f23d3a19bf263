"""Language models of Transformers as networks that speed is measured on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gradmask.errors import OptionError

# Four layers, 256 wide, a vocabulary of 2,000; the rest is the class's own default.
SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 1024},
    "bert": {"intermediate_size": 1024},
    "llama": {"intermediate_size": 688, "num_key_value_heads": 4},
}
_SHARED = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}


class LanguageModel(nn.Module):
    """Logits (samples, vocabulary, positions) of token ids (samples, positions).

    Args:
        model: A model of Transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """The classes come second, as PyTorch's losses have them."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.movedim(-1, 1)


def language_model(name: str, *, small: bool) -> LanguageModel:
    """Build a causal or masked language model from its configuration, with random weights.

    Args:
        name: Its type in Transformers, for example `gpt2`, `bert` or `llama`.
        small: Whether with four layers, or as the configuration's defaults have it.

    Raises:
        OptionError: If Transformers is missing, or has no such model.
    """
    try:
        import transformers
    except ImportError as error:
        raise OptionError(
            f"model='transformers:{name}' needs Transformers: pip install 'gradmask[transformers]'."
        ) from error
    transformers.logging.set_verbosity_error()
    sizes = {**({} if name == "gpt2" else _SHARED), **SMALL[name]} if small else {}
    words = {"vocab_size": 2000, "bos_token_id": 0, "eos_token_id": 0} if small else {}
    try:
        config = transformers.AutoConfig.for_model(name, **sizes, **words)
        causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and name != "bert"
        kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
        return LanguageModel(kind.from_config(config))
    except (ValueError, KeyError) as error:
        raise OptionError(
            f"model='transformers:{name}' is no language model of Transformers {error}."
        ) from error
