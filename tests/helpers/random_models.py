"""Small random networks of parts that break things, and random or degenerate data for them.

Every network maps (N, T, D) to logits, treats its samples independently, and takes any N.
"""

import random

import torch
import torch.nn.functional as F
from cases import CLASSES, Net, readout
from torch import nn

T, D = 4, 3


def linear():
    return nn.Linear(D, D)


def fold(m, h):
    return m.fc(h.flatten(0, 1)).unflatten(0, (-1, T))


def fold_time_first(m, h):
    return m.fc(h.transpose(0, 1).flatten(0, 1)).unflatten(0, (T, -1)).transpose(0, 1)


def split(m, h):
    first, second = h.split([1, T - 1], 1)
    return torch.cat([m.fc(first), m.other(second)], 1)


def gathered(m, h):
    place = h.detach().sum(-1, keepdim=True).argmax(1, keepdim=True).expand(-1, 2, D)
    return h + m.fc(h.gather(1, place)).mean(1, keepdim=True)


def selected(m, h):
    chosen = h.detach()[..., 0] > 0
    return h.index_put((chosen,), m.fc(h[chosen]))


def lengths_of(h):
    return (1 + (h.detach()[:, :, 0] > 0).sum(1)).clamp(max=T).tolist()


def bags(m, h):
    """Rows of all samples, as many as each has, in one layer."""
    n = lengths_of(h)
    rows = m.fc(torch.cat([x[:k] for x, k in zip(h, n, strict=True)]))
    return h + torch.stack([r.mean(0) for r in rows.split(n)]).unsqueeze(1)


def bags_of_a_product(m, h):
    n = lengths_of(h)
    rows = torch.cat([x[:k] for x, k in zip(h, n, strict=True)]) @ m.p
    return h + torch.stack([r.mean(0) for r in rows.split(n)]).unsqueeze(1)


def packed(m, h):
    sequence = nn.utils.rnn.pack_padded_sequence(h, lengths_of(h), True, False)
    out, _ = nn.utils.rnn.pad_packed_sequence(m.rnn(sequence)[0], True, total_length=T)
    return out


def sorted_samples(m, h):
    order = h.detach().sum((1, 2)).argsort()
    back = m.fc(h[order])
    return back[order.argsort()]


def sorted_by_slices(m, h):
    order = h.detach().sum((1, 2)).argsort().tolist()
    rows = m.fc(torch.stack([h[i] for i in order]))
    return torch.stack([rows[order.index(i)] for i in range(len(h))])


def routed(m, h):
    rows = h.flatten(0, 1)
    first = rows.detach()[:, 0] > 0
    out = torch.zeros_like(rows)
    out = out.index_put((first,), m.fc(rows[first])).index_put((~first,), m.other(rows[~first]))
    return out.view_as(h)


def twice_as_many(m, h):
    """Two views of each sample, one after the other in the batch, as in contrastive learning."""
    a, b = m.fc(torch.cat([h, h.flip(1)])).chunk(2)
    return a * b.cos()


def interleaved(m, h):
    pairs = torch.stack([h, h.flip(1)], 1).flatten(0, 1)
    return m.fc(pairs).unflatten(0, (-1, 2)).sum(1)


def repeated(m, h):
    """Each sample as often as its data say."""
    n = torch.tensor(lengths_of(h))
    rows = m.fc(h.repeat_interleave(n, 0))
    owner = torch.arange(len(h)).repeat_interleave(n)
    return torch.zeros_like(h).index_add(0, owner, rows)


def attention(m, h):
    h = h if m.attend.batch_first else h.transpose(0, 1)
    out = m.attend(h, h, h, need_weights=False)[0]
    return out if m.attend.batch_first else out.transpose(0, 1)


def recurrent(m, h):
    out = m.rnn(h if m.rnn.batch_first else h.transpose(0, 1))[0]
    return out if m.rnn.batch_first else out.transpose(0, 1)


def tokens(h):
    return (h.detach()[..., 0] > 0).long() + (h.detach()[..., 1] > 0).long()


