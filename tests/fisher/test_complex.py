"""Complex parameters: the mean of |g|², real, in Fisher information, norms, influence and masks."""

import pytest
import torch
from cases import Net, batches, floats, oracle, readout
from torch import nn

from gradmask import FisherMask, fisher_diagonal, gradient_norms, influence


def complex_linear(m, x):
    return readout(torch.view_as_real(m.fc(x.to(torch.cdouble)).tanh()).flatten(1))


def spectral(m, x):
    """A filter in the frequencies, as in Fourier neural operators."""
    return readout(torch.fft.irfft(torch.fft.rfft(x) * m.w, n=x.shape[-1]))


def product(m, x):
    return readout((x.to(torch.cdouble) @ m.w.t()).abs())


def real_among_complex(m, x):
    return readout((torch.fft.fft(x) * m.p).abs())


CASES = {
    "linear": lambda: Net(complex_linear, fc=nn.Linear(3, 2, dtype=torch.cdouble)),
    "filter": lambda: Net(spectral, w=nn.Parameter(torch.randn(2, dtype=torch.cdouble))),
    "matrix": lambda: Net(product, w=nn.Parameter(torch.randn(4, 3, dtype=torch.cdouble))),
    "real": lambda: Net(real_among_complex, p=nn.Parameter(torch.randn(3).double())),
    "both": lambda: Net(
        lambda m, x: readout(torch.view_as_real(m.fc(m.before(x).to(torch.cdouble))).flatten(1)),
        before=nn.Linear(3, 3).double(),
        fc=nn.Linear(3, 2, dtype=torch.cdouble),
    ),
    "convolution": lambda: Net(
        lambda m, x: readout(m.c(x.to(torch.cdouble)[:, None]).abs()),
        c=nn.Conv1d(1, 2, 2, dtype=torch.cdouble),
    ),
}


def squared_moduli(model, data):
    """As `oracle`, with |g|²."""
    total = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in model.named_parameters()}
    count = 0
    for inputs, targets in data:
        for x, y in zip(inputs, targets, strict=True):
            loss = nn.functional.cross_entropy(model(x[None]), y[None])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for name, g in zip(total, gradients, strict=True):
                total[name] += g.real.square() + (g.imag.square() if g.is_complex() else 0)
            count += 1
    return {name: t / count for name, t in total.items()}


@pytest.mark.parametrize("verify", ["spread", False])
@pytest.mark.parametrize("case", CASES)
def test_mean_of_the_squared_modulus(case, verify):
    model, data = CASES[case](), batches(floats(3), (4, 1, 3))
    found, expected = fisher_diagonal(model, data, verify=verify), squared_moduli(model, data)
    for name, e in expected.items():
        assert found[name].dtype == torch.float64
        assert torch.allclose(found[name], e, rtol=1e-10, atol=1e-14), name


@pytest.mark.parametrize("case", CASES)
def test_norms_influence_and_masks(case):
    model, (data, probe) = CASES[case](), batches(floats(3), (4, 3))
    squares = fisher_diagonal(model, [data])
    norms = gradient_norms(model, data)
    total = sum(s.sum() for s in squares.values())
    assert norms.square().mean().item() == pytest.approx(total.item(), rel=1e-10)
    step = 1e-4
    exact = influence(model, data, probe[0], method="kl", step=step)
    for options in ({}, {"memory": 1}):
        quadratic = influence(model, data, probe[0], step=step, **options)
        assert torch.allclose(exact, quadratic, rtol=1e-2)
    assert influence(model, data, probe[0], method="diagonal", step=step).isfinite().all()
    assert influence(model, data, probe, fisher="empirical", step=step).isfinite().all()
    mask = FisherMask(model, keep=0.5, scope="update")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mask.attach(optimizer)
    mask.refresh([data])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    nn.functional.cross_entropy(model(data[0]), data[1]).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p[~mask.masks[name]], before[name][~mask.masks[name]])
        assert (p != before[name])[mask.masks[name]].any() or not mask.masks[name].any()


def test_the_oracle_of_real_models_agrees():
    model, data = CASES["real"](), batches(floats(3), (4,))
    assert torch.allclose(oracle(model, data)["p"], squared_moduli(model, data)["p"])
