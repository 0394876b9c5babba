"""The model of 2015, Gaussian: closed forms, the bound, its exact checks, the thermodynamics, multiplied laws."""

from __future__ import annotations

import math

import pytest
import torch

from minigen import DPM, laws, sample, samplers, seeded
from minigen.bound import gaussian_kl
from minigen.chain import Chain, fraction, geometric
from minigen.evaluate import sliced_wasserstein
from minigen.multiply import by_clamp, by_gaussian, by_slope
from minigen.readout import RBF, Bumps, Dense

LN2 = math.log(2)
FORTY = DPM(T=40, beta_1=0.01, schedule="geometric", alpha_bar_T=0.003)
SCHEDULES = {
    "fraction": DPM(T=40, beta_1=0.01),
    "geometric": FORTY,
    "linear": DPM(T=40, betas=tuple(torch.linspace(0.01, 0.4, 40).tolist())),
}


def silent(x, u):
    return torch.zeros_like(torch.cat([x, x], dim=1))


def two_modes_1d(std=0.35):
    """Weights 0.3 and 0.7, mean 0, variance 1."""
    d = math.sqrt((1 - std**2) / 0.21)
    centers = torch.tensor([[-0.7 * d], [0.3 * d]], dtype=torch.float64)
    return laws.Mixture.of(centers, std, torch.tensor([0.3, 0.7], dtype=torch.float64))


def log_q(law, method, x, t):
    """The exact log-density of x_t at ``x``."""
    a = float(method.chain.alpha_bar[t])
    return law.log_prob(x / a**0.5, math.sqrt((1 - a) / a)) - x[0].numel() / 2 * math.log(a)


def draw(law, method, t, n):
    x0 = law.sample(n)
    return method.chain.perturb(x0, torch.full((n,), t), torch.randn_like(x0))


@pytest.mark.equation("eq:dpm-trap", None)
def test_the_work_on_a_stiffened_spring_obeys_jarzynski():
    torch.manual_seed(0)
    for turns in (1, 4, 30):
        k = torch.linspace(1, 4, turns + 1)
        x, work = torch.randn(200_000), torch.zeros(200_000)
        for old, new in zip(k, k[1:], strict=False):
            work += (new - old) / 2 * x**2
            x = 0.7 * x + ((1 - 0.49) / new).sqrt() * torch.randn_like(x)
        e = (-work).exp()
        assert abs(float(e.mean()) - 0.5) < 4 * float(e.std()) / 200_000**0.5
        assert float(work.mean()) > 0.5 * math.log(4)


@pytest.mark.equation("eq:dpm-gaussian", "minigen.chain.Chain")
@pytest.mark.equation("eq:dpm-invariant", None)
@pytest.mark.equation("eq:dpm-balance", None)
def test_the_kernels_leave_the_equilibrium_and_are_in_balance():
    def normal(x, mean, var):
        return torch.exp(-((x - mean) ** 2) / (2 * var)) / math.sqrt(2 * math.pi * var)

    y = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    for beta in (0.01, 0.3, 0.9):
        kernel = normal(y[:, None], (1 - beta) ** 0.5 * y[None], beta)  # to, from
        flow = kernel * normal(y, 0.0, 1.0)
        assert torch.allclose(flow, flow.T, atol=1e-12)
        assert torch.allclose(flow.sum(1) * 0.01, normal(y, 0.0, 1.0), atol=1e-9)
        b = 0.2  # the bits: rows = to, columns = from
        bits = torch.tensor([[1 - beta * b, beta * (1 - b)], [beta * b, 1 - beta * (1 - b)]])
        flow = bits * torch.tensor([1 - b, b])
        assert torch.allclose(flow, flow.T)


@pytest.mark.equation("eq:dpm-closed", "minigen.chain.Chain.perturb")
def test_many_steps_at_once():
    chain = DPM(T=7, beta_1=0.02).chain
    x = torch.full((200_000, 1), 1.3, dtype=torch.float64)
    torch.manual_seed(0)
    for t in range(1, 6):
        x = (1 - chain.beta[t]).sqrt() * x + chain.beta[t].sqrt() * torch.randn_like(x)
    a = float(chain.alpha_bar[5])
    assert abs(float(x.mean()) - a**0.5 * 1.3) < 4 * math.sqrt((1 - a) / len(x))
    assert abs(float(x.var()) / (1 - a) - 1) < 4 * math.sqrt(2 / len(x))
    leap = chain.perturb(torch.tensor([[1.3]]), torch.tensor([5]), torch.tensor([[2.0]]))
    assert math.isclose(float(leap), a**0.5 * 1.3 + (1 - a) ** 0.5 * 2, rel_tol=1e-6)


