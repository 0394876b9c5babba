"""Kernels with heavy tails, and laws whose Poisson field is known: densities, draws, denoisers, flows, likelihoods."""

from __future__ import annotations

from math import inf, lgamma, log, pi, sqrt

import pytest
import torch
from scipy import stats

from minigen import PFGM, laws, samplers, seeded
from minigen.charges import Charges, sphere_area
from minigen.evaluate import sliced_wasserstein
from minigen.fields import CAUCHY, GAUSSIAN, CauchyMixture, Kernel, empirical_denoiser, squared_distances

F64 = torch.float64
DS = [1.0, 2.0, 64.0, 2048.0, inf]


def points(n, d, seed=0):
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(seed))


def eight(scale=0.15, d=2):
    angle = torch.arange(8, dtype=F64) * pi / 4
    places = torch.zeros(8, d, dtype=F64)
    places[:, 0] = 2 * angle.cos()
    if d > 1:
        places[:, 1] = 2 * angle.sin()
    return CauchyMixture.of(places, scale)


@pytest.mark.equation("eq:pfgm-student", "minigen.fields.Kernel.log_prob")
@pytest.mark.parametrize("D", DS)
def test_kernel_has_the_density_of_student(D):
    x = points(9, 3)
    shape = 0.49 * torch.eye(3, dtype=F64).numpy()
    law = stats.multivariate_normal(cov=shape) if inf == D else stats.multivariate_t(shape=shape, df=D)
    assert torch.allclose(Kernel(D).log_prob(x, 0.7), torch.from_numpy(law.logpdf(x.numpy())), rtol=1e-9)


@pytest.mark.equation("eq:pfgm-draw", "minigen.fields.Kernel.noise")
@pytest.mark.parametrize("D", [1.0, 2.0, 64.0, 2048.0])
@pytest.mark.parametrize("n", [2, 3072])
def test_student_draw_equals_the_papers_recipe(D, n):
    """Radius r sqrt(B / (1 - B)) with B ~ Beta(N / 2, D / 2) and r = sigma sqrt(D), against g sqrt(D / chi2)."""
    with seeded(0):
        ours = torch.cat([Kernel(D).noise(torch.empty(500, n, dtype=F64)).norm(dim=1) for _ in range(4)])
    recipe = stats.betaprime(n / 2, D / 2)  # the law of B / (1 - B)
    assert stats.kstest((ours**2 / D).numpy(), recipe.cdf).pvalue > 1e-3
    beta = stats.beta(n / 2, D / 2).rvs(2000, random_state=1)
    theirs = (D * beta / (1 - beta).clip(1e-300)) ** 0.5
    assert stats.ks_2samp(ours.numpy(), theirs).pvalue > 1e-3


def test_a_wrong_recipe_fails_the_same_test():
    with seeded(0):
        ours = Kernel(2.0).noise(torch.empty(2000, 2, dtype=F64)).norm(dim=1)
    assert stats.kstest((ours**2 / 2).numpy(), stats.betaprime(2 / 2, 3 / 2).cdf).pvalue < 1e-6


@pytest.mark.equation("eq:pfgm-prior", "minigen.fields.Kernel.log_prob")
def test_prior_is_the_uniform_hemisphere_seen_from_its_center():
    """A uniform direction of R^{N+1}, prolonged to the plane z = z_max, has the Cauchy density."""
    z_max, n = 3.0, 2
    with seeded(1):
        g = torch.randn(20_000, n + 1, dtype=F64)
    x = z_max * g[:, :n] / g[:, n:].abs()
    radius = x.norm(dim=1)
    r = torch.linspace(0, 60, 200_001, dtype=F64)
    area = 2 * pi ** ((n + 1) / 2) / torch.exp(torch.tensor(lgamma((n + 1) / 2)))
    p = 2 * z_max / (area * (r**2 + z_max**2) ** ((n + 1) / 2))
    at = torch.stack([r, torch.zeros_like(r)], 1)
    assert torch.allclose(CAUCHY.log_prob(at, z_max).exp(), p, rtol=1e-9)
    cdf = torch.cumulative_trapezoid(2 * pi * r * p, r)
    for R in (1.0, 3.0, 12.0, 50.0):
        share = float((radius < R).double().mean())
        exact = float(cdf[int(R / 60 * 200_000) - 1])
        assert share == pytest.approx(exact, abs=4 * sqrt(exact * (1 - exact) / 20_000))
        assert exact == pytest.approx(1 - z_max / sqrt(R**2 + z_max**2), abs=1e-4)  # N = 2


