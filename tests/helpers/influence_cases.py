"""Models and data whose influence is measured, and what follows from its definition."""

import cases
import torch
import torch.nn.functional as F
from cases import CLASSES, Net, all_bits, all_labels, call, randomise
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._pytree import tree_map

from gradmask import influence

STEP = 0.03


def one_of(data, i):
    return tree_map(lambda t: t[i : i + 1] if isinstance(t, torch.Tensor) else t, data)


def flat_gradient(model, value):
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(parameters, found, strict=True)
        ]
    )


def source_gradients(model, sources, loss):
    inputs, targets = sources
    return torch.stack(
        [
            flat_gradient(model, loss(call(model, one_of(inputs, i)), targets[i : i + 1]))
            for i in range(len(targets))
        ]
    )


def fisher_matrices(model, probe, targets, loss, labels):
    for i in range(len(targets)):
        outputs = call(model, one_of(probe, i))
        total = 0.0
        for weight, target in labels(outputs, targets[i : i + 1]):
            g = flat_gradient(model, loss(outputs, target))
            total = total + weight * torch.outer(g, g)
        yield total


# One matrix F for each probe sample, by a loop over all of its labels.
def expected_forms(case, labels):
    """½ ε² g_iᵀ F(x_j) g_i and ½ ε² Σ_k a_kk g_ik²."""
    case.model.eval()
    g = source_gradients(case.model, case.sources, case.loss)
    matrices = list(fisher_matrices(case.model, *case.probe, case.loss, labels))
    pairs = [torch.einsum("ia,ab,ib->i", g, f, g) for f in matrices]
    diagonal = sum(f.diagonal() for f in matrices) / len(matrices)
    return 0.5 * STEP**2 * torch.stack(pairs, 1), 0.5 * STEP**2 * (g.square() @ diagonal)


def expected_divergences(case, step):
    """Σ_c p_c log(p_c / q_c) from two plain forward passes for each pair."""
    case.model.eval()
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    rows = []
    for g in source_gradients(case.model, case.sources, case.loss):
        pairs = []
        for i in range(len(case.probe[1])):
            x = one_of(case.probe[0], i)
            with torch.no_grad():
                p = case.log_probabilities(call(case.model, x))
                start = 0
                old = [q.clone() for q in parameters]
                for q in parameters:
                    q -= step * g[start : start + q.numel()].view_as(q)
                    start += q.numel()
                q = case.log_probabilities(call(case.model, x))
                for parameter, value in zip(parameters, old, strict=True):
                    parameter.copy_(value)
            pairs.append((p.exp() * (p - q)).sum())
        rows.append(torch.stack(pairs))
    return torch.stack(rows)


class Case:
    """A model, sources and a probe, and what its outputs mean."""

    def __init__(self, model, inputs, targets, name="cross_entropy", sizes=(3, 5), classes=1):
        self.model, self.name, self.dimension = randomise(model), name, classes
        self.sources, self.probe = ((inputs(n), targets(n)) for n in sizes)
        self.labels = all_bits if name == "bernoulli" else self._all_labels
        self.loss = cases.bernoulli if name == "bernoulli" else self._cross_entropy

    def _cross_entropy(self, outputs, target):
        return cases.cross_entropy(outputs.movedim(self.dimension, 1), target)

    def _all_labels(self, outputs, target):
        return all_labels(outputs.movedim(self.dimension, 1), target)

    def log_probabilities(self, outputs):
        if self.name == "bernoulli":
            return torch.stack([F.logsigmoid(outputs), F.logsigmoid(-outputs)])
        return outputs.log_softmax(self.dimension)

    def measure(self, **options):
        probe = self.probe if options.get("fisher") == "empirical" else self.probe[0]
        return influence(
            self.model, self.sources, probe, **{"loss": self.name, "step": STEP} | options
        )


def labels(*positions, classes=CLASSES):
    return lambda n: torch.randint(classes, (n, *positions))


def bits(*shape):
    return lambda n: torch.randint(2, (n, *shape)).double()


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES))


def cnn():
    layers = (nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh(), nn.Conv2d(2, 2, 3))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, CLASSES))


def frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def tied():
    """A layer called twice whose weight is also the head's."""
    layer = nn.Linear(4, 4)
    model = Net(lambda m, x: m.head(m.layer(m.layer(x).tanh()).tanh()), layer=layer)
    model.head = nn.Linear(4, 4)
    model.head.weight = layer.weight
    return model


def unused():
    return Net(lambda m, x: m.net(x), net=mlp(), spare=nn.Linear(2, 2))


def bare():
    """Parameters outside of layers: a product, a sum, and one that only autograd can explain."""
    return Net(
        lambda m, x: (
            (m.net(x) * m.scale + m.shift) @ torch.linalg.matrix_exp(m.odd) / m.temperature
        ),
        net=mlp(),
        temperature=nn.Parameter(torch.tensor(1.3)),  # without a dimension
        scale=nn.Parameter(torch.ones(CLASSES)),
        shift=nn.Parameter(torch.zeros(CLASSES)),
        odd=nn.Parameter(torch.zeros(CLASSES, CLASSES)),
    )


def recurrent():
    def forward(m, x):
        return m.head(m.rnn(x)[0][:, -1])

    return Net(forward, rnn=nn.LSTM(2, 3, batch_first=True), head=nn.Linear(3, CLASSES))


def attention():
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
    return Net(lambda m, x: m.head(m.layer(x).mean(1)), layer=layer, head=nn.Linear(4, CLASSES))


def language():
    """Logits (N, T, C) with the embedding as the head."""

    def forward(m, tokens):
        return F.linear(m.norm(m.embed(tokens)), m.embed.weight)

    return Net(forward, embed=nn.Embedding(4, 3), norm=nn.LayerNorm(3))


def two_inputs():
    return Net(lambda m, a, b: m.a(a) * m.b(b), a=nn.Linear(2, CLASSES), b=nn.Linear(3, CLASSES))


def keywords(n):
    return {"a": torch.randn(n, 2).double(), "b": torch.randn(n, 3).double()}


def sequence():
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 3, 1))


CASES = {
    "mlp": lambda **k: Case(mlp(), cases.floats(3), labels(), **k),
    "cnn": lambda **k: Case(cnn(), cases.floats(1, 4, 4), labels(), **k),
    "frozen": lambda **k: Case(frozen(), cases.floats(3), labels(), **k),
    "tied": lambda **k: Case(tied(), cases.floats(4), labels(), **k),
    "unused": lambda **k: Case(unused(), cases.floats(3), labels(), **k),
    "bare": lambda **k: Case(bare(), cases.floats(3), labels(), **k),
    "recurrent": lambda **k: Case(recurrent(), cases.floats(3, 2), labels(), **k),
    "attention": lambda **k: Case(attention(), cases.floats(3, 4), labels(), **k),
    "parametrised": lambda **k: Case(
        nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, CLASSES)),
        cases.floats(3),
        labels(),
        **k,
    ),
    "keywords": lambda **k: Case(two_inputs(), keywords, labels(), **k),
    "sequence": lambda **k: Case(sequence(), cases.floats(2, 4), labels(3, classes=3), **k),
    "language": lambda **k: Case(
        language(), cases.tokens(3, vocabulary=4), labels(3), classes=2, **k
    ),
    "one logit": lambda **k: Case(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
        cases.floats(3),
        bits(1),
        "bernoulli",
        **k,
    ),
    "flat logit": lambda **k: Case(
        Net(lambda m, x: m.fc(x).squeeze(1), fc=nn.Linear(3, 1)),
        cases.floats(3),
        bits(),
        "bernoulli",
        **k,
    ),
    "many bits": lambda **k: Case(nn.Linear(3, 3), cases.floats(3), bits(3), "bernoulli", **k),
}

# PyTorch has no forward derivative of its fused weight normalisation.
FORWARD = [name for name in CASES if name != "parametrised"]

WAYS = [
    {"method": "kl"},
    {},
    {"fisher": "empirical"},
    {"fisher": "sampled"},
    {"method": "diagonal"},
    {"method": "diagonal", "fisher": "sampled"},
]