@pytest.mark.equation("eq:dpm-posterior", "minigen.chain.Chain.posterior")
def test_the_posterior_is_bayes_rule_and_the_sum_of_precisions():
    chain = DPM(T=10, beta_1=0.02).chain
    y = torch.linspace(-8, 8, 16_001, dtype=torch.float64)
    for t in (1, 2, 5, 10):
        x0, x_t, a = 0.7, -0.4, float(chain.alpha_bar[t - 1])
        pair = torch.tensor([[x_t], [x0]], dtype=torch.float64)
        mean, var = chain.posterior(pair[:1], pair[1:], torch.tensor([t]))
        if t == 1:
            assert float(var) == 0
            assert math.isclose(float(mean), x0, abs_tol=1e-12)
            continue
        b = float(chain.beta[t])
        log = -((x_t - (1 - b) ** 0.5 * y) ** 2) / (2 * b) - (y - a**0.5 * x0) ** 2 / (2 * (1 - a))
        p = log.softmax(0)
        assert math.isclose(float((p * y).sum()), float(mean), abs_tol=1e-8)
        assert math.isclose(float((p * (y - mean[0]) ** 2).sum()), float(var), abs_tol=1e-8)
        c1, c2 = 1 - a, b / (1 - b)
        assert math.isclose(1 / (1 / c1 + 1 / c2), float(var))
        assert math.isclose((a**0.5 * x0 / c1 + x_t / (1 - b) ** 0.5 / c2) * float(var), float(mean))


@pytest.mark.equation("eq:dpm-reading", "minigen.chain.Chain.back")
def test_zeros_are_the_forward_kernel_and_the_reading_is_invertible():
    x, t = torch.randn(5, 2), torch.tensor([1, 2, 10, 20, 40])
    mean, var = FORTY.chain.back(silent(x, t), x, t)
    beta = FORTY.chain.beta[t].float()[:, None]
    assert torch.allclose(mean, (1 - beta).sqrt() * x, atol=1e-6)
    assert torch.allclose(var, beta.expand(5, 2), rtol=1e-4)
    out = torch.tensor([[0.3, -0.2, 1.0, -1.0]]).expand(5, 4)
    mean, var = FORTY.chain.back(out, x, t)
    assert torch.allclose((mean - (1 - beta).sqrt() * x) / beta.sqrt(), out[:, :2], atol=1e-5)
    assert torch.allclose(var.logit() - beta.logit(), out[:, 2:], atol=1e-3)


@pytest.mark.equation("eq:dpm-weight", "minigen.dpm.DPM.log_weight")
def test_the_average_over_paths_is_the_likelihood_of_the_model():
    # a model whose density is known: the steps back of a Gaussian of variance 0.5, whatever the data
    method, model = DPM(T=8, beta_1=0.05), laws.gaussian(1, math.sqrt(0.5))
    net = method.oracle(model.moments)
    var = 1.0  # of x_T; follow the chain back: x_{t-1} = c x_t + noise
    for t in range(8, 0, -1):
        mean, spread = method.step_back(net, torch.ones(1, 1), t)
        var = float(mean) ** 2 * var + float(spread)
    x0 = torch.tensor([[0.0], [0.8], [-1.5]]).repeat(200_000, 1)
    torch.manual_seed(0)
    w = method.log_weight(net, x0).exp().reshape(-1, 3)
    truth = torch.exp(-(x0[:3, 0] ** 2) / (2 * var)) / math.sqrt(2 * math.pi * var)
    error = w.std(0) / len(w) ** 0.5
    assert bool(((w.mean(0) - truth).abs() < 4 * error).all())


