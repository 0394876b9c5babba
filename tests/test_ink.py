"""Ink: every equation of the chapter against numerics, and the package's kernels against Bayes' rule on a grid."""

from __future__ import annotations

from math import cos, e, exp, expm1, factorial, log, log1p, pi, sin, sqrt

import pytest
import torch
from torch.distributions import Normal

from minigen import seeded
from minigen.evaluate import sliced_wasserstein
from minigen.ink import Ink, clock, mix, reverse_kernel, step, step_back, unmix
from minigen.laws import Mixture, gaussian, heart, two_modes

F64 = torch.float64
GRID = torch.linspace(-9, 9, 6001, dtype=F64)
H = float(GRID[1] - GRID[0])


def blots(*at: float, s: float = 0.5, weights: list[float] | None = None) -> Mixture:
    means = torch.tensor(at, dtype=F64)[:, None]
    return Mixture.of(means, s, None if weights is None else torch.tensor(weights, dtype=F64))


LOPSIDED = blots(-1.3, 0.2, 1.1, s=0.45, weights=[0.2, 0.5, 0.3])
PAIR = blots(-sqrt(0.8), sqrt(0.8), s=sqrt(0.2))


def on(law: Mixture, x: torch.Tensor = GRID) -> torch.Tensor:
    return law.log_prob(x[:, None])


def mean(values: torch.Tensor, law: Mixture) -> float:
    return float(torch.trapezoid(values * on(law).exp(), GRID))


def diff(values: torch.Tensor, order: int = 1) -> torch.Tensor:
    for _ in range(order):
        values = torch.gradient(values, spacing=H)[0]
    return values


def kl_to_equilibrium(law: Mixture) -> float:
    return mean(on(law) - Normal(0.0, 1.0).log_prob(GRID), law)


def free_energy(law: Mixture) -> float:
    return mean(GRID**2 / 2 + on(law), law)


# From coin tosses to the diffusion equation


@pytest.mark.equation("eq:ink-walk")
@pytest.mark.equation("eq:ink-diffusion")
@pytest.mark.equation("eq:ink-gauss")
def test_counted_tosses_become_the_gaussian():
    """The master equation, iterated exactly, tends to N(0, 2 kappa t); the error falls as h^2."""
    errors = []
    for tosses in (100, 400):  # t = 1, h^2 = delta = 1 / tosses: kappa = 1/2
        p = torch.zeros(2 * tosses + 1, dtype=F64)
        p[tosses] = 1
        for _ in range(tosses):
            left, right = torch.zeros_like(p), torch.zeros_like(p)
            left[:-1], right[1:] = p[1:], p[:-1]
            p = (left + right) / 2
        h = sqrt(1 / tosses)
        x = (torch.arange(2 * tosses + 1, dtype=F64) - tosses) * h
        assert float((p * x**2).sum()) == pytest.approx(1.0)  # 2 kappa t
        taken = p > 0  # every second cell: parity
        density = Normal(0.0, 1.0).log_prob(x).exp()
        errors.append(float((p[taken] / (2 * h) - density[taken]).abs().max()))
    assert errors[0] < 2e-3 and errors[1] == pytest.approx(errors[0] / 4, rel=0.05)


@pytest.mark.equation("eq:ink-diffusion")
@pytest.mark.equation("eq:ink-gauss")
def test_the_gaussian_solves_the_diffusion_equation():
    kappa, t, dt = 0.7, 0.9, 1e-4

    def p(t):
        return Normal(0.0, sqrt(2 * kappa * t)).log_prob(GRID).exp()

    assert torch.allclose((p(t + dt) - p(t - dt)) / (2 * dt), kappa * diff(p(t), 2), atol=5e-5)


