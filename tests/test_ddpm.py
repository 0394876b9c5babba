"""DDPM against numerics, against exact answers, and against diffusers."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from minigen import DDPM, sample, seeded
from minigen.bound import decoder_nll, gaussian_kl
from minigen.laws import Mixture, gaussian, two_modes

D = DDPM()
F64 = torch.float64


def times(n: int, t: int) -> torch.Tensor:
    return torch.full((n,), t)


def test_schedule_has_the_papers_constants():
    assert D.beta[0] == 0 and D.alpha_bar[0] == 1 and D.sigma[0] == 0
    assert D.beta[1] == pytest.approx(1e-4) and D.beta[-1] == pytest.approx(0.02)
    assert float(D.alpha_bar[-1]) == pytest.approx(4.036e-5, rel=1e-3)
    ratio = (D.beta_tilde / D.beta)[[2, 10, 100, 500]]
    assert ratio.tolist() == pytest.approx([0.455, 0.853, 0.982, 0.999], abs=1e-3)


@pytest.mark.equation("eq:ddpm-step", "minigen.ddpm.DDPM.beta")
@pytest.mark.equation("eq:ddpm-closed", "minigen.ddpm.DDPM.perturb")
def test_closed_form_is_the_composition_of_steps():
    scale, var = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    for t in range(1, 301):  # the mean and the variance of x_t given x_0, one step after the other
        scale, var = scale * (1 - D.beta[t]).sqrt(), var * (1 - D.beta[t]) + D.beta[t]
    x0, eps = torch.tensor([[1.7]], dtype=F64), torch.tensor([[-0.4]], dtype=F64)
    assert torch.allclose(D.perturb(x0, times(1, 300), eps), scale * x0 + var.sqrt() * eps, atol=1e-12)


@pytest.mark.equation("eq:ddpm-thermostat", "minigen.ddpm.DDPM.perturb")
@pytest.mark.parametrize("v0", [0.0, 0.3, 9.0])
def test_every_step_brings_the_variance_closer_to_one(v0):
    """The variance of `perturb` (which knows alpha_bar only) follows the recursion of the steps (beta only)."""
    one, zero = torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)
    before = v0
    for t in range(1, 1001):
        signal, noise = D.perturb(one, times(1, t), zero), D.perturb(zero, times(1, t), one)
        v = float(signal**2 * v0 + noise**2)
        assert v == pytest.approx(float((1 - D.beta[t]) * before + D.beta[t]), abs=1e-9)
        assert abs(v - 1) < abs(before - 1)
        before = v
    assert v == pytest.approx(1.0, abs=1e-3)


@pytest.mark.equation("eq:ddpm-prior", "minigen.ddpm.DDPM.prior_kl")
def test_prior_term_is_the_divergence_of_the_last_marginal():
    x0 = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    q = Normal(D.alpha_bar[-1].sqrt() * x0, (1 - D.alpha_bar[-1]).sqrt())
    assert torch.allclose(D.prior_kl(x0), kl_divergence(q, Normal(0.0, 1.0)).sum(1))
    cifar = D.prior_kl(torch.full((1, 1), 0.26**0.5)) / log(2)  # float32 in, and still exact
    assert float(cifar) == pytest.approx(0.757e-5, rel=0.01)


@pytest.mark.equation("eq:ddpm-posterior", "minigen.ddpm.DDPM.posterior")
@pytest.mark.parametrize("t", [2, 40, 900])
def test_posterior_is_bayes_rule_on_a_grid(t):
    x0, x_t = 0.8, -0.3
    grid = torch.linspace(-12, 12, 400_001, dtype=F64)
    prior = Normal(D.alpha_bar[t - 1].sqrt() * x0, (1 - D.alpha_bar[t - 1]).sqrt())
    step = Normal(D.alpha[t].sqrt() * grid, D.beta[t].sqrt())
    w = (prior.log_prob(grid) + step.log_prob(torch.tensor(x_t, dtype=F64))).softmax(0)
    mean = (w * grid).sum()
    var = (w * (grid - mean) ** 2).sum()
    got_mean, got_var = D.posterior(torch.tensor([[x_t]], dtype=F64), torch.tensor([[x0]], dtype=F64), times(1, t))
    assert float(got_mean) == pytest.approx(float(mean), abs=1e-7)
    assert float(got_var) == pytest.approx(float(var), rel=1e-5)


@pytest.mark.equation("eq:ddpm-x0", "minigen.ddpm.DDPM.predict_x0")
@pytest.mark.equation("eq:ddpm-mean", "minigen.ddpm.DDPM.reverse")
def test_the_two_forms_of_the_reverse_mean_agree():
    x_t, eps = torch.randn(2, 6, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    for t in (1, 2, 500, 1000):
        u = times(6, t)
        x0 = D.predict_x0(x_t, u, eps)
        assert torch.allclose(D.perturb(x0, u, eps), x_t)
        mean, _ = D.posterior(x_t, x0, u)
        direct = (x_t - D.beta[t] / (1 - D.alpha_bar[t]).sqrt() * eps) / D.alpha[t].sqrt()
        assert torch.allclose(mean, direct, rtol=1e-9, atol=1e-9)
    with seeded(0):  # the first step of the sampler: eq. 11 and a kick of variance beta_T
        first = next(D.reverse(lambda x, u: eps, x_t))
    with seeded(0):
        assert torch.allclose(first, direct + D.beta[-1].sqrt() * torch.randn_like(x_t), rtol=1e-9, atol=1e-9)


@pytest.mark.equation("eq:ddpm-kl", "minigen.bound.gaussian_kl")
def test_gaussian_kl_equals_torch_distributions():
    m, s, n, r = torch.randn(4, 7, dtype=F64, generator=torch.Generator().manual_seed(2)).abs() + 0.1
    assert torch.allclose(gaussian_kl(m, s**2, n, r**2), kl_divergence(Normal(m, s), Normal(n, r)))


@pytest.mark.equation("eq:ddpm-weights", "minigen.ddpm.DDPM.term")
def test_each_term_is_a_weighted_error_of_the_noise():
    method = DDPM(variance="beta_tilde")
    x0 = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(3))
    guess = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(4))
    for t, weight in [(2, 0.60), (10, 0.086), (100, 0.010), (500, 0.0055), (1000, 0.0102)]:
        w = method.beta[t] ** 2 / (2 * method.sigma2[t] * method.alpha[t] * (1 - method.alpha_bar[t]))
        assert float(w) == pytest.approx(weight, rel=0.03)
        with seeded(5):
            term, _ = method.term(lambda x, u: guess, x0, times(5, t))
        with seeded(5):
            eps = torch.randn_like(x0)
        assert torch.allclose(term, w * (eps - guess).square().sum(1), rtol=1e-6)


@pytest.mark.equation("eq:ddpm-simple", "minigen.ddpm.DDPM.loss")
def test_loss_is_the_squared_error_of_the_noise_at_uniform_steps():
    """The draws are repeated here: what the network sees, the clock, and the value must all follow from them."""
    n, seen = 20_000, {}
    x0 = torch.randn(n, 2, generator=torch.Generator().manual_seed(6))

    def net(x, u):
        seen.update(x=x, u=u)
        return 0.3 * x

    with seeded(0):
        loss = D.loss(net, x0)
    with seeded(0):
        t, eps = torch.randint(1, D.T + 1, (n,)), torch.randn(n, 2)
    a = D.alpha_bar[t][:, None].float()
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    assert torch.allclose(seen["x"], x_t, atol=1e-6)
    assert torch.allclose(loss, (eps - 0.3 * x_t).square().mean(1), atol=1e-5)
    drawn = (seen["u"] * D.T).round()
    assert float(drawn.min()) == 1 and float(drawn.max()) == 1000  # of 20,000 draws; missed with chance e^-20
    error = (D.T**2 / 12 / n) ** 0.5
    assert float(drawn.mean()) == pytest.approx((D.T + 1) / 2, abs=4 * error)


@pytest.mark.parametrize(("n", "T"), [(64, 1000), (7, 1000), (50, 20)])
def test_stratified_steps_are_spread_evenly_and_each_is_uniform(n, T):
    method, batches = DDPM(T=T, stratified=True), 2000
    with seeded(0):
        t = torch.stack([method.times(n) for _ in range(batches)])
    assert int(t.min()) >= 1 and int(t.max()) <= T
    ordered = torch.sort(t, dim=1).values
    gaps = torch.cat([ordered.diff(dim=1), ordered[:, :1] + T - ordered[:, -1:]], dim=1)  # around the circle
    assert float((gaps - T / n).abs().max()) <= 1
    for i in (0, n // 2, n - 1):  # one member of a batch, over the batches
        member = t[:, i].double()
        assert float(member.mean()) == pytest.approx((T + 1) / 2, abs=4 * (T**2 / 12 / batches) ** 0.5)
        assert float(member.std()) == pytest.approx(T / 12**0.5, rel=0.05)


@pytest.mark.equation("eq:ddpm-score", "minigen.laws.Mixture.score")
def test_best_prediction_of_the_noise_is_the_score():
    law = two_modes()
    law = Mixture(law.means.double(), law.std.double(), law.weights.double())
    net = D.oracle(law.denoiser)
    for t in (1, 10, 300, 1000):
        x_t = torch.randn(20, 2, dtype=F64, generator=torch.Generator().manual_seed(t)).requires_grad_(True)
        a, s = D.alpha_bar[t].sqrt(), (1 - D.alpha_bar[t]).sqrt()
        noisy = Mixture(a * law.means, a * law.std, law.weights)  # the law of sqrt(alpha_bar) x_0
        score = torch.autograd.grad(noisy.log_prob(x_t, s).sum(), x_t)[0]
        eps = net(x_t, D.clock(times(20, t))).detach()
        assert torch.allclose(-eps / s, score, rtol=1e-5, atol=1e-5)


def true_reverse_variance(s2: float, t: int) -> float:
    """Eq. ddpm-variance: of x_{t-1} given x_t, for Gaussian data of variance s2."""
    before = D.alpha_bar[t - 1] * s2 + 1 - D.alpha_bar[t - 1]
    return float(D.beta[t] * before / (D.alpha[t] * before + D.beta[t]))


@pytest.mark.equation("eq:ddpm-variance", "minigen.ddpm.DDPM.sigma2")
@pytest.mark.parametrize("t", [2, 51, 1000])
def test_the_two_variances_are_right_for_one_point_and_for_white_noise(t):
    assert true_reverse_variance(0.0, t) == pytest.approx(float(DDPM(variance="beta_tilde").sigma2[t]), rel=1e-9)
    assert true_reverse_variance(1.0, t) == pytest.approx(float(DDPM(variance="beta").sigma2[t]), rel=1e-9)


@pytest.mark.parametrize(("s2", "value"), [(0.0, 1.0572e-3), (0.25, 1.0928e-3), (1.0, 1.0960e-3), (4.0, 1.0969e-3)])
def test_true_reverse_variance_for_gaussian_data(s2, value):
    t = 51
    assert true_reverse_variance(s2, t) == pytest.approx(value, rel=1e-4)
    grid = torch.linspace(-1, 1, 200_001, dtype=F64)  # Bayes on a grid, at x_t = 0.2
    prior = (D.alpha_bar[t - 1] * s2 + 1 - D.alpha_bar[t - 1]).sqrt()
    w = (
        Normal(0.0, prior).log_prob(grid)
        + Normal(D.alpha[t].sqrt() * grid, D.beta[t].sqrt()).log_prob(torch.tensor(0.2, dtype=F64))
    ).softmax(0)
    mean = (w * grid).sum()
    assert float((w * (grid - mean) ** 2).sum()) == pytest.approx(value, rel=1e-4)


@pytest.mark.equation("eq:ddpm-decoder", "minigen.bound.decoder_nll")
@pytest.mark.parametrize("bins", [4, 17, 256])
def test_decoder_is_a_distribution_over_the_bins(bins):
    values = torch.linspace(-1, 1, bins, dtype=F64)
    for mean, sigma in [(0.2, 0.3), (-1.4, 0.1), (0.999, 0.01)]:
        p = (-decoder_nll(values, torch.full_like(values, mean), torch.tensor(sigma, dtype=F64), bins)).exp()
        assert float(p.sum()) == pytest.approx(1.0, abs=1e-9)
        edges = (values[1:] + values[:-1]) / 2
        cdf = torch.cat([torch.zeros(1), Normal(mean, sigma).cdf(edges), torch.ones(1)])
        assert torch.allclose(p, (cdf[1:] - cdf[:-1]).clamp(min=1e-12), atol=1e-9)


def test_replaced_first_variance_in_bits():
    x = torch.zeros(1, dtype=F64)
    bits = [float(decoder_nll(x, x, v.sqrt())) / log(2) for v in (D.sigma2[1], D.beta[1])]
    assert bits == pytest.approx([1.31, 1.71], abs=0.01)


@pytest.mark.equation("eq:ddpm-bound", "minigen.ddpm.DDPM.bound")
def test_bound_with_the_exact_denoiser_falls_to_the_entropy():
    """Four gray values, entropy 1.846 bits: the posterior variance reaches it, the larger one pays for it."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    law = Mixture.of(torch.linspace(-1, 1, 4, dtype=F64)[:, None], 0.0, p)
    entropy = float(-(p * p.log()).sum()) / log(2)
    runs = {}
    for variance in ("beta", "beta_tilde"):
        method = DDPM(variance=variance, clip=False)
        with seeded(0):
            runs[variance] = method.bound(method.oracle(law.denoiser), law.sample(2000), bins=4).bits
    tight = runs["beta_tilde"]
    error = float(tight.std()) / 2000**0.5
    excess = 0.024  # of 1000 steps with beta_tilde, measured with 40,000 samples (+- 0.004)
    assert entropy - 3 * error < float(tight.mean()) < entropy + excess + 3 * error
    # beta costs the sum of C_t = KL of two Gaussians with one mean, less what it saves by its smaller weights
    ratio = D.beta[2:] / D.beta_tilde[2:]
    most = float(0.5 * (ratio.log() + 1 / ratio - 1).sum()) / log(2)
    assert 0.8 * most < float((runs["beta"] - tight).mean()) < most + 3 * error