@pytest.mark.equation("eq:dpm-elbo", "minigen.dpm.DPM.elbo")
@pytest.mark.equation("eq:dpm-kl", "minigen.chain.Chain.kl")
def test_the_bound_is_the_mean_of_the_log_weight():
    law = two_modes_1d()
    torch.manual_seed(0)
    net, x0 = DPM(T=12, beta_1=0.02).oracle(law.moments), law.sample(40_000) * 1.5 + 0.3  # not standardized, on purpose
    method = DPM(T=12, beta_1=0.02)
    path, bound = method.log_weight(net, x0), method.elbo(net, x0)
    error = (path.std() ** 2 + bound.std() ** 2) ** 0.5 / len(x0) ** 0.5
    assert abs(float(path.mean() - bound.mean())) < 4 * float(error)


def test_kl_is_the_divergence_of_two_gaussians():
    torch.manual_seed(0)
    x0, noise, t = torch.randn(6, 3), torch.randn(6, 3), torch.tensor([2, 3, 10, 20, 39, 40])
    x_t = FORTY.chain.perturb(x0, t, noise)
    mean, var = FORTY.chain.posterior(x_t, x0, t)
    expected = gaussian_kl(mean, var, *FORTY.chain.back(silent(x_t, t), x_t, t)).sum(1)
    assert torch.allclose(FORTY.chain.kl(silent, x0, t, noise), expected)


@pytest.mark.equation("eq:dpm-K", "minigen.dpm.DPM.K")
def test_the_two_forms_differ_by_what_data_lack_of_unit_variance():
    for scale in (1.0, 3.0):
        torch.manual_seed(0)
        x0 = scale * laws.swiss_roll().sample(2000)
        method = SCHEDULES["fraction"]
        with seeded(1):
            k = method.K(silent, x0)
        with seeded(1):
            elbo = method.elbo(silent, x0)
        excess = 0.5 * float(method.chain.beta[1] + method.chain.alpha_bar[-1]) * (x0.square().sum(1) - 2)
        assert torch.allclose(k - elbo, excess, atol=2e-3)


@pytest.mark.equation("eq:dpm-null", "minigen.dpm.DPM.null")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("data", ["swiss_roll", "two_modes", "heart"])
def test_a_silent_network_gives_l_null(schedule, data):
    method = SCHEDULES[schedule]
    torch.manual_seed(0)
    x0 = laws.LAWS[data]().sample(40_000)
    gap = (method.elbo(silent, x0) - method.null(x0)) / LN2
    assert abs(float(gap.mean())) < 0.02
    # and on every single path
    assert torch.allclose(method.log_weight(silent, x0[:50]), method.null(x0[:50]), atol=2e-3)


def test_t_instead_of_t_minus_one_is_wrong_by_a_sixth_of_a_bit():
    method = SCHEDULES["fraction"]
    torch.manual_seed(0)
    x0 = laws.swiss_roll().sample(40_000)
    terms = method.terms(silent, x0)
    assert len(terms) == method.T - 1
    total, single = float(terms.sum(0).mean()), method.loss(silent, x0) * 2  # nats per point
    assert abs(float(single.mean()) - total) < 4 * float(single.std()) / len(x0) ** 0.5
    wrong = total * method.T / (method.T - 1) - total
    assert 0.15 < wrong / LN2 < 0.19


@pytest.mark.equation("eq:dpm-ideal", None)
@pytest.mark.equation("eq:dpm-ceiling", None)
def test_exact_steps_reach_the_entropy_after_the_first_step():
    law = two_modes_1d(0.6)  # smooth: its true steps back are nearly Gaussian
    method = DPM(T=60, beta_1=0.01, schedule="geometric", alpha_bar_T=1e-3)
    torch.manual_seed(0)
    bound = method.elbo(method.oracle(law.moments), law.sample(100_000))
    k_star = log_q(law, method, draw(law, method, 1, 400_000), 1)
    error = math.hypot(float(bound.std()) / 100_000**0.5, float(k_star.std()) / 400_000**0.5)
    gap = float(k_star.mean() - bound.mean())
    assert -4 * error < gap < 0.005 + 4 * error
    points = two_modes_1d(1e-4)  # nearly without entropy: the ceiling is within the entropy of two points
    ceiling = -0.5 * math.log(2 * math.pi * math.e * 0.01)
    top = float(log_q(points, method, draw(points, method, 1, 50_000), 1).mean())
    assert ceiling - 0.62 < top < ceiling - 0.60  # -(0.3 log 0.3 + 0.7 log 0.7) = 0.611


