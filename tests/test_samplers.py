"""The samplers against closed forms, against each other, and against diffusers."""

from __future__ import annotations

from math import log

import pytest
import torch

from minigen import DDPM, seeded
from minigen.laws import gaussian, two_modes
from minigen.samplers import (
    ddim,
    euler,
    geometric,
    heun,
    karras,
    langevin,
    log_likelihood,
    probability_flow,
    rk45,
)

F64 = torch.float64


def last(states):
    *_, x = states
    return x


def start(n: int, d: int, sigma: float) -> torch.Tensor:
    return sigma * torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(0))


def test_grids_fall_and_end_at_zero():
    for grid in (geometric(80, 0.01, 12), karras(80, 0.01, 12)):
        assert grid.shape == (13,) and grid[-1] == 0 and bool((grid[1:] < grid[:-1]).all())
        assert float(grid[0]) == pytest.approx(80) and float(grid[-2]) == pytest.approx(0.01)


@pytest.mark.equation("eq:ddpm-ode", "minigen.samplers.euler")
@pytest.mark.parametrize(("method", "order"), [(euler, 1), (heun, 2)])
def test_order_of_euler_and_heun_on_gaussian_data(method, order):
    """N(0, s^2) flows as x(sigma) = x_0 sqrt(sigma^2 + s^2) / s exactly."""
    s, x = 0.5, torch.tensor([[1.0]], dtype=F64)
    flow = probability_flow(gaussian(1, s).denoiser)
    exact = (0.01**2 + s**2) ** 0.5 / (20**2 + s**2) ** 0.5
    steps = torch.tensor([40, 80, 160, 320])
    errors = torch.tensor(
        [abs(float(last(method(flow, x, geometric(20, 0.01, int(n) + 1)[:-1]))) / exact - 1) for n in steps]
    )
    slopes = (errors[:-1] / errors[1:]).log2()
    assert torch.allclose(slopes, torch.full((3,), float(order)), atol=0.12)


@pytest.mark.equation("eq:ddpm-ode", "minigen.samplers.ddim")
def test_ddim_is_euler_in_sigma():
    law, x, sigmas = two_modes(), start(50, 2, 80.0), DDPM().sigmas(20)
    assert torch.allclose(
        last(ddim(law.denoiser, x, sigmas)), last(euler(probability_flow(law.denoiser), x, sigmas)), atol=1e-10
    )


@pytest.mark.equation("eq:ddpm-ddim", "minigen.samplers.ddim")
def test_posterior_chain_is_ddim_with_eta_one():
    law, method = two_modes(), DDPM(T=100, beta_1=1e-3, beta_T=0.2, variance="beta_tilde")
    x = torch.randn(50, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    with seeded(1):
        chain = last(method.reverse(method.oracle(law.denoiser), x))
    with seeded(1):
        scale = (1 + method.sigma[-1] ** 2).sqrt()
        other = last(ddim(law.denoiser, x * scale, method.sigmas(100), eta=1.0))
    assert torch.allclose(chain, other, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_equals_diffusers(eta):
    diffusers = pytest.importorskip("diffusers")
    method = DDPM(clip=False)
    scheduler = diffusers.DDIMScheduler(1000, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(50)

    def net(x, u):
        return torch.tanh(x + u[:, None])

    t = scheduler.timesteps + 1  # its t = 0 is our t = 1
    x = torch.randn(8, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    sigmas = torch.cat([method.sigma[t], method.sigma[:1]])
    states = ddim(method.denoiser(net), x * (1 + sigmas[0] ** 2).sqrt(), sigmas, eta)
    for i, step in enumerate(t):
        eps = net(x, torch.full((8,), float(step) / 1000, dtype=F64))
        x = scheduler.step(eps, int(step) - 1, x, eta=eta, generator=torch.Generator().manual_seed(i)).prev_sample
        with seeded(i):
            ours = next(states)
    assert torch.allclose(ours, x, rtol=1e-4, atol=1e-4)


def test_ddim_encodes_and_decodes_with_an_error_of_order_one():
    law, x0 = two_modes(), torch.tensor([[1.0, 0.9]], dtype=F64)
    flow, errors = probability_flow(law.denoiser), []
    for steps in (200, 400, 800):
        sigmas = geometric(80, 0.01, steps)[:-1]
        noise = last(euler(flow, x0, sigmas.flip(0)))
        errors.append(float((last(euler(flow, noise, sigmas)) - x0).norm()))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.3) and errors[1] / errors[2] == pytest.approx(2, abs=0.2)


def test_rk45_follows_the_exact_flow_and_counts():
    s, x = 0.5, start(20, 3, 20.0)
    calls = []
    flow = probability_flow(gaussian(3, s).denoiser)
    out = rk45(lambda y, sigma: calls.append(1) or flow(y, sigma), x, 20.0, 0.01, tol=1e-7)
    assert torch.allclose(out.x, x * ((0.01**2 + s**2) / (20**2 + s**2)) ** 0.5, rtol=1e-4)
    assert out.nfe == len(calls)
    with pytest.raises(ValueError, match="positive"):
        rk45(flow, x, 20.0, 0.0)


def test_log_likelihood_equals_the_exact_density():
    law = two_modes()
    x = law.sample(12).double()
    out = log_likelihood(law.denoiser, x, 1e-3, 5000.0, tol=1e-6)  # the prior's own error falls as 1 / sigma_max
    assert torch.allclose(out.extra, law.log_prob(x), atol=2e-3)


def test_langevin_keeps_the_noisy_law():
    s, sigma, n = 0.6, 0.8, 4000
    with seeded(0):
        x = last(langevin(gaussian(1, s).denoiser, torch.zeros(n, 1), sigma, 0.05, 400))
    var = s**2 + sigma**2
    assert float(x.var()) == pytest.approx(
        var / (1 - 0.05 / (2 * var)), rel=4 * (2 / n) ** 0.5
    )  # the discretized chain's own


def test_sigmas_of_ddpm():
    method = DDPM()
    assert torch.equal(method.sigmas(1000).flip(0), method.sigma)
    assert float(method.sigmas(10)[0]) == float(method.sigma[-1])
    quadratic = method.sigmas(50, "quadratic")
    assert len(quadratic) <= 51 and bool((quadratic[1:] < quadratic[:-1]).all())
    assert float(quadratic[-2]) < float(method.sigmas(50)[-2])  # more levels near the data
    for bad in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and T"):
            method.sigmas(bad)


def test_entropy_of_the_standard_normal():
    from minigen.laws import entropy

    assert entropy(gaussian(2)) == pytest.approx(1 + log(2 * torch.pi))