@pytest.mark.equation("eq:ink-box")
def test_box_density_is_the_limit_of_reflected_tosses():
    cells, t, left, right = 50, 400, 8, 16
    p = torch.zeros(cells, dtype=F64)
    p[left:right] = 1 / (right - left)
    for _ in range(t + 1):
        before = p
        p = (torch.cat([p[:1], p[:-1]]) + torch.cat([p[1:], p[-1:]])) / 2  # who cannot leave stays
    p, t = (before + p) / 2, t + 0.5  # even and odd cells take turns: average them out
    a, b, kappa = left / cells, right / cells, 0.5 / cells**2
    for cell in (0, 11, 30, 49):
        x = (cell + 0.5) / cells
        waves = 0.0
        for n in range(1, 60):
            height = (sin(n * pi * b) - sin(n * pi * a)) / (n * pi * (b - a))
            waves += 2 * height * cos(n * pi * x) * exp(-kappa * n**2 * pi**2 * t)
        assert float(p[cell]) * cells == pytest.approx(1 + waves, abs=2e-3)


@pytest.mark.equation("eq:ink-entropy")
def test_entropy_grows_by_the_mean_squared_score():
    kappa, t, dt = 0.5, 0.3, 1e-3

    def spread_out(t):  # free diffusion: blots widen and stay where they are
        return Mixture(LOPSIDED.means, (LOPSIDED.std**2 + 2 * kappa * t).sqrt(), LOPSIDED.weights)

    def entropy(t):
        return -mean(on(spread_out(t)), spread_out(t))

    rate = (entropy(t + dt) - entropy(t - dt)) / (2 * dt)
    law = spread_out(t)
    assert rate == pytest.approx(kappa * mean(diff(on(law)) ** 2, law), rel=1e-4)


# Langevin, Fokker-Planck, equilibrium


@pytest.mark.equation("eq:ink-langevin")
@pytest.mark.equation("eq:ink-boltzmann")
def test_langevin_comes_to_the_boltzmann_law():
    """U = x^4 / 4: E[x U'(x)] = Theta (partial integration), and E x^2 of the Boltzmann law."""
    gamma, theta, dt = 1.5, 0.8, 0.004
    kappa = theta / gamma
    with seeded(0):
        x = torch.randn(20_000, dtype=F64)
        for _ in range(1500):
            x = x - x**3 / gamma * dt + sqrt(2 * kappa * dt) * torch.randn_like(x)
    weight = (-(GRID**4) / 4 / theta).exp()
    square = float((weight * GRID**2).sum() / weight.sum())
    error = float((x**2).std()) / sqrt(len(x))
    assert float((x**4).mean()) == pytest.approx(theta, rel=0.04)
    assert float((x**2).mean()) == pytest.approx(square, abs=4 * error + 0.01)


@pytest.mark.equation("eq:ink-fokker", "minigen.ink.Ink.at")
def test_densities_of_the_process_solve_fokker_planck():
    """For the spring, gamma = 2, kappa = 1/2, the exact density of `Ink` solves the equation."""
    drop, t, dt = Ink(LOPSIDED), 0.4, 1e-4
    p = on(drop.at(t)).exp()
    by_time = (on(drop.at(t + dt)).exp() - on(drop.at(t - dt)).exp()) / (2 * dt)
    assert torch.allclose(by_time, 0.5 * diff(p * GRID) + 0.5 * diff(p, 2), atol=2e-5)


@pytest.mark.equation("eq:ink-fokker")
@pytest.mark.equation("eq:ink-boltzmann")
def test_the_boltzmann_law_carries_no_current():
    gamma, theta = 1.7, 0.6
    U = 2 * (GRID**2 - 1) ** 2
    inside = GRID.abs() < 2
    log_pi = -U / theta
    current = diff(U) + theta * diff(log_pi)
    assert float(current[inside].abs().max()) < 1e-9
    kappa = theta / gamma  # Einstein
    p = (log_pi - log_pi.max()).exp()
    change = diff(p * diff(U)) / gamma + kappa * diff(p, 2)
    assert float(change[inside].abs().max()) < 2e-3 * float((kappa * diff(p, 2))[inside].abs().max())