def test_bound_of_a_wrong_network_is_above_the_entropy():
    law = Mixture.of(torch.linspace(-1, 1, 4, dtype=F64)[:, None])
    method = DDPM(T=100, beta_1=1e-3, beta_T=0.2, clip=False)
    for wrong in (lambda x, u: 0 * x, lambda x, u: x, lambda x, u: 0.5 * method.oracle(law.denoiser)(x, u)):
        with seeded(0):
            bits = method.bound(wrong, law.sample(500), bins=4).bits
        assert float(bits.mean()) - 3 * float(bits.std()) / 500**0.5 > 2.0  # log2(4)


@pytest.mark.equation("eq:ddpm-rate", "minigen.bound.Bound.rate")
def test_rate_and_distortion_add_up_and_are_monotone():
    law = two_modes()
    method = DDPM(T=200, beta_1=5e-4, beta_T=0.1)
    with seeded(0):
        b = method.bound(method.oracle(law.denoiser), law.sample(2000).clamp(-3, 3))
    assert float(b.rate[0]) + float(b.terms[0].mean()) / (2 * log(2)) == pytest.approx(float(b.bits.mean()), rel=1e-5)
    assert bool((b.rate[1:] <= b.rate[:-1]).all())
    assert float(b.rate[-1]) == pytest.approx(float(b.prior.mean()) / (2 * log(2)), rel=1e-5)
    assert bool((b.distortion[20:] - b.distortion[:-20] > -0.5).all())  # up to Monte Carlo noise of 0.2


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_ancestral_sampling_with_the_exact_noise_recovers_the_mixture(variance):
    law, n = two_modes(), 2000
    method = DDPM(variance=variance)
    with seeded(1):
        x = sample(method, method.oracle(law.denoiser), (n, 2))
    left = (law.responsibilities(x)[:, 0] > 0.5).double()
    assert float(left.mean()) == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / n) ** 0.5)
    for k, chosen in ((0, left > 0), (1, left == 0)):
        inside = x[chosen] - law.means[k]
        m = inside.numel()
        assert float(inside.mean()) == pytest.approx(0.0, abs=4 * 0.35 / m**0.5 + 0.01)
        assert float(inside.std()) == pytest.approx(0.35, rel=4 / (2 * m) ** 0.5 + 0.01)