@pytest.mark.equation("eq:dpm-entropy", "minigen.chain.Chain.entropy_bounds")
@pytest.mark.equation("eq:dpm-tilde", "minigen.chain.Chain.beta_tilde")
def test_the_entropy_of_a_step_back_lies_between_the_bounds():
    law, method = two_modes_1d(), DPM(T=6, beta_1=0.05)
    lower, upper = method.chain.entropy_bounds()
    x = torch.linspace(-7, 7, 14_001, dtype=torch.float64)[:, None]

    def entropy(t):
        log = log_q(law, method, x, t)
        return -float((log.exp() * log).sum()) * 0.001

    for t in range(2, 7):
        beta, bar, before = (float(v) for v in (method.chain.beta[t], *method.chain.alpha_bar[[t, t - 1]]))
        step = 0.5 * math.log(2 * math.pi * math.e * beta)  # H(X_t | X_{t-1})
        back = entropy(t - 1) + step - entropy(t)
        assert float(lower[t - 2]) < back < float(upper[t - 2])
        assert math.isclose(float(upper[t - 2]), step)
        assert math.isclose(float(lower[t - 2]), step + 0.5 * math.log((1 - before) / (1 - bar)))


@pytest.mark.equation("eq:dpm-work", "minigen.dpm.DPM.log_weight")
@pytest.mark.equation("eq:dpm-jarzynski", None)
def test_jarzynski_second_law_and_fluctuation_dissipation():
    law = two_modes_1d()
    for steps in (5, 50):
        method = DPM(T=steps, beta_1=0.001, schedule="geometric", alpha_bar_T=0.01)
        torch.manual_seed(0)
        x0 = law.sample(50_000)
        net = method.oracle(law.moments)
        work = law.log_prob(x0) - method.log_weight(net, x0)
        mean_exp = float((-work).exp().mean())
        assert abs(mean_exp - 1) < 0.01
        assert abs(mean_exp - 1) < 4 * float((-work).exp().std()) / len(x0) ** 0.5
        second = work + (-work).exp() - 1
        error = float(work.std()) / len(x0) ** 0.5
        assert abs(float(second.mean() - work.mean())) < 4 * error
        gap = law.log_prob(x0) - method.elbo(net, x0)  # the second law: what the bound loses
        spread = math.hypot(float(gap.std()) / len(x0) ** 0.5, error)
        assert abs(float(gap.mean() - work.mean())) < 4 * spread
    assert abs(float(work.var() / 2 / second.mean()) - 1) < 0.05  # 50 steps: near the quasi-static limit


@pytest.mark.equation("eq:dpm-geometric", "minigen.chain.geometric")
def test_schedules():
    f, g = Chain(fraction(40, 0.01)), Chain(geometric(40, 0.01, 0.003))
    noise = 1 - g.alpha_bar[1:]
    assert torch.allclose(noise[1:] / noise[:-1], (noise[1] / noise[0]).expand(39))
    assert math.isclose(float(noise[0]), 0.01)
    assert math.isclose(float(noise[-1]), 0.997)
    lost = f.alpha_bar[1:-1] - f.alpha_bar[2:]  # but for the first step, which is set apart
    assert torch.allclose(lost, lost[:1].expand(39))
    own = Chain(fraction(40, 1 / 41))
    assert torch.allclose(own.alpha_bar, 1 - torch.arange(41, dtype=torch.float64) / 41)
    code = (1 - 1 / torch.linspace(1000, 2, 1000, dtype=torch.float64)).cumprod(0)
    assert torch.allclose(Chain(fraction(1000, 1 / 1001)).alpha_bar[1:], code, rtol=2e-2)
    assert math.isclose(float(f.alpha_bar[-1]), 0.99 / 40, rel_tol=1e-12)


