"""Per-sample parameter gradients of one layer, from its input and the gradient of its output.

A rule maps `(module, input, grad_output)`, both with the samples first, to
`{"weight": (N, *weight.shape), "bias": (N, *bias.shape)}`: positions (pixels, tokens) are summed
BEFORE anything is squared. A layer may have a second function that adds up the squares over the
samples directly, where that is cheaper than forming the per-sample gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

Rule = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]
AddSquares = Callable[[nn.Module, Tensor, Tensor, dict[str, Tensor]], None]
AddMoments = Callable[[nn.Module, Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]], None]
WeighSquares = Callable[[nn.Module, Tensor, Tensor, dict[str, Tensor]], Tensor | None]


class Product(NamedTuple):
    """Per-sample gradients as products of matrices: deltas @ unfold(inputs)ᵀ, and Σ deltas.

    Attributes:
        deltas: Gradients of the outputs, shape (N, K, P): P positions of K features.
        inputs: Shape (N, C, ...); part of the channels gives that part of the weight's columns.
        unfold: Makes inputs what the weight is multiplied by, shape (N, D, P).
    """

    deltas: Tensor
    inputs: Tensor
    unfold: Callable[[Tensor], Tensor]


AsProduct = Callable[[nn.Module, Tensor, Tensor], Product | None]

# Per-sample gradients are formed for as many samples at a time as fit in this many elements: on a
# CPU few enough to stay in its cache until they are squared, on a GPU enough to keep it busy.
CHUNK_ELEMENTS = 1 << 20
CHUNK_ELEMENTS_CUDA = 1 << 26


@dataclass(frozen=True)
class LayerRule:
    """A layer type's rule, the names it covers, and perhaps cheaper ways to the results."""

    layer: type[nn.Module]
    per_sample: Rule
    add_squares: AddSquares | None
    parameters: tuple[str, ...]
    weigh_squares: WeighSquares | None = None
    as_product: AsProduct | None = None
    add_moments: AddMoments | None = None


_RULES: dict[type[nn.Module], LayerRule] = {}


def register_rule(
    *layers: type[nn.Module],
    add_squares: AddSquares | None = None,
    parameters: tuple[str, ...] = ("weight", "bias"),
    weigh_squares: WeighSquares | None = None,
    as_product: AsProduct | None = None,
    add_moments: AddMoments | None = None,
) -> Callable[[Rule], Rule]:
    """Register a per-sample gradient rule for layer types, as a decorator.

    Example:
        ```python
        @gradmask.register_rule(Scale, parameters=("scale",))
        def scale_rule(module, input, grad_output):
            return {"scale": (grad_output * input).flatten(2).sum(2)}
        ```

    Args:
        layers: Module types; a subclass inherits the rule unless it overrides `forward`.
        add_squares: Optional function `(module, input, grad_output, totals)` that adds the sum over
            samples of the squared per-sample gradients, in place, to each of the tensors in
            `totals`, a dict by the layer's own parameter names; what is not wanted is not there.
        parameters: Names of the layer's own parameters that the rule covers.
        weigh_squares: Optional function `(module, input, grad_output, weights)` that sums each
            sample's squared gradients times the tensors in `weights`, a dict like `totals`, and
            returns shape (samples,), or None where it cannot.
        as_product: Optional function `(module, input, grad_output)` that gives the gradients of
            `weight` and `bias` as a product of matrices, or None.
        add_moments: Optional function `(module, input, grad_output, totals, sums)` that does what
            `add_squares` does, and adds the sum over samples of the gradients themselves to the
            tensors in `sums`, a dict like `totals`; without it autograd sums them up.

    Returns:
        The decorator; it returns the rule unchanged.
    """

    def decorate(rule: Rule) -> Rule:
        for layer in layers:
            _RULES[layer] = LayerRule(
                layer, rule, add_squares, parameters, weigh_squares, as_product, add_moments
            )
        return rule

    return decorate


def find_rule(module: nn.Module) -> LayerRule | None:
    """Return the rule for a module, or None if none is sure to be right.

    Args:
        module: Any module.

    Returns:
        The rule of the nearest class in the MRO whose `forward` the module still uses.
    """
    if isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.max_norm):
        return None
    if any(p is not None and p.is_complex() for p in module._parameters.values()):
        return None
    for cls in type(module).__mro__:
        rule = _RULES.get(cls)
        if rule is not None:
            same = all(
                getattr(type(module), name, None) is getattr(cls, name, None)
                for name in ("forward", "_conv_forward")
            )
            return rule if same and "forward" not in vars(module) else None
    return None