@pytest.mark.equation("eq:ddpm-sigma", "minigen.ddpm.DDPM.sigma")
def test_scaled_state_is_the_picture_plus_noise_of_level_sigma():
    x0, eps = torch.randn(2, 6, 2, dtype=F64, generator=torch.Generator().manual_seed(8))
    for t in (1, 300, 1000):
        x = D.perturb(x0, times(6, t), eps) / D.alpha_bar[t].sqrt()
        assert torch.allclose(x, x0 + D.sigma[t] * eps, rtol=1e-9)
    assert D.sigma[[1, -1]].tolist() == pytest.approx([0.0100005, 157.4], rel=1e-3)


def test_denoiser_and_oracle_are_inverse():
    law = gaussian(3, 0.7)
    denoise = D.denoiser(D.oracle(law.denoiser))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for t in (1, 17, 1000):
        sigma = D.sigma[t].float().expand(4)
        assert torch.allclose(D.time(sigma), torch.full((4,), float(t)), atol=0.01)
        assert torch.allclose(denoise(x, sigma), law.denoiser(x, sigma), atol=2e-3)


def test_clipping_is_for_images_unless_told():
    big, eps = torch.full((2, 1, 4, 4), 9.0), torch.zeros(2, 1, 4, 4)
    t = times(2, 10)
    assert D.predict_x0(big, t, eps).max() == 1 and DDPM(clip=False).predict_x0(big, t, eps).max() > 8
    assert D.predict_x0(big[:, 0, 0], t, eps[:, 0, 0]).max() > 8
    assert DDPM(clip=True).predict_x0(big[:, 0, 0], t, eps[:, 0, 0]).max() == 1


