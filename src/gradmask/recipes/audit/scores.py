"""Scores of training samples at one set of weights: influence on others, and baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gradmask

# Samples scored at a time: pairs with the probe set are never held for more of them.
BLOCK = 4096
# Samples whose influence on one another is measured to have that of each on itself.
SELF_BLOCK = 8
MEMORY = 1 << 31


@dataclass(frozen=True)
class Measured:
    """What the scores are made of, one value for each training sample (float64, on the CPU).

    Influence is ½ ε² gᵀ F g (equation 4), averaged over probe samples.

    Attributes:
        loss: Cross-entropy at the given label.
        margin: Logit of the given label minus the largest other.
        norm: Length of the sample's gradient g.
        own: Influence on the sample itself.
        everyone: Influence on the whole probe set, the sample itself included if it is in there.
        others: The same without the sample itself.
        same: Influence on other probe samples with the same given label.
        different: Influence on probe samples with other labels.
        diagonal: Diagonal form of the influence on the probe set (equation 9).
    """

    loss: Tensor
    margin: Tensor
    norm: Tensor
    own: Tensor
    everyone: Tensor
    others: Tensor
    same: Tensor
    different: Tensor
    diagonal: Tensor

    @property
    def same_share(self) -> Tensor:
        """Influence on the sample's own class, as a share of that and that on other classes."""
        return _ratio(self.same, self.same + self.different)

    @property
    def per_self(self) -> Tensor:
        """Influence on others for each nat of influence on the sample itself."""
        return _ratio(self.others, self.own)

    def per_norm(self, influences: Tensor) -> Tensor:
        """Influence of a gradient of length 1: the gradient's direction only."""
        return _ratio(influences, self.norm**2)


@dataclass(frozen=True)
class AuditScore:
    """A score of training samples.

    Attributes:
        name: Key in files and on the command line.
        title: In words.
        expected_high: Whether memorised samples were expected to have HIGH values, before any
            measurement. The paper's claim (equation 8) is that gradients that memorise have low
            influence on others. What is not fitted has a high loss, a large gradient, a low margin.
        high: Whether they were found to, in `results/audit`.
        baseline: Whether the score looks at no other sample.
        of: The score from what was measured.
    """

    name: str
    title: str
    expected_high: bool
    high: bool
    baseline: bool
    of: Callable[[Measured], Tensor]


_HIGH, _LOW = True, False

AUDIT_SCORES = (
    # name, title, expected order, order found, baseline, score
    AuditScore("loss", "loss", _HIGH, _HIGH, True, lambda m: m.loss),
    AuditScore("margin", "margin", _LOW, _LOW, True, lambda m: m.margin),
    AuditScore("norm", "gradient norm", _HIGH, _HIGH, True, lambda m: m.norm),
    AuditScore("self", "self-influence", _HIGH, _HIGH, True, lambda m: m.own),
    AuditScore("influence", "influence (eq. 4)", _LOW, _HIGH, False, lambda m: m.everyone),
    AuditScore("others", "influence, itself left out", _LOW, _HIGH, False, lambda m: m.others),
    AuditScore("same", "influence on its class", _LOW, _HIGH, False, lambda m: m.same),
    AuditScore(
        "different", "influence on other classes", _LOW, _HIGH, False, lambda m: m.different
    ),
    AuditScore("diagonal", "diagonal form (eq. 9)", _LOW, _HIGH, False, lambda m: m.diagonal),
    AuditScore("same_share", "share on its class", _LOW, _LOW, False, lambda m: m.same_share),
    AuditScore("per_self", "influence / self-influence", _LOW, _LOW, False, lambda m: m.per_self),
    AuditScore("per_norm", "influence / norm²", _LOW, _LOW, False, lambda m: m.per_norm(m.others)),
    AuditScore(
        "same_per_norm", "on its class / norm²", _LOW, _LOW, False, lambda m: m.per_norm(m.same)
    ),
    AuditScore(
        "different_per_norm",
        "on other classes / norm²",
        _LOW,
        _HIGH,
        False,
        lambda m: m.per_norm(m.different),
    ),
    AuditScore(
        "diagonal_per_norm",
        "diagonal form / norm²",
        _LOW,
        _LOW,
        False,
        lambda m: m.per_norm(m.diagonal),
    ),
)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """A quotient; 0 where a sample has no gradient left, and so no influence."""
    return torch.where(b > 0, a / b, 0.0)


def measure(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    prepare: Callable[[Tensor], Tensor],
    probe: Tensor,
    *,
    fisher: str,
    step: float,
    block: int = BLOCK,
) -> Measured:
    """Measure every training sample at the model's weights.

    Args:
        model: The network.
        images: Training images.
        labels: Their given labels.
        prepare: Turns images into the network's inputs.
        probe: Indices of the training samples on which influence is measured.
        fisher: Labels of the Fisher information: `empirical`, `sampled` or `exact`.
        step: Step size ε.
        block: Samples to measure at a time.

    Returns:
        One value of each kind for each sample.
    """
    probe = probe.to(labels.device)
    targets, inputs = labels[probe], prepare(images[probe])
    seen = (inputs, targets) if fisher == "empirical" else inputs
    parts = []
    for rows in torch.arange(len(labels), device=labels.device).split(block):
        samples = prepare(images[rows]), labels[rows]
        losses, margins = _outputs(model, *samples)
        norms = gradmask.gradient_norms(model, samples, memory=MEMORY).double()
        pairs = gradmask.influence(
            model, samples, seen, step=step, fisher=fisher, pairwise=True, memory=MEMORY
        ).double()
        diagonal = gradmask.influence(
            model, samples, seen, step=step, fisher=fisher, method="diagonal", memory=MEMORY
        )
        if fisher == "empirical":  # F is g gᵀ there
            own = 0.5 * step**2 * norms**4
        else:
            own = _self_influence(model, samples, fisher, step)
        itself = probe == rows[:, None]
        same = (targets == samples[1][:, None]) & ~itself
        others = _mean(pairs, ~itself)
        # A class with no other sample in the probe set counts as any other.
        alike = torch.where(same.any(1), _mean(pairs, same), others)
        different = _mean(pairs, targets != samples[1][:, None])
        found = (losses, margins, norms, own, pairs.mean(1), others, alike, different, diagonal)
        parts.append([value.double().cpu() for value in found])
    return Measured(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    model.eval()
    logits = torch.cat([model(part) for part in inputs.split(1024)]).double()
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    given = logits.gather(1, labels[:, None])[:, 0]
    rest = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return losses, given - rest


def _self_influence(
    model: nn.Module, samples: tuple[Tensor, Tensor], fisher: str, step: float
) -> Tensor:
    parts = zip(*(values.split(SELF_BLOCK) for values in samples), strict=True)
    return torch.cat(
        [
            gradmask.influence(model, (x, y), x, step=step, fisher=fisher, pairwise=True).diagonal()
            for x, y in parts
        ]
    )


def _mean(pairs: Tensor, wanted: Tensor) -> Tensor:
    return torch.where(wanted, pairs, 0.0).sum(1) / wanted.sum(1).clamp_min(1)