def choice(m, h):
    """Another layer, if the first sample's... own sign says so: for each sample alone."""
    return torch.stack([m.fc(x) if x[0, 0] > 0 else m.other(x).tanh() for x in h])


def steps(m, h):
    state = torch.zeros_like(h[:, 0])
    out = []
    for t in range(T):
        state = (m.fc(h[:, t]) + state @ m.p).tanh()
        out.append(state)
    return torch.stack(out, 1)


def p(*shape):
    return nn.Parameter(torch.randn(shape))


PARTS = {
    "linear": lambda: Net(lambda m, h: m.fc(h), fc=linear()),
    "time-first": lambda: Net(lambda m, h: m.fc(h.transpose(0, 1)).transpose(0, 1), fc=linear()),
    "features-first": lambda: Net(
        lambda m, h: m.fc(h.permute(1, 0, 2)).permute(1, 0, 2), fc=linear()
    ),
    "fold": lambda: Net(fold, fc=linear()),
    "fold-time-first": lambda: Net(fold_time_first, fc=linear()),
    "conv": lambda: Net(lambda m, h: m.c(h.mT).mT, c=nn.Conv1d(D, D, 3, padding=1)),
    "conv-over-features": lambda: Net(lambda m, h: m.c(h), c=nn.Conv1d(T, T, 3, padding=1)),
    "depthwise": lambda: Net(lambda m, h: m.c(h.mT).mT, c=nn.Conv1d(D, D, 3, padding=1, groups=D)),
    "batch-norm": lambda: Net(lambda m, h: m.n(h.mT).mT, n=nn.BatchNorm1d(D)),
    "batch-norm-fold": lambda: Net(
        lambda m, h: m.n(h.flatten(0, 1)).view_as(h), n=nn.BatchNorm1d(D)
    ),
    "layer-norm": lambda: Net(lambda m, h: m.n(h), n=nn.LayerNorm(D)),
    "layer-norm-time-first": lambda: Net(
        lambda m, h: m.n(h.transpose(0, 1)).transpose(0, 1), n=nn.LayerNorm(D)
    ),
    "group-norm": lambda: Net(lambda m, h: m.n(h), n=nn.GroupNorm(2, T)),
    "scale": lambda: Net(lambda m, h: h * m.p, p=p(D)),
    "position": lambda: Net(lambda m, h: h + m.p, p=p(T, D)),
    "scale-time-first": lambda: Net(lambda m, h: (h.transpose(0, 1) * m.p).transpose(0, 1), p=p(D)),
    "product": lambda: Net(lambda m, h: h @ m.p, p=p(D, D)),
    "product-time-first": lambda: Net(
        lambda m, h: (h.transpose(0, 1) @ m.p).transpose(0, 1), p=p(D, D)
    ),
    "mix-positions": lambda: Net(lambda m, h: m.p @ h, p=p(T, T)),
    "einsum": lambda: Net(lambda m, h: torch.einsum("ntd,de->nte", h, m.p), p=p(D, D)),
    "einsum-square": lambda: Net(lambda m, h: torch.einsum("ntd,tde->nte", h, m.p), p=p(T, D, D)),
    "quadratic": lambda: Net(lambda m, h: h + (h @ m.p @ h.mT) @ h, p=p(D, D)),
    "normalised-weight": lambda: Net(lambda m, h: F.linear(h, m.p / m.p.norm()), p=p(D, D)),
    "split": lambda: Net(split, fc=linear(), other=linear()),
    "gather": lambda: Net(gathered, fc=linear()),
    "select": lambda: Net(selected, fc=linear()),
    "bags": lambda: Net(bags, fc=linear()),
    "bags-of-a-product": lambda: Net(bags_of_a_product, p=p(D, D)),
    "packed": lambda: Net(packed, rnn=nn.GRU(D, D, batch_first=True)),
    "sorted": lambda: Net(sorted_samples, fc=linear()),
    "sorted-by-slices": lambda: Net(sorted_by_slices, fc=linear()),
    "routed": lambda: Net(routed, fc=linear(), other=linear()),
    "twice": lambda: Net(twice_as_many, fc=linear()),
    "interleaved": lambda: Net(interleaved, fc=linear()),
    "repeated": lambda: Net(repeated, fc=linear()),
    "attention": lambda: Net(attention, attend=nn.MultiheadAttention(D, 1, batch_first=True)),
    "attention-time-first": lambda: Net(attention, attend=nn.MultiheadAttention(D, 1)),
    "lstm": lambda: Net(recurrent, rnn=nn.LSTM(D, D, batch_first=True)),
    "gru-time-first": lambda: Net(recurrent, rnn=nn.GRU(D, D)),
    "embedding": lambda: Net(lambda m, h: h * m.e(tokens(h)), e=nn.Embedding(3, D, padding_idx=0)),
    "position-table": lambda: Net(lambda m, h: h + m.e(torch.arange(T)), e=nn.Embedding(T, D)),
    "normalised": lambda: Net(lambda m, h: h @ (m.p / m.p.norm()).T, p=p(D, D)),
    "one-by-one": lambda: Net(lambda m, h: torch.stack([m.fc(x) for x in h]), fc=linear()),
    "choice": lambda: Net(choice, fc=linear(), other=linear()),
    "where": lambda: Net(
        lambda m, h: torch.where(h[:, :1, :1] > 0, m.fc(h), m.other(h)), fc=linear(), other=linear()
    ),
    "pooled": lambda: Net(lambda m, h: h * m.fc(h.mean(1)).sigmoid().unsqueeze(1), fc=linear()),
    "steps": lambda: Net(steps, fc=linear(), p=p(D, D)),
    "flip": lambda: Net(lambda m, h: m.fc(h.flip(0)).flip(0), fc=linear()),
    "roll": lambda: Net(lambda m, h: m.fc(h.roll(1, 0)).roll(-1, 0), fc=linear()),
    "regrouped": lambda: Net(lambda m, h: m.fc(h.reshape(T, -1, D)).reshape(h.shape), fc=linear()),
    "tanh": lambda: Net(lambda m, h: h.tanh()),
    "relu": lambda: Net(lambda m, h: h.relu()),
    "sine": lambda: Net(lambda m, h: (2 * h).sin()),
    "residual-sine": lambda: Net(lambda m, h: h + h.sin()),
}
DATA = ("random", "zeros", "equal", "zeros-first", "equal-first", "equal-lengths", "signs", "small")