def test_cosine_schedule_clips_exactly_one_beta():
    cosine = DDPM(schedule="cosine")
    assert int((cosine.beta == 0.999).sum()) == 1
    assert float(cosine.alpha_bar[-1].rsqrt()) == pytest.approx(2.0e4, rel=0.05)


@pytest.mark.parametrize("bad", [{"T": 1}, {"beta_1": 0.0}, {"beta_T": 1.0}, {"beta_1": 0.03}])
def test_impossible_schedules_are_refused(bad):
    with pytest.raises(ValueError, match="DDPM needs"):
        DDPM(**bad)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("clip", [True, False])
def test_reverse_equals_diffusers(variance, clip):
    diffusers = pytest.importorskip("diffusers")
    kind = {"beta": "fixed_large", "beta_tilde": "fixed_small"}[variance]
    scheduler = diffusers.DDPMScheduler(1000, variance_type=kind, clip_sample=clip)
    method = DDPM(variance=variance, clip=clip)

    def net(x, u):
        return torch.tanh(x + u[:, None])

    x = ours = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    chain = method.reverse(net, x)
    for i, t in enumerate(range(1000, 0, -1)):
        eps = net(x, torch.full((8,), t / 1000))
        x = scheduler.step(eps, t - 1, x, generator=torch.Generator().manual_seed(i)).prev_sample
        with seeded(i):
            ours = next(chain)
    assert torch.allclose(ours, x, rtol=1e-3, atol=1e-3)