def chunk_size(parameters: Iterable[Tensor]) -> int:
    """Samples whose gradients of these parameters are formed at a time, at least 1."""
    found = list(parameters)
    cuda = any(p.is_cuda for p in found)
    elements = max(1, sum(p.numel() for p in found))
    return max(1, (CHUNK_ELEMENTS_CUDA if cuda else CHUNK_ELEMENTS) // elements)


def squared(gradient: Tensor) -> Tensor:
    """The squared modulus, which is real for complex gradients as well."""
    return gradient.abs().square() if gradient.is_complex() else gradient.square()


def add_squares(total: Tensor, gradients: Tensor, *, spare: bool = False) -> None:
    """Add the squared moduli of per-sample gradients (n, *shape) to a total of that shape.

    Args:
        total: Changed in place.
        gradients: The gradients.
        spare: Whether they may be overwritten.
    """
    if len(gradients) == 1 and not gradients.is_complex():
        total.addcmul_(gradients[0], gradients[0])
    elif gradients.is_cuda:  # one reading, and no squares in memory
        norms = torch.linalg.vector_norm(gradients, dim=0)
        total.addcmul_(norms, norms)
    else:
        total += (gradients.square_() if spare else squared(gradients)).sum(0)


def trains(module: nn.Module, name: str) -> bool:
    """Whether a layer has a parameter of that name that is trained."""
    parameter = module._parameters.get(name)
    return parameter is not None and parameter.requires_grad


def _scale_and_shift(module: nn.Module, normalised: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Gradients of y = w * x̂ + b with channels in dimension 1."""
    out = {}
    if trains(module, "weight"):
        out["weight"] = (g * normalised).reshape(*g.shape[:2], -1).sum(2)
    if trains(module, "bias"):
        out["bias"] = g.reshape(*g.shape[:2], -1).sum(2)
    return out


@register_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batch_norm(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Scale and shift after normalisation by the running statistics."""
    assert isinstance(module, _BatchNorm)
    assert module.running_mean is not None
    assert module.running_var is not None
    # The channels of all samples side by side are those of one sample: one reading gives both sums.
    one = (1, -1, *x.shape[2:])
    unknown = x.new_empty(0)  # statistics of the batch: CUDA wants empty tensors
    mean, var = (s.to(x.dtype).repeat(len(x)) for s in (module.running_mean, module.running_var))
    _, weight, bias = torch.ops.aten.native_batch_norm_backward(
        g.reshape(one).contiguous(),
        x.reshape(one).contiguous(),
        torch.ones_like(mean),  # CUDA wants them
        mean,
        var,
        unknown,
        unknown,
        False,
        module.eps,
        [False, True, True],
    )
    found = {"weight": weight, "bias": bias}
    return {name: t.view(x.shape[:2]) for name, t in found.items() if trains(module, name)}


@register_rule(nn.GroupNorm)
def group_norm(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Scale and shift after normalisation over groups of channels."""
    assert isinstance(module, nn.GroupNorm)
    return _scale_and_shift(module, F.group_norm(x, module.num_groups, eps=module.eps), g)


@register_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Scale and shift after normalisation of each channel (running statistics if tracked)."""
    assert isinstance(module, _InstanceNorm)
    own = module.training or not module.track_running_stats
    mean, var = (None, None) if own else (module.running_mean, module.running_var)
    normalised = F.instance_norm(x, mean, var, use_input_stats=own, eps=module.eps)
    return _scale_and_shift(module, normalised, g)


@register_rule(nn.LayerNorm, nn.RMSNorm)
def layer_norm(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Elementwise scale and shift over the last dimensions, summed over the positions."""
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    shape = list(module.normalized_shape)
    if isinstance(module, nn.LayerNorm):
        normalised = F.layer_norm(x, shape, eps=module.eps)
    else:
        normalised = F.rms_norm(x, shape, eps=module.eps)
    positions = (len(x), -1, *shape)
    out = {}
    if trains(module, "weight"):
        out["weight"] = (g * normalised).reshape(positions).sum(1)
    if trains(module, "bias"):
        out["bias"] = g.reshape(positions).sum(1)
    return out


def embedding_rows(module: nn.Embedding, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient rows summed over a sample's positions of the same token: (keys, rows).

    A key is sample * num_embeddings + token.
    """
    tokens, g = x.reshape(len(x), -1), g.reshape(len(x), -1, g.shape[-1])
    if module.padding_idx is not None:
        g = g * (tokens != module.padding_idx).unsqueeze(-1)
    samples = torch.arange(len(x), device=x.device).unsqueeze(1)
    keys, inverse = (
        (samples * module.num_embeddings + tokens).reshape(-1).unique(return_inverse=True)
    )
    rows = g.new_zeros(len(keys), g.shape[-1])
    return keys, rows.index_add_(0, inverse, g.reshape(-1, g.shape[-1]))


def _add_embedding_squares(
    module: nn.Module, x: Tensor, g: Tensor, totals: dict[str, Tensor]
) -> None:
    assert isinstance(module, nn.Embedding)
    keys, rows = embedding_rows(module, x, g)
    totals["weight"].index_add_(0, keys % module.num_embeddings, rows.square_())


@register_rule(nn.Embedding, add_squares=_add_embedding_squares)
def embedding(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Rows of the output gradient added up by token; input (N, ...) of integers."""
    assert isinstance(module, nn.Embedding)
    keys, rows = embedding_rows(module, x, g)
    weight = g.new_zeros(len(x) * module.num_embeddings, g.shape[-1])
    weight[keys] = rows
    return {"weight": weight.reshape(len(x), module.num_embeddings, -1)}
