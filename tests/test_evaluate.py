"""Distances against closed forms and against scipy."""

from math import erf, exp, pi, sqrt

import pytest
import scipy.stats
import torch

from minigen import DDPM, evaluate, laws, seeded


@pytest.fixture(autouse=True)
def fixed_seed():
    with seeded(0):
        yield


@pytest.mark.parametrize(("n", "m"), [(500, 500), (300, 700)])
def test_one_dimension_agrees_with_scipy(n, m):
    a, b = torch.randn(n, 1, dtype=torch.float64), torch.randn(m, 1, dtype=torch.float64) * 2 + 1
    x, y = a[:, 0].numpy(), b[:, 0].numpy()
    assert evaluate.sliced_wasserstein(a, b, 3) == pytest.approx(scipy.stats.wasserstein_distance(x, y), rel=1e-9)
    mean = lambda u, v: float(abs(u[:, None] - v[None]).mean())
    biased = scipy.stats.energy_distance(x, y) ** 2  # scipy keeps the pairs of a sample with itself
    unbiased = biased - mean(x, x) / (n - 1) - mean(y, y) / (m - 1)
    assert evaluate.energy_distance(a, b) == pytest.approx(unbiased, rel=1e-6)


def test_sliced_wasserstein_of_a_shift():
    a = torch.randn(2000, 2)
    shift = torch.tensor([3.0, 4.0])
    # every projection moves by |shift . direction|; in the plane its mean is 2 / pi of the length
    assert evaluate.sliced_wasserstein(a, a + shift, 4000) == pytest.approx(5 * 2 / pi, rel=0.02)
    assert evaluate.sliced_wasserstein(a, a) == 0
    assert evaluate.sliced_wasserstein(a, a + 1) == evaluate.sliced_wasserstein(a, a + 1)  # same directions
    images = torch.randn(50, 3, 4, 4)
    assert evaluate.sliced_wasserstein(images, images + 0.5) == pytest.approx(
        evaluate.sliced_wasserstein(images.flatten(1), images.flatten(1) + 0.5)
    )


def test_energy_distance_of_gaussians():
    a, b = torch.randn(4000, 1), torch.randn(4000, 1) + 1.5
    cross = 2 / sqrt(pi) * exp(-(1.5**2) / 4) + 1.5 * erf(1.5 / 2)  # E|N(m, 2)|
    assert evaluate.energy_distance(a, b) == pytest.approx(2 * cross - 4 / sqrt(pi), rel=0.06)
    assert abs(evaluate.energy_distance(a, torch.randn(4000, 1))) < 2e-3
    far = evaluate.energy_distance(torch.zeros(5, 3), torch.full((7, 3), 2.0))
    assert far == pytest.approx(2 * sqrt(12), rel=1e-6)


def test_modes_are_counted():
    law = laws.eight_gaussians()
    x = law.sample(4000)
    full = evaluate.mode_coverage(x, law)
    assert full.found == 8
    torch.testing.assert_close(full.shares, full.weights, atol=0.02, rtol=0)
    k = law.responsibilities(x).argmax(1)
    part = evaluate.mode_coverage(x[(k != 2) & (k != 5)], law)
    assert part.found == 6 and float(part.shares[[2, 5]].sum()) < 1e-3
    uneven = laws.two_modes()
    assert float(evaluate.mode_coverage(uneven.sample(20_000), uneven).shares[0]) == pytest.approx(0.2, abs=0.02)


def test_bits_per_dim_is_the_mean_of_the_bound():
    method, x = DDPM(T=5), torch.rand(6, 1, 4, 4) * 2 - 1
    net = lambda x_t, u: torch.zeros_like(x_t)
    with seeded(1):
        bits = method.bound(net, x, 17).bits.double()
    with seeded(1):
        mean, error = evaluate.bits_per_dim(method, net, x, 17)
    assert mean == pytest.approx(float(bits.mean())) and error == pytest.approx(float(bits.std()) / sqrt(6))
    with pytest.raises(ValueError, match="has no variational bound"):
        evaluate.bits_per_dim(object(), net, x)


def test_sets_that_cannot_be_compared_are_refused():
    for a, b in ((torch.zeros(3, 2), torch.zeros(3, 3)), (torch.zeros(0, 2), torch.zeros(3, 2))):
        for distance in (evaluate.sliced_wasserstein, evaluate.energy_distance, evaluate.frechet_distance):
            with pytest.raises(ValueError, match="samples of one shape"):
                distance(a, b)
