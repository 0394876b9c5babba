"""NCSN and its ladder against numerics, against exact answers, and against what the papers and their code print."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log, pi, sqrt

import pytest
import torch

from minigen import DDPM, NCSN, ladder, sample, samplers, seeded
from minigen.laws import Mixture, gaussian, two_modes

F64 = torch.float64
MODES = Mixture.of(torch.tensor([[-5.0, -5.0], [5.0, 5.0]]), 1.0, torch.tensor([0.2, 0.8]))
TOY = NCSN(sigma_1=20.0, sigma_L=0.1, L=20, T=100, eps=2e-3, denoise=True, box=8.0, sigma_data=sqrt(26))
MIX = Mixture.of(torch.tensor([[-1.0, 0.3], [1.2, -0.4], [0.1, 1.5]], dtype=F64), 0.5, torch.tensor([0.2, 0.5, 0.3]))
GRID = torch.linspace(-14, 14, 28_001, dtype=F64)  # for quadrature in one dimension
DX = float(GRID[1] - GRID[0])


def slope(x, sigma=0.0, width=1.0):
    """The exact score of MODES at noise level sigma, which may be 0."""
    v = width**2 + sigma**2
    law = Mixture.of(MODES.means, width, MODES.weights)
    return (law.responsibilities(x, sigma) @ law.means - x) / v


def share(x):
    return float((x.sum(1) < 0).double().mean())


def within(x):
    return float((x - torch.where(x.sum(1, keepdim=True) < 0, -5.0, 5.0)).std())


def anneal(x, score, levels, T, eps):
    for sigma in levels.tolist():
        alpha = eps * (sigma / float(levels[-1])) ** 2
        for _ in range(T):
            x = x + alpha / 2 * score(x, sigma) + alpha**0.5 * torch.randn_like(x)
    return x


def quadrature(sigma=0.4):
    """A law on a line at noise level sigma: density and score on GRID."""
    law = Mixture.of(torch.tensor([[-1.5], [1.0]], dtype=F64), 0.6, torch.tensor([0.3, 0.7]))
    x = GRID[:, None].clone().requires_grad_(True)
    log_p = law.log_prob(x, sigma)
    return law, log_p.detach().exp(), torch.autograd.grad(log_p.sum(), x)[0][:, 0]


# The slope and the steps


@pytest.mark.equation("eq:ncsn-score", "minigen.laws.Mixture.score")
def test_the_score_is_the_slope_of_an_energy_without_normalizer():
    sigma = torch.full((9,), 0.3, dtype=F64)
    x = (2 * torch.randn(9, 2, dtype=F64)).requires_grad_(True)
    d2 = (x[:, None] - MIX.means).square().sum(2)
    energy = -(MIX.weights * (-d2 / (2 * (0.25 + 0.09))).exp()).sum(1).log() + 7.0  # no Z, any constant
    assert torch.allclose(MIX.score(x, sigma), -torch.autograd.grad(energy.sum(), x)[0], atol=1e-9)


@pytest.mark.equation("eq:ncsn-langevin", "minigen.samplers.langevin")
def test_a_langevin_step_is_half_alpha_slope_and_root_alpha_kick():
    x, alpha = torch.randn(50, 2, dtype=F64), 0.07
    with seeded(1):
        (new,) = samplers.langevin(MIX.denoiser, x, 0.5, alpha / 2, 1)
    with seeded(1):
        kick = torch.randn_like(x)
    s = MIX.score(x, torch.full((50,), 0.5, dtype=F64))
    assert torch.allclose(new, x + alpha / 2 * s + sqrt(alpha) * kick, atol=1e-9)


@pytest.mark.equation("eq:ncsn-fokker")
def test_no_flow_at_equilibrium_and_some_flow_elsewhere():
    _, p, s = quadrature()
    gradient = torch.gradient(p, spacing=DX)[0]
    assert float((0.5 * (p * s - gradient)).abs().max()) < 1e-5
    other = (-(GRID**2) / 2).exp()
    assert float((0.5 * (other * s - torch.gradient(other, spacing=DX)[0])).abs().max()) > 0.1
    # and the law of motion itself: the mean of f = x^2 changes by E[s x + 1] per unit of time
    x = torch.full((400_000,), 0.7, dtype=F64)
    dt = 0.01
    new = x + dt / 2 * -2.0 + sqrt(dt) * torch.randn_like(x)  # a slope of -2
    assert float((new**2 - x**2).mean()) / dt == pytest.approx(
        0.7 * -2.0 + 1, abs=4 * 2 * 0.7 / sqrt(dt * 400_000) + dt
    )


@pytest.mark.equation("eq:ncsn-stiff", "minigen.ladder.variance")
@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_stationary_variance_of_finite_steps(alpha):
    with seeded(0):
        *_, x = samplers.langevin(gaussian(1, 0.0).denoiser, torch.zeros(40_000, 1), 1.0, alpha / 2, 60)
    expected = 1 / (1 - alpha / 4)
    assert float(x.var()) == pytest.approx(expected, rel=4 * sqrt(2 / 40_000))
    assert float(ladder.variance(alpha / 2, 1.7, 4000)) == pytest.approx(expected, rel=1e-9)


def test_beyond_the_limit_langevin_steps_diverge():
    for alpha, finite in ((3.9, True), (4.3, False)):
        with seeded(0):
            *_, x = samplers.langevin(gaussian(1, 0.0).denoiser, torch.zeros(10, 1), 1.0, alpha / 2, 1000)
        assert (float(x.abs().max()) < 100) is finite


# Three ways to learn a slope


def models():
    """Two fields s(x) on a line, far from the truth, with their derivatives."""
    yield -0.3 * GRID, torch.full_like(GRID, -0.3)
    yield GRID.cos() - GRID / 2, -GRID.sin() - 0.5


@pytest.mark.equation("eq:ncsn-explicit")
def test_explicit_score_matching():
    _, p, truth = quadrature()
    for s, ds in models():
        left = 0.5 * (p * (s - truth) ** 2).sum() * DX
        right = (p * (ds + 0.5 * s**2)).sum() * DX + 0.5 * (p * truth**2).sum() * DX
        assert float(left) == pytest.approx(float(right), rel=1e-6)


@pytest.mark.equation("eq:ncsn-sliced")
def test_the_trace_is_a_mean_over_directions():
    a = torch.randn(5, 5, dtype=F64)
    v = torch.randn(400_000, 5, dtype=F64)
    values = ((v @ a) * v).sum(1)
    assert float(values.mean()) == pytest.approx(float(a.trace()), abs=4 * float(values.std()) / 400_000**0.5)


@pytest.mark.equation("eq:ncsn-dsm", "minigen.ncsn.NCSN.loss")
@pytest.mark.equation("eq:ncsn-floor", "minigen.ncsn.NCSN.oracle")
def test_denoising_is_score_matching_with_a_constant():
    """For wrong fields and for the exact one; one level, by Monte Carlo with 400,000 samples."""
    sigma, n = 0.4, 400_000
    law, p, truth = quadrature(sigma)
    constant = 1 / (2 * sigma**2) - 0.5 * float((p * truth**2).sum() * DX)
    x = law.sample(n)
    z = torch.randn_like(x)
    noisy = (x + sigma * z)[:, 0]
    for (s, _), f in zip(models(), (lambda y: -0.3 * y, lambda y: y.cos() - y / 2), strict=True):
        values = 0.5 * (f(noisy) + z[:, 0] / sigma) ** 2
        right = float(0.5 * (p * (s - truth) ** 2).sum() * DX) + constant
        assert float(values.mean()) == pytest.approx(right, abs=4 * float(values.std()) / sqrt(n))
    one = NCSN(sigma_1=sigma, sigma_L=sigma / (1 + 1e-9), L=2, eps=sigma**2)  # both levels are sigma
    with torch.no_grad():
        values = one.loss(one.oracle(law.denoiser), x)
    error = 4 * float(values.std()) / sqrt(n)
    assert float(values.mean()) == pytest.approx(sigma**2 * constant, abs=error)
    w = law.responsibilities(GRID[:, None], sigma)  # and by the conditional variance of x given x + sigma z
    keep = 0.36 / (0.36 + sigma**2)
    means = law.means[:, 0] + keep * (GRID[:, None] - law.means[:, 0])
    second = (w * (means**2 + 0.36 * (1 - keep))).sum(1)
    spread = float((p * (second - (w * means).sum(1) ** 2)).sum() * DX)
    assert spread / (2 * sigma**2) == pytest.approx(sigma**2 * constant, rel=1e-6)


def test_the_three_losses_agree_at_their_minimizer():
    sigma, n = 0.3, 100_000
    x = MIX.sample(n)
    z, v = torch.randn_like(x), torch.randn_like(x)
    y = (x + sigma * z).requires_grad_(True)
    s = MIX.score(y, torch.full((n,), sigma, dtype=F64))
    rows = torch.stack([torch.autograd.grad(s[:, i].sum(), y, retain_graph=True)[0] for i in range(2)])
    half = 0.5 * s.detach().square().sum(1)
    trace = rows[0][:, 0] + rows[1][:, 1]
    slices = torch.einsum("nj,inj,ni->n", v, rows, v)
    denoising = 0.5 * (s.detach() + z / sigma).square().sum(1) - 1 / sigma**2  # N / (2 sigma^2), N = 2
    for values in (half + trace, half + slices, denoising):
        assert float((values + half).mean()) == pytest.approx(0, abs=4 * float((values + half).std()) / sqrt(n))


@pytest.mark.equation("eq:ncsn-tweedie", "minigen.ncsn.NCSN.denoiser")
def test_denoiser_and_score_and_oracle_are_one_thing():
    x = torch.randn(6, 2, dtype=F64)
    method = NCSN()
    net = method.oracle(MIX.denoiser)
    for sigma in (2.0, 0.3, 0.02):
        level = torch.full((6,), sigma, dtype=F64)
        on_ladder = method.ladder[(method.ladder - sigma).abs().argmin()].expand(6)
        assert torch.allclose(method.denoiser(net)(x, on_ladder), MIX.denoiser(x, on_ladder), atol=1e-9)
        assert torch.allclose(method.score(net)(x, on_ladder), MIX.score(x, on_ladder), atol=1e-6)
        y = x.clone().requires_grad_(True)
        gradient = torch.autograd.grad(MIX.log_prob(y, sigma).sum(), y)[0]
        assert torch.allclose(MIX.denoiser(x, level), x + sigma**2 * gradient, atol=1e-9)


def test_between_two_levels_the_network_is_interpolated():
    method = replace(TOY, denoise=False)
    denoise = method.denoiser(method.oracle(MODES.denoiser))
    x = 5 + 3 * torch.randn(500, 2)
    for i in (2.5, 8.3, 17.7):
        sigma = torch.full((500,), 20 * (0.1 / 20) ** (i / 19))
        assert float(method.index(sigma)[0]) == pytest.approx(i, abs=1e-3)
        gap = (denoise(x, sigma) - MODES.denoiser(x, sigma)).norm(dim=1) / sigma
        assert float(gap.mean()) < 0.05
    assert float(method.index(torch.tensor([1e-3]))) == 19 and float(method.index(torch.tensor([99.0]))) == 0


# Three difficulties


@pytest.mark.equation("eq:ncsn-circle")
@pytest.mark.parametrize("sigma", [0.1, 0.2])
def test_the_loss_of_a_noisy_circle_settles(sigma):
    angle = torch.arange(2000, dtype=F64) * (2 * pi / 2000)
    law = Mixture.of(torch.stack([angle.cos(), angle.sin()], 1))
    x = law.sample(4000) + sigma * torch.randn(4000, 2, dtype=F64)
    s = law.score(x, torch.full((4000,), sigma, dtype=F64))
    values = -0.5 * s.square().sum(1)
    error = 4 * float(values.std()) / sqrt(4000)
    assert float(values.mean()) == pytest.approx(-1 / (2 * sigma**2), abs=error + 0.5)


@pytest.mark.equation("eq:ncsn-blind", "minigen.laws.Mixture.score")
def test_the_slope_does_not_know_the_weights():
    x, level = MODES.means.double() + torch.randn(2, 2, dtype=F64), torch.full((2,), 0.1, dtype=F64)
    a, b = (Mixture.of(MODES.means.double(), 1.0, torch.tensor([w, 1 - w])).score(x, level) for w in (0.2, 0.9))
    assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.equation("eq:ncsn-barrier", "minigen.laws.Mixture.log_prob")
@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_the_height_of_the_hill(sigma):
    law = Mixture.of(MODES.means.double(), 1.0, MODES.weights)
    points = torch.cat([law.means, law.means.new_zeros(1, 2)])
    first, second, midway = law.log_prob(points, sigma)
    for k, height in enumerate((first - midway, second - midway)):
        assert float(height) == pytest.approx(200 / (8 * (1 + sigma**2)) + log(float(law.weights[k])), abs=1e-3)


@pytest.mark.equation("eq:ncsn-frozen")
@pytest.mark.parametrize(("sigma", "value"), [(3.0, 0.208), (5.6, 0.264), (20.0, 0.417)])
def test_share_on_the_side_of_the_small_hump(sigma, value):
    z = torch.tensor(sqrt(50 / (1 + sigma**2)), dtype=F64)
    formula = float(0.2 * torch.special.ndtr(z) + 0.8 * torch.special.ndtr(-z))
    assert formula == pytest.approx(value, abs=1e-3)
    x = MODES.sample(100_000)
    assert share(x + sigma * torch.randn_like(x)) == pytest.approx(formula, abs=4 * 0.5 / sqrt(100_000))


def test_langevin_loses_the_weights_and_annealing_finds_them():
    """Figure 3 of the paper, with the exact score and its 1,280 points (standard error 0.011)."""
    with seeded(0):
        plain = x = 16 * torch.rand(1280, 2) - 8
        for _ in range(1000):
            plain = plain + 0.05 * slope(plain) + sqrt(0.1) * torch.randn_like(plain)
    assert 0.44 < share(plain) < 0.54 and 0.95 < within(plain) < 1.12
    with seeded(1), torch.no_grad():
        *_, y = TOY.reverse(TOY.oracle(MODES.denoiser), x)
    assert 0.165 < share(y) < 0.255 and 0.95 < within(y) < 1.12


# The method


@pytest.mark.equation("eq:ncsn-ladder", "minigen.ncsn.NCSN.ladder")
def test_ladder_has_the_papers_levels():
    paper = [1, 0.599, 0.359, 0.215, 0.129, 0.0774, 0.0464, 0.0278, 0.0167, 0.01]
    assert (NCSN().ladder / 2).tolist() == pytest.approx(paper, rel=3e-3)  # pixels in [-1, 1]: twice
    ratios = TOY.ladder[:-1] / TOY.ladder[1:]
    assert torch.allclose(ratios, torch.full((19,), 200 ** (1 / 19), dtype=F64))
    u = TOY.clock(torch.arange(20.0))
    assert float(u[0]) == 1 and float(u[-1]) == 0 and torch.allclose(u.diff(), torch.full((19,), -1 / 19))


@pytest.mark.equation("eq:ncsn-loss", "minigen.ncsn.NCSN.loss")
def test_loss_is_the_weighted_sum_of_denoising_losses():
    """The draws are repeated here: the level first, then the noise."""
    n, seen = 5000, {}
    x = torch.randn(n, 2)

    def net(y, u):
        seen.update(y=y, u=u)
        return 0.3 * y

    with seeded(0):
        loss = TOY.loss(net, x)
    with seeded(0):
        i, z = torch.randint(20, (n,)), torch.randn(n, 2)
    sigma = TOY.ladder[i].float()[:, None]
    noisy = x + sigma * z
    assert torch.allclose(seen["y"], noisy / (sigma**2 + 26).sqrt(), atol=1e-5)
    assert torch.allclose(seen["u"], TOY.clock(i))
    s = 0.3 * seen["y"] / sigma  # the score that this network stands for
    denoising = 0.5 * (s + (noisy - x) / sigma**2).square().mean(1)  # per coordinate
    assert torch.allclose(loss, sigma[:, 0] ** 2 * denoising, rtol=1e-3, atol=1e-4)


@pytest.mark.equation("eq:ncsn-alpha", "minigen.ncsn.NCSN.reverse")
def test_reverse_is_algorithm_1():
    method = NCSN(L=3, T=2, eps=1e-4, denoise=True)
    x = method.prior((40, 2))
    assert float(x.abs().max()) <= 1 and float(x.std()) == pytest.approx(1 / sqrt(3), rel=0.2)
    score = method.score(net := method.oracle(two_modes().denoiser))
    with seeded(2):
        states = list(method.reverse(net, x))
    assert len(states) == 3 * 2 + 1
    y = x
    with seeded(2):
        for i in range(3):
            sigma = method.ladder[i].float().expand(40)
            alpha = 1e-4 * float(method.ladder[i] / 0.02) ** 2
            for _ in range(2):
                s, kick = score(y, sigma), sqrt(alpha) * torch.randn_like(y)
                y = y + alpha / 2 * s + kick
    assert torch.allclose(states[-2], y, atol=1e-4)
    assert torch.allclose(states[-1], y + 0.02**2 * score(y, sigma), atol=1e-4)
    # the squared ratio of slope to kick does not depend on the level, for data of one point
    point = gaussian(2, 0.0)
    ratios = []
    for s in method.ladder:
        x = s * torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
        alpha = 1e-4 * (s / 0.02) ** 2
        drift = alpha / 2 * point.score(x, s.expand(len(x)))
        ratios.append(float(drift.square().sum(1).mean() / (2 * alpha)))
    assert ratios == pytest.approx([1e-4 / 0.02**2 / 4] * 3, rel=0.05)


def test_inpainting_is_algorithm_2():
    method = NCSN(L=3, T=4, denoise=True)
    law = two_modes()
    known, mask = torch.full((30, 2), 0.7), torch.tensor([True, False])
    with seeded(3):
        states = list(method.inpaint(method.oracle(law.denoiser), method.prior((30, 2)), known, mask))
    assert len(states) == 13
    for i in range(3):
        block = torch.stack([s[:, 0] for s in states[4 * i : 4 * i + 4]])
        assert torch.equal(block, block[:1].expand(4, -1))  # the noise is drawn once per level
        assert float((block[0] - 0.7).std()) == pytest.approx(float(method.ladder[i]), rel=0.5)
    assert torch.equal(states[-1][:, 0], known[:, 0])


def test_inpainting_finds_the_conditional_law():
    """A Gaussian of correlation 0.8, first coordinate 1.5: truth 1.2 and 0.36; clamping in the reverse chain fails."""
    cov, n = torch.tensor([[1.0, 0.8], [0.8, 1.0]]), 3000

    def denoiser(x, sigma):
        return x @ torch.linalg.inv(cov + float(sigma[0]) ** 2 * torch.eye(2)) @ cov

    method = NCSN.for_data((2,))
    with seeded(0):
        x = method.prior((n, 2))
        *_, x = method.inpaint(method.oracle(denoiser), x, torch.full((n, 2), 1.5), torch.tensor([True, False]))
    mean = 0.0  # of the second coordinate: a linear recursion
    for sigma in method.ladder.tolist():
        p = torch.linalg.inv(cov + sigma**2 * torch.eye(2))
        for _ in range(method.T):
            step = method.eps * (sigma / method.sigma_L) ** 2 / 2
            mean -= step * float(p[1, 1] * mean + p[0, 1] * 1.5)
    assert mean == pytest.approx(1.144, abs=2e-3)
    assert float(x[:, 1].mean()) == pytest.approx(mean, abs=4 * sqrt(0.4 / n))
    assert 0.34 < float(x[:, 1].var()) < 0.45
    grid = samplers.geometric(20, 0.01, 200)
    x = 20 * torch.randn(n, 2)
    for now, new in zip(grid[:-1], grid[1:], strict=True):
        x[:, 0] = 1.5 + float(now) * torch.randn(n)
        (x,) = samplers.ddim(denoiser, x, torch.stack([now, new]), eta=1.0)
    assert float(x[:, 1].mean()) < 0.9


# The ladder by formulas


@pytest.mark.equation("eq:ncsn-top", "minigen.ladder.largest_distance")
@pytest.mark.parametrize("distance", [1.0, 4.0, 8.0])
def test_bound_on_the_responsibility(distance):
    law = Mixture.of(torch.tensor([[0.0], [distance], [3.0]], dtype=F64))
    x = GRID[:, None]
    density = (-(GRID**2) / 2).exp() / sqrt(2 * pi)
    mean = float((density * law.responsibilities(x, 1.0)[:, 1]).sum() * DX)
    assert 0 < mean <= 0.5 * exp(-(distance**2) / 8)
    assert ladder.largest_distance(law.means) == pytest.approx(max(distance, 3.0))
    with pytest.raises(ValueError, match="two samples"):
        ladder.largest_distance(law.means[:1])


@pytest.mark.equation("eq:ncsn-overlap", "minigen.ladder.overlap")
def test_overlap_is_a_probability_of_shells():
    """A point of level 1 has a length within 3 gamma / sqrt 2 of sqrt(N) gamma, the shell of level gamma."""
    dims, gamma, n = 64, 1.3, 400_000
    radius = torch.randn(n, dims // 8, 8).flatten(1).norm(dim=1)  # of level 1
    center = sqrt(dims) * gamma
    hit = ((radius - center).abs() < 3 * gamma / sqrt(2)).double().mean()
    assert float(ladder.overlap(gamma, dims)) == pytest.approx(float(hit), abs=0.02)  # the shell is not quite Gaussian
    assert float(ladder.overlap(1.0, 3072)) == pytest.approx(0.9973, abs=1e-4)


@pytest.mark.equation("eq:ncsn-gamma", "minigen.ladder.ratio")
@pytest.mark.parametrize(("dims", "gamma"), [(64, 1.3608), (784, 1.0820), (3072, 1.0398)])
def test_the_ratio_has_a_closed_form(dims, gamma):
    assert ladder.ratio(dims) == pytest.approx(gamma, abs=1e-4)
    assert ladder.ratio(dims) == pytest.approx(1 / (1 - 3 / sqrt(2 * dims)), abs=1e-4)
    quantile = float(torch.special.ndtri(torch.tensor(1 - 0.2, dtype=F64)))
    assert ladder.ratio(dims, 0.2) == pytest.approx((sqrt(2 * dims) + quantile) / (sqrt(2 * dims) - 3), abs=1e-4)


def test_the_rule_says_nothing_in_four_dimensions():
    gammas = torch.logspace(0, 4, 2000, dtype=F64)
    for dims in (1, 2, 4):
        assert float(ladder.overlap(gammas, dims).min()) > 0.99
        with pytest.raises(ValueError, match="says nothing"):
            ladder.ratio(dims)
    assert ladder.ratio(5) == pytest.approx(19.0, abs=0.7)
    with pytest.raises(ValueError, match="between 0 and 0.99"):
        ladder.ratio(64, 1.0)


PUBLISHED = [(3072, 50, 232, 5, 6.2e-6), (12288, 90, 500, 5, 3.3e-6), (49152, 190, 1086, 3, 1.8e-6)]


@pytest.mark.equation("eq:ncsn-recursion", "minigen.ladder.step_size")
@pytest.mark.parametrize(("dims", "top", "count", "T", "eps"), PUBLISHED)
def test_the_published_steps_to_two_digits(dims, top, count, T, eps):
    gamma = (top / 0.01) ** (1 / (count - 1))
    best = ladder.step_size(gamma, T, 0.01)
    assert f"{best:.1e}" == f"{eps:.1e}"
    assert float(ladder.overlap(gamma, dims)) == pytest.approx(0.567, abs=1e-3)  # not 0.5
    rho, v = best / 0.01**2, gamma**2
    for _ in range(T):  # the recursion, step by step
        v = (1 - rho) ** 2 * v + 2 * rho
    assert float(ladder.variance(rho, gamma, T)) == pytest.approx(v, rel=1e-9)
    for other in (0.9 * rho, 1.1 * rho):
        assert float(ladder.variance(other, gamma, T)) > v > 1


def test_ffhq_and_church():
    best = ladder.step_size((348 / 0.01) ** (1 / 2310), 3, 0.01)
    assert best == pytest.approx(9e-7, rel=0.01)  # the code's 9e-7, not 0.9e-7
    gamma = (140 / 0.01) ** (1 / 787)
    assert ladder.step_size(gamma, 4, 0.01) == pytest.approx(2.3e-6, rel=0.02)  # published: 4.9e-6
    flat = [float(ladder.variance(eps / 1e-4, gamma, 4)) for eps in (2.3e-6, 4.9e-6)]
    assert flat == pytest.approx([1.022, 1.025], abs=1e-3)


def test_improved_puts_the_formulas_together():
    method = NCSN.improved(3072, 100.0, 0.02)
    gamma = float(method.ladder[0] / method.ladder[1])
    assert method.denoise and method.T == 5 and gamma <= ladder.ratio(3072) and method.L == 220
    assert method.eps == pytest.approx(2 * ladder.step_size(gamma, 5, 0.02))
    published = NCSN(sigma_1=100.0, L=232, T=5, eps=4.96e-5, denoise=True)
    gamma = float(published.ladder[0] / published.ladder[1])
    assert f"{ladder.step_size(gamma, 5, 0.02) / 4:.1e}" == "6.2e-06"  # back to pixels in [0, 1]
    assert published.eps == pytest.approx(8 * 6.2e-6)


# Paper against code


def test_the_factor_two_in_the_step():
    """The code's (a, sqrt(2 a)) with a = 2e-5 sigma^2 / sigma_L^2 is the paper's step with 4e-5."""
    paper, code = 2e-5 / (2 * 0.01**2), 2e-5 / 0.01**2  # alpha / (2 sigma^2)
    inflation = [float(ladder.variance(rho, 1.668, 10_000)) for rho in (paper, code)]
    assert inflation == pytest.approx([1 / (1 - 0.05), 1 / (1 - 0.1)], rel=1e-6)
    with seeded(4):
        *_, x = samplers.langevin(gaussian(1, 0.0).denoiser, torch.zeros(60_000, 1), 1.0, code, 60)
    assert float(x.var()) == pytest.approx(1.111, rel=0.02)


@pytest.mark.parametrize("top", [10.0, 20.0])
def test_section_4_3_against_appendix_b_1(top):
    """Ladder 10 to 0.1 (the text) and 20 to 1 (the appendix), both with eps = 0.1: one of them gives NaN."""
    low = top / 100 if top == 10 else 1.0
    factor = 1 - 0.1 * (top / low) ** 2 / (2 * (1 + top**2))
    levels = samplers.geometric(top, low, 10)[:-1]
    with seeded(5):
        x = anneal(16 * torch.rand(300, 2) - 8, slope, levels, 100, 0.1)
    if top == 10:
        assert factor == pytest.approx(-3.95, abs=0.01) and bool(x.isnan().all())
        with pytest.raises(ValueError, match="diverge"):
            NCSN(sigma_1=10.0, sigma_L=0.1, eps=0.1)
    else:
        assert abs(factor) < 1 and bool(x.isfinite().all())


def test_the_toy_code_has_another_law():
    """With the code's width sigma the ladder 20 to 1 ends at the data; with the honest one it is sqrt(2) wide."""
    levels = samplers.geometric(20, 1, 10)[:-1]
    with seeded(6):
        x = 16 * torch.rand(1280, 2) - 8
        code = anneal(x, lambda y, sigma: slope(y, 0.0, width=sigma), levels, 100, 0.1)
        honest = anneal(x, slope, levels, 100, 0.1)
    assert within(code) == pytest.approx(1.0, abs=0.06) and within(honest) == pytest.approx(sqrt(2), abs=0.1)
    assert 0.15 < share(code) < 0.27
    tweedie = honest + slope(honest, 1.0)
    assert within(tweedie) == pytest.approx(sqrt(0.5), abs=0.06)  # over-shrunk