@pytest.mark.equation("eq:dpm-product", "minigen.multiply.by_gaussian")
@pytest.mark.equation("eq:dpm-slope", "minigen.multiply.by_slope")
def test_products_of_a_step():
    mean, var = torch.tensor([[[0.3]], [[0.02]]], dtype=torch.float64)
    y = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    log = -((y - 0.3) ** 2) / 0.04 - (1.5 - 0.9 * y) ** 2 / (2 * 0.7)
    p = log.softmax(0)
    m, v = by_gaussian(lambda t: 1.5, lambda t: 0.7, scale=0.9)(mean, var, 3)
    assert math.isclose(float(m), float((p * y).sum()), rel_tol=1e-7)
    assert math.isclose(float(v), float((p * (y - m[0]) ** 2).sum()), rel_tol=1e-7)
    m, v = by_slope(lambda x, t: -((1.5 - 0.9 * x) ** 2).sum(1) / 1.4)(mean, var, 3)
    assert math.isclose(float(m), 0.3 + 0.02 * 0.9 * (1.5 - 0.27) / 0.7, rel_tol=1e-7)
    assert float(v) == 0.02
    known = torch.tensor([True, False])
    m, v = by_clamp(known, lambda t: torch.full((1, 2), 9.0))(torch.ones(1, 2), torch.ones(1, 2), 3)
    assert m.tolist() == [[9.0, 1.0]]
    assert v.tolist() == [[0.0, 1.0]]


@pytest.mark.equation("eq:dpm-htransform", None)
def test_a_constant_r_counts_the_observation_twice_and_the_h_transform_repairs_it():
    method, n, y = DPM(T=400), 40_000, 1.5
    bar = method.chain.alpha_bar

    def exactly(mean, var, t):
        a = float(bar[t - 1])
        return by_gaussian(lambda s: y, lambda s: 2 - a, scale=a**0.5)(mean, var, t)

    def tempered(s):
        return 400 / (400 - s) if s < 400 else math.inf

    rules = {
        "constant": (by_gaussian(lambda s: y, lambda s: 1.0), 1.0, 1 / 3),
        "tempered": (by_gaussian(lambda s: y, tempered), 0.69, 0.433),
        "exact": (exactly, 0.75, 0.5),
    }
    for name, (rule, mean, var) in rules.items():
        torch.manual_seed(0)
        x = method.prior((n, 1))
        if name == "exact":
            gain = float(bar[-1]) ** 0.5 / 2
            x = gain * y + math.sqrt(1 - 2 * gain**2) * x
        *_, x = method.reverse(silent, x, rule)
        allowed = 0.01 if name != "exact" else 0.0  # steps of finite size; the exact one has no such error
        assert abs(float(x.mean()) - mean) < allowed + 4 * math.sqrt(var / n)
        assert abs(float(x.var()) - var) < allowed + 4 * var * math.sqrt(2 / n)


@pytest.mark.equation("eq:dpm-bumps", "minigen.readout.Bumps")
def test_networks_of_2015():
    bumps = Bumps(64, 128)
    u = torch.linspace(0, 1, 11)
    g = bumps.bumps(u)
    assert torch.allclose(g.sum(1), torch.ones(11))
    tau = (torch.arange(10) + 0.5) / 10
    by_hand = torch.exp(-((u[:, None] - tau) ** 2) / (2 * 0.1**2))
    assert torch.allclose(g, by_hand / by_hand.sum(1, keepdim=True), atol=1e-6)
    x = torch.randn(3, 1, 8, 8)
    assert bumps(x, torch.tensor([0.1, 0.5, 1.0])).shape == (3, 2, 8, 8)
    assert float(bumps(x, torch.ones(3)).detach().abs().max()) == 0
    rbf = RBF(torch.randn(7, 2), 4, 40)
    torch.nn.init.normal_(rbf.readout.weight)
    x, u = torch.randn(5, 2), torch.tensor([1, 2, 3, 20, 40]) / 40
    phi = torch.softmax(-(torch.cdist(x, rbf.centers) ** 2) / (2 * math.exp(-1) ** 2), 1)
    slow = torch.stack([rbf.readout.weight[round(float(v) * 40)] @ f for v, f in zip(u, phi, strict=True)])
    assert torch.allclose(rbf(x, u), slow, atol=1e-5)
    assert Dense(20, 20, 200)(torch.zeros(2, 20), torch.ones(2)).shape == (2, 20)