@pytest.mark.equation("eq:ink-ou", "minigen.ink.mix")
@pytest.mark.equation("eq:ink-step", "minigen.ink.step")
def test_steps_compose_to_the_exact_kernel():
    """Any steps whose times sum to t give the mean and the variance of the exact kernel."""
    betas = torch.tensor([0.3, 0.01, 0.6, 0.05], dtype=F64)
    t = float(clock(betas)[-1])
    assert t == pytest.approx(sum(-log(1 - b) for b in betas.tolist()))
    start = torch.full((200_000, 1), 1.7, dtype=F64)
    with seeded(1):
        *_, x = mix(start, betas)
    sd = sqrt(1 - exp(-t))
    assert float(x.mean()) == pytest.approx(exp(-t / 2) * 1.7, abs=4 * sd / sqrt(200_000))
    assert float(x.var()) == pytest.approx(sd**2, rel=4 * sqrt(2 / 200_000))


@pytest.mark.equation("eq:ink-ou", "minigen.ink.step")
def test_small_langevin_steps_tend_to_the_exact_kernel():
    scale, var, n, t = 1.0, 0.0, 20_000, 1.3
    for _ in range(n):
        scale, var = scale * (1 - t / n / 2), var * (1 - t / n / 2) ** 2 + t / n
    assert scale == pytest.approx(exp(-t / 2), rel=1e-4) and var == pytest.approx(1 - exp(-t), rel=1e-4)


@pytest.mark.equation("eq:ink-mixture", "minigen.ink.Ink.at")
def test_a_mixture_stays_a_mixture():
    """The law of `Ink.at` is the old law, pushed through the kernel by integration."""
    t, drop = 0.7, Ink(LOPSIDED)
    kernel = Normal(exp(-t / 2) * GRID, sqrt(1 - exp(-t)))
    for y in (-1.0, 0.0, 0.4, 2.0):
        pushed = torch.trapezoid(kernel.log_prob(torch.tensor(y, dtype=F64)).exp() * on(LOPSIDED).exp(), GRID)
        here = torch.tensor([y], dtype=F64)
        assert float(pushed) == pytest.approx(float(on(drop.at(t), here).exp()), rel=1e-6)


@pytest.mark.parametrize("t", [1e-4, 0.3, 5.0])
def test_score_is_the_gradient(t):
    drop = Ink(two_modes())
    with seeded(2):
        x = drop.at(t).sample(20).double().requires_grad_(True)
    grad = torch.autograd.grad(drop.at(t).log_prob(x).sum(), x)[0]
    assert torch.allclose(grad, drop.score(x.detach(), t), rtol=1e-4, atol=1e-4)


# The second law


@pytest.mark.equation("eq:ink-free", "minigen.ink.Ink.free_energy")
def test_free_energy_is_the_divergence_from_equilibrium():
    drop, t = Ink(LOPSIDED), 0.2
    law = drop.at(t)
    assert free_energy(law) == pytest.approx(kl_to_equilibrium(law) - log(2 * pi) / 2, abs=1e-9)
    with seeded(3):
        values = drop.free_energy(law.sample(40_000), t)
    error = float(values.std()) / 200
    assert float(values.mean()) == pytest.approx(free_energy(law), abs=4 * error)


@pytest.mark.equation("eq:ink-second", "minigen.ink.Ink.dissipation")
def test_free_energy_falls_by_the_dissipation():
    drop, t, dt = Ink(LOPSIDED), 0.25, 1e-4
    law = drop.at(t)
    rate = (free_energy(drop.at(t - dt)) - free_energy(drop.at(t + dt))) / (2 * dt)
    assert rate > 0
    assert rate == pytest.approx(mean((GRID + diff(on(law))) ** 2, law) / 2, rel=1e-4)
    exact = drop.dissipation(GRID[:, None], t)
    assert mean(exact, law) == pytest.approx(rate, rel=1e-4)


def test_equilibrium_dissipates_nothing():
    x = torch.randn(50, 3, dtype=F64)
    assert float(Ink(gaussian(3)).dissipation(x, 0.8).max()) < 1e-10