# Bridges


@pytest.mark.equation("eq:ncsn-pixels", "minigen.ncsn.NCSN")
def test_pixels_in_minus_one_to_one_double_the_noise_and_quadruple_eps():
    """The paper's constants on [0, 1] and ours on [-1, 1] walk the same way: x' = 2 x - 1 after every step."""
    law = Mixture.of(torch.rand(5, 2, dtype=F64), 0.05)
    doubled = Mixture.of(2 * law.means - 1, 0.1)
    ours = NCSN(T=3)
    paper = NCSN(sigma_1=1.0, sigma_L=0.01, eps=2e-5, T=3)
    x = torch.rand(20, 2, dtype=F64)
    with seeded(7):
        a = list(paper.reverse(paper.oracle(law.denoiser), x))
    with seeded(7):
        b = list(ours.reverse(ours.oracle(doubled.denoiser), 2 * x - 1))
    for one, two in zip(a, b, strict=True):
        assert torch.allclose(2 * one - 1, two, atol=1e-6)


@pytest.mark.equation("eq:ncsn-vp", "minigen.ddpm.DDPM.loss")
def test_the_simple_loss_of_ddpm_is_denoising_score_matching():
    ddpm, n = DDPM(), 500
    x0 = torch.randn(n, 2)

    def net(x, u):
        return torch.tanh(x + u[:, None])

    with seeded(8):
        loss = ddpm.loss(net, x0)
    with seeded(8):
        t, eps = torch.randint(1, 1001, (n,)), torch.randn(n, 2)
    a = ddpm.alpha_bar[t][:, None]
    x_t = a.sqrt() * x0.double() + (1 - a).sqrt() * eps.double()
    s = -net(x_t, (t / 1000).double()) / (1 - a).sqrt()
    target = -(x_t - a.sqrt() * x0.double()) / (1 - a)  # the score of q(x_t | x_0)
    matching = (1 - a[:, 0]) * (s - target).square().mean(1)
    assert torch.allclose(loss.double(), matching, rtol=1e-3, atol=1e-4)