@pytest.mark.equation("eq:dpm-model", "minigen.dpm.DPM.reverse")
def test_exact_steps_bring_back_the_law():
    law = laws.two_modes()
    method = DPM(T=300)
    torch.manual_seed(0)
    x = sample(method, method.oracle(law.moments), (6000, 2))
    share = float(law.responsibilities(x)[:, 0].mean())
    assert abs(share - 0.2) < 0.02 + 4 * math.sqrt(0.16 / 6000)  # x_T forgets the mean of the data up to alpha_bar_T
    law = laws.swiss_roll()
    x = sample(FORTY, FORTY.oracle(law.moments), (4000, 2))
    grain = math.sqrt(2 * 0.01)  # of the first step, and of the fixed last one
    noisy = law.sample(4000) + grain * torch.randn(4000, 2)
    assert sliced_wasserstein(x, noisy) < 0.05


def test_the_step_back_read_as_a_denoiser():
    law, method = laws.heart(), DPM(T=100)
    denoise = method.denoiser(method.oracle(law.moments))
    torch.manual_seed(0)
    for t in (2, 10, 50, 100):
        sigma = method.sigma[t].float().expand(50)
        x = law.sample(50) + sigma[:, None] * torch.randn(50, 2)
        assert torch.allclose(denoise(x, sigma), law.denoiser(x, sigma), atol=2e-3)
    sigmas = method.sigmas(40)
    assert float(sigmas[0]) == float(method.sigma[-1])
    assert float(sigmas[-1]) == 0
    assert len(method.sigmas(100)) == 100  # t = 100 .. 2, and 0
    *_, x = samplers.ddim(denoise, method.start((3000, 2), sigmas[0]), sigmas)
    assert sliced_wasserstein(x, law.sample(3000)) < 0.1
    with pytest.raises(ValueError, match="between 1 and T = 100"):
        method.sigmas(101)


def test_code_length_of_pixels():
    method = DPM(T=30, beta_1=0.003, schedule="geometric", alpha_bar_T=1e-3)
    levels = torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None]
    gray = laws.Mixture.of(levels, weights=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    torch.manual_seed(0)
    bound = method.bound(method.oracle(gray.moments), gray.sample(2000), bins=4)
    entropy = -float((gray.weights * gray.weights.log2()).sum())
    error = float(bound.bits.std()) / 2000**0.5
    assert entropy - 4 * error < float(bound.bits.mean()) < 1.92  # never below the entropy
    assert bound.terms.shape == (30, 2000)


def test_bad_input_is_refused():
    for wrong in ({"T": 1}, {"beta_1": 0.0}, {"beta_1": 1.0}, {"alpha_bar_T": 0.0}):
        with pytest.raises(ValueError, match="DPM needs"):
            DPM(**wrong)
    with pytest.raises(ValueError, match="betas must be T = 3"):
        DPM(T=3, betas=(0.1, 0.2))


@pytest.mark.equation("eq:dpm-units", None)
def test_the_units_of_table_1():
    gauss = -0.5 * math.log2(2 * math.pi * math.e)
    assert math.isclose(2.35 - 6.45, 2 * gauss, abs_tol=0.01)
    assert math.isclose(1.489 - 3.536, gauss, abs_tol=0.001)
    assert math.isclose(5.4 - 11.5, 3 * gauss, abs_tol=0.05)
    assert round(math.log2(255 * 0.25) - 5.4 / 3, 1) == 4.2


@pytest.mark.equation("eq:dpm-answer", None)
def test_the_best_answer_is_the_slope_of_q_over_pi():
    law, method = laws.heart(), DPM(T=30)
    torch.manual_seed(0)
    for t in (2, 15, 30):
        n = torch.full((100,), t)
        x_t = method.chain.perturb(law.sample(100), n, torch.randn(100, 2))
        z_mu, _ = method.oracle(law.moments)(x_t, n / method.T).chunk(2, dim=1)
        a, beta = float(method.chain.alpha_bar[t]), float(method.chain.beta[t])
        sigma = torch.full((100,), float(method.sigma[t]))
        score = law.score(x_t / a**0.5, sigma) / a**0.5
        assert torch.allclose(z_mu, (beta / (1 - beta)) ** 0.5 * (x_t + score), rtol=1e-3, atol=1e-4)