@pytest.mark.equation("eq:pfgm-clip", "minigen.fields.Kernel.noise")
def test_more_than_half_of_the_prior_is_clipped_at_cifar_size():
    tail = stats.betaprime(1536, 0.5).sf((3000 / 40) ** 2)
    assert tail == pytest.approx(0.54, abs=0.005)
    gauss = 2 * stats.norm.cdf(40 * sqrt(3072) / 3000) - 1  # |g| is almost sqrt(N), so only g' decides
    assert gauss == pytest.approx(tail, abs=0.003)
    with seeded(0):
        r = 40 * torch.cat([CAUCHY.noise(torch.empty(500, 3072)).norm(dim=1) for _ in range(6)])
    assert float((r > 3000).double().mean()) == pytest.approx(tail, abs=4 * sqrt(0.25 / 3000))
    assert float(r.median()) == pytest.approx(3288, rel=0.1)


@pytest.mark.equation("eq:pfgm-concentration", "minigen.fields.Kernel.noise")
@pytest.mark.parametrize(("D", "spread"), [(64.0, 0.092), (2048.0, 0.0202)])
def test_norms_concentrate(D, spread):
    with seeded(0):
        r = torch.cat([Kernel(D).noise(torch.empty(500, 3072)).norm(dim=1) for _ in range(8)]) / sqrt(3072)
    assert float(r.std()) == pytest.approx(spread, rel=0.08)
    assert sqrt(1 / (2 * D) + 1 / (2 * 3072)) == pytest.approx(spread, rel=0.06)