@pytest.mark.equation("eq:ink-balance", "minigen.ink.step")
@pytest.mark.parametrize("beta", [0.01, 0.5, 0.95])
def test_detailed_balance(beta):
    x, y = torch.randn(2, 100, dtype=F64)
    rest = Normal(torch.tensor(0.0, dtype=F64), 1.0)

    def jump(a, b):  # from a to b
        return Normal(sqrt(1 - beta) * a, sqrt(beta)).log_prob(b)

    assert torch.allclose(rest.log_prob(x) + jump(x, y), rest.log_prob(y) + jump(y, x))
    with seeded(4):  # and `step` has this kernel
        start = torch.full((100_000, 1), 0.9, dtype=F64)
        end = step(start, beta)
    assert float(end.mean()) == pytest.approx(sqrt(1 - beta) * 0.9, abs=4 * sqrt(beta / 1e5))
    assert float(end.var()) == pytest.approx(beta, rel=4 * sqrt(2 / 1e5))


# One step back


def after(law: Mixture, beta: float) -> Mixture:
    return Ink(law).at(-log1p(-beta))


def bayes(law: Mixture, found: float, beta: float) -> torch.Tensor:
    """The density of the state before the step, on the grid, from Bayes' rule alone."""
    q = Normal(sqrt(1 - beta) * GRID, sqrt(beta)).log_prob(torch.tensor(found, dtype=F64)).exp() * on(law).exp()
    return q / torch.trapezoid(q, GRID)


@pytest.mark.equation("eq:ink-bayes", "minigen.ink.reverse_kernel")
@pytest.mark.parametrize("beta", [0.02, 0.4, 0.9])
@pytest.mark.parametrize("found", [-0.7, 0.0, 1.5])
def test_reverse_kernel_is_bayes_rule(beta, found):
    """Both forms of the equation, and the closed form of the package."""
    q = bayes(LOPSIDED, found, beta)
    x = torch.tensor([found], dtype=F64)
    kernel = reverse_kernel(LOPSIDED, x, beta)
    assert torch.allclose(on(kernel).exp(), q, atol=1e-7)
    rest = Normal(0.0, 1.0)
    ratio = on(LOPSIDED) - rest.log_prob(GRID) - on(after(LOPSIDED, beta), x) + rest.log_prob(x)
    forward = Normal(sqrt(1 - beta) * found, sqrt(beta)).log_prob(GRID)
    inside = GRID.abs() < 5  # beyond, the equilibrium underflows
    assert torch.allclose((forward + ratio).exp()[inside], q[inside], atol=1e-7)


def test_reverse_kernel_in_the_plane_agrees_with_simulation():
    law, beta, place = two_modes(), 0.3, torch.tensor([0.3, 0.2])
    with seeded(5):
        before = law.sample(2_000_000)
        now = step(before, beta)
    near = before[(now - place).norm(dim=1) < 0.04]
    kernel = reverse_kernel(law, place, beta)
    exact = (kernel.weights[:, None] * kernel.means).sum(0).float()
    error = near.std(0) / sqrt(len(near))
    assert bool(((near.mean(0) - exact).abs() < 4 * error + 0.01).all())


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.2])
def test_reverse_kernel_refuses_strengths(beta):
    with pytest.raises(ValueError, match="0 < beta < 1"):
        reverse_kernel(PAIR, torch.zeros(1), beta)


def test_reverse_kernel_refuses_points():
    with pytest.raises(ValueError, match="width"):
        reverse_kernel(Mixture.of(torch.zeros(2, 1)), torch.zeros(1), 0.1)


@pytest.mark.equation("eq:ink-humps", "minigen.ink.reverse_kernel")
@pytest.mark.parametrize("s2", [0.1, 0.2, 0.3])
def test_the_second_hump_is_born_at_the_fourth_power(s2):
    s, m = sqrt(s2), sqrt(1 - s2)
    law, middle = blots(-m, m, s=s), torch.zeros(1, dtype=F64)
    for factor, humps in ((0.97, 1), (1.03, 2)):
        p = on(reverse_kernel(law, middle, factor * (s / m) ** 4), torch.linspace(-2, 2, 8001, dtype=F64))
        assert int(((p[1:-1] > p[:-2]) & (p[1:-1] > p[2:])).sum()) == humps