def test_the_shared_samplers_know_ncsn():
    method = NCSN.for_data((2,))
    denoise = method.denoiser(method.oracle(two_modes().denoiser))
    sigmas = method.sigmas(40)
    assert len(sigmas) == 41 and float(sigmas[0]) == pytest.approx(5.0) and float(sigmas[-1]) == 0
    with seeded(9):
        *_, x = samplers.ddim(denoise, method.start((2000, 2), sigmas[0]), sigmas)
    left = float((x.sum(1) < 0).double().mean())
    assert left == pytest.approx(0.2, abs=0.05)  # sigma_1 = 5 for unit variance: the start is nearly the noisy law
    with pytest.raises(ValueError, match="steps must be positive"):
        method.sigmas(0)


def test_defaults_for_points_sample_the_mixture():
    method, law = NCSN.for_data((2,)), two_modes()
    assert NCSN.for_data((3, 32, 32)) == NCSN()
    with seeded(10):
        x = sample(method, method.oracle(law.denoiser), (1500, 2))
    left = law.responsibilities(x)[:, 0] > 0.5
    assert float(left.double().mean()) == pytest.approx(0.2, abs=4 * sqrt(0.16 / 1500) + 0.01)
    assert float((x[left] - law.means[0]).std()) == pytest.approx(0.35, rel=0.12)


