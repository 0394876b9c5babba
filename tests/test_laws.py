"""The known laws: density, score and denoiser agree with each other and with sampling."""

from __future__ import annotations

import pytest
import torch

from minigen import seeded
from minigen.laws import LAWS, Mixture


@pytest.mark.parametrize("name", LAWS)
def test_toys_have_mean_zero_or_unit_scale(name):
    law = LAWS[name]()
    with seeded(0):
        x = law.sample(20_000)
    assert float(x.var(0).mean()) == pytest.approx(1.0, abs=0.06)
    assert float(law.weights.sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
def test_score_is_the_gradient_of_the_log_density(name, sigma):
    law = LAWS[name]()
    with seeded(1):
        x = (law.sample(30) + sigma * torch.randn(30, 2)).double().requires_grad_(True)
    grad = torch.autograd.grad(law.log_prob(x, sigma).sum(), x)[0]
    assert torch.allclose(grad, law.score(x.detach(), torch.tensor(sigma)), rtol=1e-5, atol=1e-6)


@pytest.mark.equation("eq:ddpm-mixture", "minigen.laws.Mixture.denoiser")
def test_denoiser_is_the_conditional_mean():
    law, sigma = LAWS["two_modes"](), 0.9
    with seeded(2):
        x0 = law.sample(400_000)
        x = x0 + sigma * torch.randn_like(x0)
    near = (x - torch.tensor([0.2, 0.4])).norm(dim=1) < 0.05
    mean, error = x0[near].mean(0), x0[near].std(0) / near.sum() ** 0.5
    exact = law.denoiser(torch.tensor([[0.2, 0.4]]), torch.tensor(sigma))[0]
    assert bool(((mean - exact).abs() < 4 * error + 0.01).all())


def test_empirical_law_gives_back_its_points():
    data = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    law = Mixture.of(data)
    assert torch.allclose(law.denoiser(data + 1e-3, torch.tensor(1e-2)), data, atol=1e-4)
    assert torch.allclose(law.denoiser(data, torch.tensor(1e4)), data.mean(0).expand_as(data), atol=1e-3)


def test_moments_are_mean_and_variance_of_the_clean_point():
    law = LAWS["swiss_roll"]()
    x = law.sample(200)
    for sigma in (0.02, 0.3, 5.0):
        noisy = x + sigma * torch.randn_like(x)
        level = torch.full((200,), sigma)
        mean, var = law.moments(noisy, level)
        assert torch.allclose(mean, law.denoiser(noisy, level), atol=1e-5)
        # Tweedie's second formula: the variance is sigma**2 times the slope of the denoiser
        h = 1e-3 * sigma
        for i in range(2):
            step = h * torch.eye(2)[i]
            exact = Mixture(law.means.double(), law.std.double(), law.weights.double())
            up, down = (exact.denoiser((noisy + s * step).double(), level.double())[:, i] for s in (1, -1))
            assert torch.allclose(var[:, i].double(), sigma**2 * (up - down) / (2 * h), rtol=2e-2, atol=1e-5)