@pytest.mark.equation("eq:ink-lost", "minigen.ink.reverse_kernel")
@pytest.mark.parametrize("beta", [0.03, 0.5, 0.9])
def test_lost_free_energy_is_the_distance_between_back_and_forward(beta):
    later, total = after(LOPSIDED, beta), 0.0
    places = torch.linspace(-6, 6, 241, dtype=F64)
    for x, weight in zip(places, on(later, places).exp() * 0.05):
        q = on(reverse_kernel(LOPSIDED, x[None], beta))
        forward = Normal(sqrt(1 - beta) * x, sqrt(beta)).log_prob(GRID)
        total += float(weight * torch.trapezoid(q.exp() * (q - forward), GRID))
    assert total == pytest.approx(free_energy(LOPSIDED) - free_energy(later), rel=1e-4)


@pytest.mark.equation("eq:ink-prices", "minigen.ink.reverse_kernel")
@pytest.mark.parametrize("law", [LOPSIDED, PAIR], ids=["lopsided", "pair"])
def test_prices_follow_three_powers(law):
    """Divergences of the exact step back from three models, against the leading order."""
    beta, z = 5e-4, torch.linspace(-9, 9, 901, dtype=F64)
    later, places = after(law, beta), torch.linspace(-3.6, 3.6, 121, dtype=F64)
    paid = torch.zeros(3, dtype=F64)
    share = on(later, places).exp()
    for x, weight in zip(places, share / share.sum()):
        kernel = reverse_kernel(law, x[None], beta)
        w, m = kernel.weights, kernel.means[:, 0]
        center = (w * m).sum()
        var = (w * (kernel.std**2 + m**2)).sum() - center**2
        y = center + z * sqrt(beta)
        q = on(kernel, y)
        models = (sqrt(1 - beta) * x, beta**0.5), (center, beta**0.5), (center, var.sqrt())
        paid += weight * torch.stack([torch.trapezoid(q.exp() * (q - Normal(c, s).log_prob(y)), y) for c, s in models])
    for k in (1, 2, 3):
        g = diff(on(law) + GRID**2 / 2, k)
        leading = beta**k / (2 * factorial(k)) * mean(g**2, law)
        assert float(paid[k - 1]) == pytest.approx(leading, rel=0.02)


@pytest.mark.equation("eq:ink-tweedie", "minigen.ink.step_back")
@pytest.mark.parametrize("beta", [0.01, 0.3, 0.8])
def test_step_back_is_the_exact_mean(beta):
    later = Ink(LOPSIDED)
    t = -log1p(-beta)
    for found in (-1.0, 0.3, 2.0):
        x = torch.tensor([[found]], dtype=F64)
        exact = torch.trapezoid(GRID * bayes(LOPSIDED, found, beta), GRID)
        assert float(step_back(x, beta, later.score(x, t))) == pytest.approx(float(exact), abs=1e-6)


# The reversal


@pytest.mark.equation("eq:ink-reverse", "minigen.ink.Ink.score")
@pytest.mark.equation("eq:ink-family", "minigen.ink.Ink.score")
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 1.5])
def test_reversed_fokker_planck_runs_the_densities_back(lam):
    """The Fokker-Planck equation of the reversed process, in backward time, is minus the forward change."""
    drop, t, dt = Ink(LOPSIDED), 0.4, 1e-4
    p = on(drop.at(t)).exp()
    drift = GRID / 2 + (1 + lam**2) / 2 * drop.score(GRID[:, None], t)[:, 0]
    backward = -diff(drift * p) + lam**2 / 2 * diff(p, 2)
    by_time = (on(drop.at(t - dt)).exp() - on(drop.at(t + dt)).exp()) / (2 * dt)
    assert torch.allclose(backward, by_time, atol=5e-5)