def network(seed):
    """A network of two to five parts, some of them used twice."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    names = choose.choices(list(PARTS), k=choose.randint(2, 5))
    layers = nn.ModuleList([PARTS[name]() for name in names])
    order = list(range(len(names)))
    if choose.random() < 0.4:
        order.insert(choose.randrange(len(order) + 1), choose.choice(order))
    if choose.random() < 0.2:
        first = next(layers[0].parameters(), None)
        if first is not None and len(list(layers.parameters())) > 1:
            first.requires_grad_(False)

    def forward(m, x):
        h = x
        for i in order:
            h = m.layers[i](h)
        return readout(h)

    return Net(forward, layers=layers), [names[i] for i in order]


def data(seed):
    """Batches of a kind, some as long as other dimensions."""
    choose = random.Random(seed)
    kind = choose.choice(DATA)
    sizes = choose.choice(
        [(T, T), (2, 3), (1, T, 3), (D, T), (8,), (T,), (5, 2, 1), (2, 2, 2, 2), (6, T)]
    )
    found = []
    for number, n in enumerate(sizes):
        x = torch.randn(n, T, D, dtype=torch.float64)
        first = number == 0
        if kind == "zeros" or (kind == "zeros-first" and first):
            x.zero_()
        elif kind == "equal" or (kind == "equal-first" and first):
            x = x[:1].expand(n, T, D).clone()
        elif kind == "equal-lengths" or (kind == "signs" and first):
            x[..., 0] = torch.where(torch.arange(T) < T // 2, 1, -1) * x[..., 0].abs()
        elif kind == "small":
            x *= 1e-3
        found.append((x, torch.randint(CLASSES, (n,))))
    return found, kind