@pytest.mark.equation("eq:pfgm-one", "minigen.fields.empirical_denoiser")
@pytest.mark.parametrize("D", DS)
def test_one_equation_carries_the_mixture_of_kernels(D):
    """Continuity: d/dsigma log p + div v + v grad log p = 0 for v = (x - E[y | x]) / sigma, whatever the kernel."""
    data, kernel = points(6, 2), Kernel(D)

    def log_p(x, s):
        return torch.stack([_log(kernel, x - y, s) for y in data]).logsumexp(0)

    x = points(5, 2, 1).requires_grad_(True)
    s = torch.tensor(0.8, dtype=F64, requires_grad=True)
    slope, rate = torch.autograd.grad(log_p(x, s).sum(), (x, s))
    parts = [torch.autograd.grad(log_p(x[i : i + 1], s).sum(), s)[0] for i in range(5)]
    assert float(sum(parts)) == pytest.approx(float(rate))
    v = samplers.probability_flow(empirical_denoiser(data, kernel))(x, s.detach().expand(5))
    div = sum(torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    rest = torch.stack(parts) + div + (v * slope).sum(1)
    assert float(rest.detach().abs().max()) < 1e-10


def _log(kernel, x, s):
    n = x.shape[1]
    return -n * s.log() + kernel.log_weight(x.square().sum(1), s, n)


@pytest.mark.equation("eq:pfgm-limit", "minigen.fields.empirical_denoiser")
def test_distance_to_diffusion_falls_like_one_over_D():
    data, sigma = eight().means, torch.tensor(1.0, dtype=F64)
    with seeded(2):
        x = data[torch.randint(8, (1000,))] + torch.randn(1000, 2, dtype=F64)
    gauss = empirical_denoiser(data, GAUSSIAN)(x, sigma)
    w = Kernel(inf).log_weight(squared_distances(x, data), sigma[None, None], 2).softmax(1)
    d2 = squared_distances(x, data)
    h = 2 * d2 / 2 - d2**2 / 4  # N d2 / (2 sigma^2) - d2^2 / (4 sigma^4)
    first = -((w * h) @ data - (w * h).sum(1, keepdim=True) * (w @ data))
    rms, left = [], []
    for D in (64.0, 128.0, 256.0, 512.0, 1024.0):
        gap = empirical_denoiser(data, Kernel(D))(x, sigma) - gauss
        rms.append(float(gap.square().sum(1).mean().sqrt()))
        left.append(float((gap - first / D).square().sum(1).mean().sqrt()))
    slopes = [log(b / a) / log(2) for a, b in zip(rms, rms[1:])]
    assert slopes == pytest.approx([-1] * 4, abs=0.1)
    assert left[-1] < 0.05 * rms[-1]  # the first order is the formula
    assert [log(b / a) / log(2) for a, b in zip(left, left[1:])] == pytest.approx([-2] * 4, abs=0.2)


@pytest.mark.equation("eq:pfgm-limit", "minigen.fields.empirical_denoiser")
def test_in_many_dimensions_the_law_begins_late():
    """1/D needs D >> N: at N = 3072 the paper's D = 2048 is in the middle of the crossover."""
    N, sigma = 3072, torch.tensor(10.0, dtype=F64)
    data = points(8, N) * 0.5
    x = data.repeat(10, 1) + 10 * points(80, N, 3)
    limit, gap = empirical_denoiser(data, GAUSSIAN)(x, sigma), {}
    for D in (64, 256, 2048, 4096, 65536, 262144):
        gap[D] = float((empirical_denoiser(data, Kernel(D))(x, sigma) - limit).square().sum(1).mean().sqrt())
    slope = lambda a, b: log(gap[b] / gap[a]) / log(b / a)
    assert -0.1 < slope(64, 256) < 0
    assert slope(2048, 4096) == pytest.approx(-0.5, abs=0.15)
    assert slope(65536, 262144) == pytest.approx(-1, abs=0.06)


def test_denoisers_in_many_dimensions_are_finite_and_find_the_source():
    data = points(50, 3072).float() * 0.5
    z = torch.full((50,), 0.02)
    with seeded(3):
        x = data + 0.02 * CAUCHY.noise(data).clamp(-1, 1)
    for kernel in (CAUCHY, Kernel(2048.0), GAUSSIAN):
        y = empirical_denoiser(data, kernel)(x, z)
        assert bool(y.isfinite().all()) and torch.allclose(y, data, atol=1e-3)


def test_distances_by_the_product_are_exact_enough():
    x, y = points(20, 100, 1).float() + 30, points(40, 100, 2).float() + 30
    exact = torch.cdist(x.double(), y.double()).square()
    assert torch.allclose(squared_distances(x, y).double(), exact, rtol=2e-6)
    near = x + 1e-3
    assert torch.allclose(
        squared_distances(x[:, :3], near[:, :3]).diagonal().sqrt(), torch.tensor(3e-6).sqrt(), rtol=0.01
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as training on a GPU does
    squared_distances(x, y)
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision(before)


# The mixture of Cauchy laws


@pytest.mark.equation("eq:pfgm-image", "minigen.fields.CauchyMixture.velocity")
@pytest.mark.parametrize("d", [1, 2, 5])
def test_field_of_a_cauchy_sheet_is_that_of_an_image_charge(d):
    """The field of the mixture is that of charges at (mean, -scale); one of them makes straight rays."""
    law = CauchyMixture(
        points(3, d), torch.tensor([0.3, 0.5, 1.1], dtype=F64), torch.tensor([0.2, 0.3, 0.5], dtype=F64)
    )
    below = Charges(torch.cat([law.means, -law.scale[:, None]], 1), law.weights)
    x, z = points(10, d, 1), 0.4
    E = below.field(torch.cat([x, torch.full((10, 1), z, dtype=F64)], 1))
    assert torch.allclose(law.velocity(x, z), E[:, :-1] / E[:, -1:], rtol=1e-9)
    assert torch.allclose(law.denoiser(x, z), x - z * law.velocity(x, z))
    one = CauchyMixture.of(law.means[:1], 0.7)
    *_, end = samplers.euler(one.velocity, x, torch.linspace(0.01, 5, 3, dtype=F64))  # rays: exact in any step
    assert torch.allclose(end, one.means + (x - one.means) * 5.7 / 0.71, rtol=1e-9)


def test_density_of_the_mixture_integrates_to_one_and_fits_its_draws():
    law = CauchyMixture.of(torch.tensor([[-1.0], [2.0]], dtype=F64), 0.3, torch.tensor([0.3, 0.7]))
    x = torch.linspace(-4000, 4000, 4_000_001, dtype=F64)[:, None]
    assert float(torch.trapezoid(law.log_prob(x).exp(), x[:, 0])) == pytest.approx(1, abs=2e-4)
    with seeded(0):
        draws = law.sample(5000)[:, 0]
    cdf = lambda v: 0.3 * stats.cauchy.cdf(v, -1, 0.3) + 0.7 * stats.cauchy.cdf(v, 2, 0.3)
    assert stats.kstest(draws.numpy(), cdf).pvalue > 1e-3


def test_denoiser_of_the_mixture_is_the_mean_of_many_draws():
    law = eight(0.3)
    with seeded(0):
        y = law.sample(200_000)
    x, z = torch.tensor([[1.0, 0.5], [0.2, -2.5]], dtype=F64), torch.tensor(0.8, dtype=F64)
    many = empirical_denoiser(y, CAUCHY)(x, z)
    assert torch.allclose(many, law.denoiser(x, z), atol=0.02)


def test_samplers_on_the_mixture_reach_the_floor():
    """Must show: with n = 1000, Euler with 20 steps stays near the floor; with n = 4000 only 50 steps do.

    The ratio depends on n, because the floor falls with n and the error of the steps does not. The law has no mean,
    and no Wasserstein distance: everything beyond 4 is counted at 4.
    """
    law = eight()
    flow = samplers.probability_flow(law.denoiser)
    near = lambda x: x * (4 / x.norm(dim=1, keepdim=True)).clamp(max=1)

    def ratios(n, seeds, budgets):
        floor, made = 0.0, dict.fromkeys(budgets, 0.0)
        for seed in range(seeds):
            with seeded(seed):
                x, real, again = 40 * CAUCHY.noise(torch.empty(n, 2, dtype=F64)), law.sample(n), law.sample(n)
            floor += sliced_wasserstein(near(again), near(real), 64)
            for steps in budgets:
                *_, y = samplers.euler(flow, x, samplers.geometric(40, 1e-3, steps))
                made[steps] += sliced_wasserstein(near(y), near(real), 64)
        return {steps: total / floor for steps, total in made.items()}

    many = ratios(1000, 24, (5, 20))
    assert many[20] < 1.2
    assert many[5] > 2  # five steps are not enough, and the distance sees it
    more = ratios(4000, 12, (20, 50))
    assert more[20] > 1.3
    assert more[50] < 1.25


def test_round_trip_on_the_mixture():
    law = eight()
    flow = samplers.probability_flow(law.denoiser)
    with seeded(0):
        x = law.sample(200)
    x = x[x.norm(dim=1) < 20]
    up = samplers.rk45(flow, x, 1e-3, 40.0, tol=1e-6).x
    back = samplers.rk45(flow, up, 40.0, 1e-3, tol=1e-6).x
    assert float((back - x).norm(dim=1).max()) < 1e-3


@pytest.mark.equation("eq:pfgm-likelihood", "minigen.samplers.log_likelihood")
@pytest.mark.parametrize("d", [1, 2, 5])
def test_likelihood_is_the_density(d):
    """The error is at most N s / z_max: at z_max the law of scale s + z_max is taken for one of scale z_max."""
    z_max = 1000.0
    law = CauchyMixture.of(torch.zeros(1, d, dtype=F64), 0.7)
    with seeded(1):
        x = law.sample(40)
    prior = lambda y: CAUCHY.log_prob(y, z_max)
    out = samplers.log_likelihood(law.denoiser, x, 1e-5, z_max, tol=1e-8, prior=prior)
    error = (out.extra - law.log_prob(x)).abs().max()
    assert float(error) < d * 0.7 / z_max
    mixture = eight(0.3, d)
    with seeded(2):
        x = mixture.sample(40)
    out = samplers.log_likelihood(mixture.denoiser, x, 1e-5, z_max, tol=1e-8, prior=prior)
    assert float((out.extra - mixture.log_prob(x)).abs().max()) < 2 * (d + 1) * 2 / z_max  # 2: the radius of the ring


@pytest.mark.equation("eq:pfgm-constant")
def test_the_sphere_constant_of_the_released_likelihood():
    """With the area of the sphere in R^N instead of R^{N+1} the density is wrong by a factor, seen when N is small."""
    assert log(sphere_area(2) / sphere_area(1)) == pytest.approx(log(pi))
    log_area = lambda d: log(2) + d / 2 * log(pi) - lgamma(d / 2)
    nats = log_area(3072) - log_area(3073)
    assert nats == pytest.approx(3.096, abs=1e-3) and nats / 3072 / log(2) == pytest.approx(0.0015, abs=1e-4)
    law = CauchyMixture.of(torch.zeros(1, 1, dtype=F64), 0.7)
    x = torch.tensor([[0.4]], dtype=F64)
    # their constant: 2 z / (S_0 (x^2 + z^2)) instead of 2 z / (S_1 (x^2 + z^2))
    theirs = lambda y: CAUCHY.log_prob(y, 1000.0) + log(sphere_area(2)) - log(sphere_area(1))
    out = samplers.log_likelihood(law.denoiser, x, 1e-5, 1000.0, tol=1e-8, prior=theirs)
    assert float(out.extra - law.log_prob(x)) == pytest.approx(log(pi), abs=2e-3)


def test_a_clip_at_the_perturbation_radius_is_visible_in_the_plane():
    law = eight()
    flow = samplers.probability_flow(law.denoiser)
    near = lambda x: x[x.norm(dim=1) < 20]
    with seeded(0):
        method = PFGM(upper_norm=sqrt(2) * 0.01 * 1.03**291)
        clipped, real = method.prior((2000, 2)).double(), law.sample(2000)
        free = PFGM(upper_norm=1e9).prior((2000, 2)).double()
    assert float((clipped.norm(dim=1) > 76).double().mean()) > 0.4
    away = {}
    for name, x in (("clipped", clipped), ("free", free)):
        *_, made = samplers.euler(flow, x, samplers.geometric(40, 1e-3, 50))
        away[name] = sliced_wasserstein(near(made), near(real))
    assert away["clipped"] > 2 * away["free"]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="D >= 1"):
        Kernel(0.5)
    with pytest.raises(ValueError, match="positive scale"):
        CauchyMixture.of(torch.zeros(2, 2), 0.0)


def test_gaussian_kernel_is_the_finite_mixture_of_the_other_chapters():
    data = laws.heart().means.double()
    x, s = points(20, 2), torch.tensor(0.3, dtype=F64)
    assert torch.allclose(empirical_denoiser(data, GAUSSIAN)(x, s), laws.Mixture.of(data).denoiser(x, s), atol=1e-9)


def test_what_the_released_code_cuts_and_redraws():
    """PFGM redraws m where |eps_z| < 0.005 at sigma = 0.01; PFGM++ keeps B of the beta law below 1 - 1e-3."""
    with seeded(0):
        small = (0.01 * torch.randn(100_000)).abs() < 0.005
    assert float(small.double().mean()) == pytest.approx(0.38, abs=0.008)
    cut = {D: stats.beta(1536, D / 2).sf(1 - 1e-3) for D in (1, 2, 64, 2048)}
    assert cut[1] == pytest.approx(0.92, abs=0.005) and cut[2] == pytest.approx(0.785, abs=0.005)
    assert max(cut[64], cut[2048]) < 1e-20