@pytest.mark.equation("eq:ink-reverse", "minigen.ink.unmix")
def test_small_steps_back_tend_to_the_reversed_process():
    """Drift and variance per time of one `step_back`, as beta goes to 0."""
    drop, t, beta = Ink(LOPSIDED), 0.4, 1e-6
    x = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    slope = drop.score(x, t)
    assert torch.allclose((step_back(x, beta, slope) - x) / beta, x / 2 + slope, atol=1e-4)
    kick = step_back(x, beta, slope, 1.0) - step_back(x, beta, slope)
    assert torch.allclose(kick**2 / beta, torch.ones_like(x))


@pytest.mark.parametrize("law", [heart(), two_modes()], ids=["heart", "two_modes"])
def test_ink_is_unmixed(law):
    betas = torch.linspace(1e-4, 0.06, 200, dtype=F64)
    with seeded(6):
        *_, x = unmix(Ink(law).score, torch.randn(1000, 2), betas)
        real, again = law.sample(1000), law.sample(1000)
    assert sliced_wasserstein(x, real) < sliced_wasserstein(real, again) + 0.06


def test_a_gaussian_is_kept_both_ways():
    """Equilibrium: the film looks the same in both directions; entropy stays at its maximum."""
    betas = torch.full((30,), 0.05, dtype=F64)
    with seeded(7):
        x = torch.randn(50_000, 1, dtype=F64)
        *_, on_ = mix(x, betas)
        *_, back = unmix(Ink(gaussian(1)).score, x, betas)
    assert float(on_.var()) == pytest.approx(1.0, abs=0.03) and float(back.var()) == pytest.approx(0.95, abs=0.03)
    v = torch.tensor([0.1, 9.0], dtype=F64)  # exercise: F falls, S may fall
    for v0 in v.tolist():
        later = 1 + (v0 - 1) * exp(-0.5)
        assert (later > v0) == (v0 < 1)
        F = [a / 2 - 0.5 * log(2 * pi * e * a) for a in (v0, later)]
        assert F[1] < F[0]


def test_recorded_kicks_bring_every_particle_home_and_errors_grow():
    betas = torch.linspace(1e-4, 0.06, 200, dtype=F64)
    start, delta = torch.randn(4000, 2, dtype=F64), 0.01
    x, record = start, []
    for b in betas:
        record.append(torch.randn_like(x))
        x = (1 - b).sqrt() * x + b.sqrt() * record[-1]
    exact = spoiled = x
    for b, eps in zip(betas.flip(0), record[::-1]):
        exact = (exact - b.sqrt() * eps) / (1 - b).sqrt()
        spoiled = (spoiled - b.sqrt() * (eps + delta * torch.randn_like(eps))) / (1 - b).sqrt()
    assert torch.allclose(exact, start, atol=1e-9)
    predicted = delta * sqrt(expm1(float(clock(betas)[-1])))
    assert float((spoiled - start).std()) == pytest.approx(predicted, rel=0.05)


def test_unmix_asks_for_the_score_at_the_time_where_the_cloud_is():
    betas, asked = torch.tensor([0.1, 0.2, 0.3]), []

    def score(x, t):
        asked.append(float(t))
        return -x

    list(unmix(score, torch.randn(4, 2), betas))
    assert asked == pytest.approx(clock(betas)[1:].flip(0).tolist())


def test_free_energy_and_dissipation_count_every_dimension():
    ink, t = Ink(gaussian(2, 0.5)), 0.7
    v = 1 + (0.25 - 1) * exp(-t)
    with seeded(0):
        x = sqrt(v) * torch.randn(200_000, 2)
    for terms, exact in (
        (ink.free_energy(x, t), 2 * (v / 2 - log(2 * pi * e * v) / 2)),
        (ink.dissipation(x, t), (v - 1) ** 2 / v),
    ):
        assert abs(float(terms.mean()) - exact) < 4 * float(terms.std()) / len(x) ** 0.5
