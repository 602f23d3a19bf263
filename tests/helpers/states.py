"""What a model is before and after it was measured."""

import torch
from cases import Net, randomise, readout
from torch import nn


class Failure(Exception):
    """Thrown by the model or the loader of a test."""


def build():
    """Layers with and without a rule, random in training, in mixed modes, some with `.grad`."""

    def forward(m, x):
        h = m.drop(m.norm(m.conv(x)).relu())
        if m.fail_after is not None and h.shape[0] == m.fail_after:
            raise Failure
        return readout(m.act(m.head(h)) * m.scale)

    model = Net(
        forward,
        conv=nn.Conv1d(2, 3, 2),
        norm=nn.BatchNorm1d(3),
        drop=nn.Dropout(0.5),
        head=nn.Linear(3, 3),
        act=nn.RReLU(),
        scale=nn.Parameter(torch.randn(3)),
    )
    model.fail_after = None
    randomise(model)
    model.train()
    model.norm.eval()
    model.head.bias.requires_grad_(False)
    model.conv.weight.grad = torch.randn_like(model.conv.weight)
    model.head.weight.grad = None
    return model


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def state(model):
    """All that must not change, in a form that compares equal."""
    return {
        "tensors": {
            k: (v.data_ptr(), v._version, v.tolist()) for k, v in model.state_dict().items()
        },
        "modes": {name: m.training for name, m in model.named_modules()},
        "gradients": {
            n: None if p.grad is None else p.grad.tolist() for n, p in model.named_parameters()
        },
        "same gradients": {
            n: id(p.grad) for n, p in model.named_parameters() if p.grad is not None
        },
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "parameters": {n: id(p) for n, p in model.named_parameters()},
        "parameter hooks": {n: len(p._backward_hooks or ()) for n, p in model.named_parameters()},
        "hooks": {
            name: [list(getattr(m, kind).items()) for kind in HOOKS]
            for name, m in model.named_modules()
        },
        "random": torch.get_rng_state().tolist(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
    }