def test_weights_of_the_digits_come_with_the_package():
    from importlib.resources import files

    from minigen import load

    run = load(files("minigen") / "assets" / "ncsn_digits.safetensors")
    improved = NCSN.improved(64, 10.0, sigma_data=0.75)
    assert replace(run.method, eps=improved.eps) == improved and run.method.eps == pytest.approx(improved.eps, rel=0.02)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"sigma_1": 0.01}, "sigma_1 > sigma_L"),
        ({"L": 1}, "L >= 2"),
        ({"T": 0}, "T >= 1"),
        ({"eps": 0.0}, "diverge"),
        ({"eps": 0.0016}, "4 sigma_L"),
        ({"box": 0.0}, "positive box"),
        ({"sigma_data": -1.0}, "positive box and sigma_data"),
    ],
)
def test_impossible_settings_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        NCSN(**bad)


def test_the_start_fills_the_box():
    far = float(NCSN(box=3.0).prior((5000,)).abs().max())
    assert 2.9 < far <= 3


def test_the_farthest_pair_is_found_in_any_block():
    x = torch.zeros(3000, 2)
    x[1500], x[2500] = torch.tensor([-3.0, 0.0]), torch.tensor([3.0, 0.0])
    assert ladder.largest_distance(x) == pytest.approx(6.0)


def test_levels_of_whole_powers_and_bad_ladders():
    assert ladder.levels(8, 1, 2) == 4
    assert ladder.levels(125, 1, 5) == 4  # the quotient of the logarithms rounds to a little more than 3
    assert ladder.levels(8.1, 1, 2) == 5
    for wrong in ((1, 0.01, 1.0), (0.01, 1, 1.3), (float("inf"), 0.01, 2.0)):
        with pytest.raises(ValueError, match="a ladder needs"):
            ladder.levels(*wrong)
    with pytest.raises(ValueError, match="a ladder needs"):
        NCSN.improved(64, 0.02)
    with pytest.raises(ValueError, match="NCSN needs"):
        NCSN(sigma_1=float("inf"))
