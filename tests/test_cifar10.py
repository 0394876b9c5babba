"""The chapter at full scale: what a network costs, what a recipe does, what a distance and a likelihood measure."""

from __future__ import annotations

from math import exp, log, log2, pi, sqrt

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minigen import DDPM, NCSN, PFGMPP, features, nets, samplers, seeded
from minigen.evaluate import frechet_distance
from minigen.layers import conv_of_doubled, norm
from minigen.likelihood import dequantize
from minigen.train import Ema

F64 = torch.float64


def ramp(n, c=10.0):
    return (1 + n) / (c + n)


# The cost


@pytest.mark.equation("eq:cifar-conv", "minigen.nets.UNet")
def test_multiply_adds_of_convolutions_and_attention():
    with torch.device("meta"):
        conv, x = nn.Conv2d(5, 7, 3, padding=1, bias=False), torch.zeros(1, 5, 6, 4)
        with FlopCounterMode(display=False) as count:
            conv(x)
        weights = conv.weight.numel()
        assert weights == 9 * 5 * 7 and count.get_total_flops() == 2 * 6 * 4 * weights
        attention, y = nets.Attention(32), torch.zeros(1, 32, 8, 8)
        with FlopCounterMode(display=False) as count:
            attention(y)
    assert count.get_total_flops() == 2 * (4 * 64 * 32**2 + 2 * 64**2 * 32)


@pytest.mark.equation("eq:cifar-rate", "minigen.nets.UNet")
def test_training_costs_three_times_a_look():
    with torch.device("meta"):
        net = nets.build(nets.preset((3, 32, 32), 3))
        assert sum(p.numel() for p in net.parameters()) == 35_746_307
        with FlopCounterMode(display=False) as look:
            out = net.eval()(torch.zeros(1, 3, 32, 32), torch.zeros(1))
        with FlopCounterMode(display=False) as back:
            out.sum().backward()
    assert back.get_total_flops() / look.get_total_flops() == pytest.approx(2, abs=0.02)
    assert 3 * look.get_total_flops() == pytest.approx(37.3e9, rel=0.005)


@pytest.mark.equation("eq:cifar-doubled", "minigen.layers.conv_of_doubled")
def test_a_window_of_a_doubled_picture_sees_two_pixels():
    """Along one axis by the formula; in the plane by a kernel that is a product of two."""
    with seeded(0):
        x, w, v = torch.randn(7, dtype=F64), torch.randn(3, dtype=F64), torch.randn(3, dtype=F64)
    known = torch.cat([x.new_zeros(1), x, x.new_zeros(1)])  # x_{-1} and x_7 are the border
    even = w[0] * known[:-2] + (w[1] + w[2]) * known[1:-1]
    odd = (w[0] + w[1]) * known[1:-1] + w[2] * known[2:]
    y = torch.stack([even, odd], 1).flatten()
    doubled = torch.nn.functional.pad(x.repeat_interleave(2), (1, 1))
    assert torch.allclose(y, sum(w[k] * doubled[k : k + 14] for k in range(3)), atol=1e-14)
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    conv.weight.data[0, 0] = w[:, None] * v
    column = conv_of_doubled(x[None, None, :, None].expand(1, 1, 7, 7), conv)[0, 0]  # the same along the other axis
    assert torch.allclose(column[:, 5], y * v.sum(), atol=1e-14)


# Adam


def adam(gradients):
    """The steps that PyTorch's Adam takes, in units of the learning rate."""
    w, out = torch.zeros(gradients.shape[1:], dtype=F64, requires_grad=True), []
    optimizer = torch.optim.Adam([w], lr=1.0)
    for g in gradients:
        before, w.grad = w.detach().clone(), g.clone()
        optimizer.step()
        out.append(w.detach() - before)
    return torch.stack(out)


@pytest.mark.equation("eq:cifar-adam")
def test_adam_is_the_formula():
    with seeded(0):
        g = torch.randn(6, 4, dtype=F64)
    m = v = torch.zeros(4, dtype=F64)
    for n, step in enumerate(adam(g), 1):
        m, v = 0.9 * m + 0.1 * g[n - 1], 0.999 * v + 0.001 * g[n - 1] ** 2
        expected = -(m / (1 - 0.9**n)) / ((v / (1 - 0.999**n)).sqrt() + 1e-8)
        assert torch.allclose(step, expected, atol=1e-10)


@pytest.mark.equation("eq:cifar-first")
def test_first_steps_are_long():
    with seeded(0):
        steps = adam(1e-2 * torch.randn(3000, 300, dtype=F64))
    assert torch.allclose(steps[0].abs(), torch.ones(300, dtype=F64), atol=0.01)
    assert float(steps[1500:].square().mean().sqrt()) == pytest.approx(sqrt(0.1 / 1.9), rel=0.02)


@pytest.mark.equation("eq:cifar-outlier")
@pytest.mark.parametrize("K", [10.0, 100.0, 1e4])
def test_an_outlier_is_remembered(K):
    with seeded(0):
        g = torch.randn(3000, 200, dtype=F64)
    usual = adam(g).square().mean(1).sqrt()
    g[2700] = K  # one odd batch, late enough for v to be near 1
    hurt = adam(g)
    assert float(hurt[2700].abs().mean()) == pytest.approx(0.1 * K / sqrt(1 + 0.001 * K**2), rel=0.1)
    slower = float(hurt[2850:2900].square().mean().sqrt() / usual[2850:2900].mean())
    assert slower == pytest.approx(1 / sqrt(1 + 0.001 * K**2), rel=0.15)


# What an error of the network costs


@pytest.mark.equation("eq:cifar-precondition", "minigen.pfgmpp.PFGMPP.denoiser")
@pytest.mark.parametrize("sigma", [0.1, 1.0, 50.0, 150.0])
def test_an_error_of_the_network_in_the_picture(sigma):
    x, level, e = torch.randn(1, 3, 4, 4), torch.full((1,), sigma), 0.01
    ddpm, edm = DDPM(clip=False), PFGMPP()
    for method, factor in ((ddpm, -sigma), (edm, sigma * 0.5 / sqrt(sigma**2 + 0.5**2))):
        right, wrong = (method.denoiser(lambda y, u, a=a: torch.full_like(y, a))(x, level) for a in (0.3, 0.3 + e))
        assert torch.allclose(wrong - right, torch.full_like(x, factor * e), rtol=2e-3, atol=1e-5)
    assert 156 < float(ddpm.sigmas(10)[0]) < 158


# Averages


def jitter(eta, h=1.0, s=0.7, n=4000, size=4000):
    theta = torch.zeros(size, dtype=F64)
    for _ in range(n):
        theta = (1 - eta * h) * theta - eta * s * torch.randn(size, dtype=F64)
        yield theta


@pytest.mark.equation("eq:cifar-jitter")
@pytest.mark.parametrize("eta", [0.05, 0.5, 1.5])
def test_weights_jitter(eta):
    with seeded(0):
        *_, theta = jitter(eta, n=300)
    assert float(theta.var()) == pytest.approx(eta * 0.7**2 / (2 - eta), rel=0.08)


@pytest.mark.equation("eq:cifar-average")
@pytest.mark.parametrize(("eta", "d"), [(0.1, 0.9), (0.1, 0.99), (0.4, 0.8)])
def test_an_average_is_quieter(eta, d):
    mean = torch.zeros(4000, dtype=F64)
    with seeded(0):
        for theta in jitter(eta, n=900):
            mean = d * mean + (1 - d) * theta
    rho, raw = 1 - eta, eta * 0.7**2 / (2 - eta)
    expected = raw * (1 - d) * (1 + rho * d) / ((1 + d) * (1 - rho * d))
    assert float(mean.var()) == pytest.approx(expected, rel=0.08)
    assert expected < raw


def test_a_long_average_does_not_know_the_rate():
    d, h, s = 0.99999, 1.3, 0.7
    for eta in (0.02, 0.1):
        rho, raw = 1 - eta * h, eta * s**2 / (h * (2 - eta * h))
        mean = raw * (1 - d) * (1 + rho * d) / ((1 + d) * (1 - rho * d))
        assert mean == pytest.approx(s**2 * (1 - d) / (2 * h**2), rel=0.01)


def spent(pictures, batch, step, size=4000, start=40.0, h=1.3, s1=4.0):
    """Weights on the way, one row per step: each gradient is that of the bowl and the mean noise of a batch."""
    theta, out = torch.full((size,), start, dtype=F64), []
    for _ in range(pictures // batch):
        noise = s1 * torch.randn(batch, size, dtype=F64).mean(0)
        theta = theta + step(h * theta + noise)
        out.append(theta)
    return torch.stack(out)


@pytest.mark.equation("eq:cifar-batch")
@pytest.mark.parametrize(("batch", "eta"), [(2, 0.01), (4, 0.02), (4, 0.05)])
def test_way_jitter_and_average_of_a_batch(batch, eta, h=1.3, s1=4.0, reach=2500):
    with seeded(0):
        *way, end = spent(300, batch, lambda g: -eta * g).mean(1)
        low = spent(3 * reach, batch, lambda g: -eta * g, start=0.0)
    jitter = eta / batch * s1**2 / (2 * h)
    error = 4 * sqrt(jitter / 4000)  # of the mean of 4,000 jitters
    assert float(end) == pytest.approx(40 * (1 - eta * h) ** (300 / batch), abs=error) and float(end) > 4 * error
    assert (1 - eta * h) ** (300 / batch) == pytest.approx(exp(-eta / batch * h * 300), rel=0.25)
    assert float(low[-100:].var()) == pytest.approx(jitter, rel=0.08)
    mean, d = torch.zeros(4000, dtype=F64), 1 - batch / reach
    for theta in low:
        mean = d * mean + (1 - d) * theta
    assert float(mean.var()) == pytest.approx(s1**2 / (2 * h**2 * reach), rel=0.15)


@pytest.mark.equation("eq:cifar-strata")
@pytest.mark.parametrize("B", [16, 64])
def test_variance_of_a_batch_with_times_apart_and_evenly_spread(B, n=20_000):
    """g = m(t) + a(t) * chance, with the moments of the formula by fine quadrature."""
    a, m = lambda t: 0.1 + 0.2 * t, lambda t: torch.exp(-3 * t)
    t = (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
    within, between = float(a(t).square().mean()), float(m(t).var())
    slope = float(m(t[-1]) - m(t[0]))
    apart, evenly = (within + between) / B, within / B + slope**2 / (12 * B**2)
    with seeded(0):
        u = torch.rand(n, B, dtype=F64), (torch.rand(n, 1, dtype=F64) + torch.arange(B) / B) % 1
        means = [(m(x) + a(x) * torch.randn(n, B, dtype=F64)).mean(1) for x in u]
    error = 4 * sqrt(2 / n)  # of a variance, relative
    assert float(means[0].var()) == pytest.approx(apart, rel=error)
    assert float(means[1].var()) == pytest.approx(evenly, rel=error)
    assert apart > 2 * evenly
    grid = m((torch.arange(B, dtype=F64) + torch.rand(n, 1, dtype=F64, generator=torch.manual_seed(1))) / B).mean(1)
    assert float(grid.var()) == pytest.approx(slope**2 / (12 * B**2), rel=0.05)


@pytest.mark.equation("eq:cifar-strata", "minigen.ddpm.DDPM.times")
def test_even_times_calm_the_loss_of_ddpm(B=64, batches=2000):
    """A network that is wrong by u has the loss u**2, whatever the noise: only the times make the batches differ."""
    zero, noise = torch.zeros(B, 2), DDPM().chain.noise.float()

    def net(x, u):
        return x / noise[(1000 * u).round().long()][:, None] + u[:, None]

    def variance(method, parts):
        """Of the mean loss of a batch that is cut into parts, each with times of its own."""
        with seeded(0):
            losses = [torch.cat([method.loss(net, x) for x in zero.chunk(parts)]).mean() for _ in range(batches)]
        return float(torch.stack(losses).double().var())

    error = 4 * sqrt(2 / batches)
    assert variance(DDPM(), 1) == pytest.approx(4 / 45 / B, rel=error)  # of u**2
    for parts in (1, 4):
        assert variance(DDPM(stratified=True), parts) == pytest.approx(parts / (12 * B**2), rel=error + 0.05)


@pytest.mark.parametrize("batch", [4, 16])
def test_adam_in_noise_goes_by_the_root_of_the_batch(batch, eta=1e-3, h=1.3, s1=200.0, pictures=24_000):
    with seeded(0):
        noise = s1 / sqrt(batch) * torch.randn(pictures // batch, 1000, dtype=F64)
    w = torch.full((1000,), 10.0, dtype=F64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=eta)
    for xi in noise:
        w.grad = h * w.detach() + xi
        adam.step()
    went = 1 - float(w.detach().mean()) / 10
    assert went == pytest.approx(1 - exp(-eta * h * pictures / (s1 * sqrt(batch))), rel=0.25)


@pytest.mark.equation("eq:cifar-ramp", "minigen.train.Ema")
def test_the_average_of_the_trainer_has_the_ramp():
    net = nn.Linear(1, 1, bias=False)
    ema, mean = Ema(net, 0.8), net.weight.detach().clone()
    for n in range(1, 60):
        with torch.no_grad():
            net.weight.fill_(float(n**2 % 7))
        ema.update()
        d = min(0.8, (1 + n) / (10 + n))
        mean = d * mean + (1 - d) * net.weight.detach()
        assert torch.allclose(ema.net.weight, mean, atol=1e-5)
    assert ramp(35) == pytest.approx(0.8)  # the cap takes over at (10 d - 1) / (1 - d)


@pytest.mark.equation("eq:cifar-weights")
def test_the_ramp_is_a_power_law():
    n = 400
    for k in (1, 5, 100, 399, 400):
        direct = 1 - ramp(k)
        for j in range(k + 1, n + 1):
            direct *= ramp(j)
        product = 9.0
        for i in range(2, 10):
            product *= (k + i) / (n + i)
        assert direct == pytest.approx(product / (n + 10), rel=1e-9)
    product = 9 / 20_010
    for i in range(2, 10):
        product *= (14_000 + i) / (20_000 + i)
    assert product == pytest.approx(9 / 20_000 * 0.7**8, rel=2e-3)


@pytest.mark.equation("eq:cifar-age")
def test_the_mean_age_is_a_tenth():
    age, product = 0.0, 1.0
    for n in range(1, 2001):
        age, product = ramp(n) * (age + 1), product * ramp(n)
        assert age == pytest.approx((n + 1) / 10 - product / 10, rel=1e-9)
    for _ in range(20_000):
        age = 0.99 * (age + 1)
    assert age == pytest.approx(0.99 / 0.01)


# The mean color


@pytest.mark.equation("eq:cifar-group", "minigen.layers.norm")
@pytest.mark.parametrize("in_group", [1, 4])
def test_what_group_normalization_does_to_the_means(in_group):
    layer = norm(16, 16 // in_group).double()
    layer.weight.data.uniform_(0.5, 2)
    layer.bias.data.normal_()
    a = torch.randn(3, 16, 8, 8, dtype=F64) + torch.randn(3, 16, 1, 1, dtype=F64)
    g = a.reshape(3, -1, in_group * 64)
    mu, s2 = (v.repeat_interleave(in_group, 1) for v in (g.mean(2), g.var(2, unbiased=False)))
    gamma, b = layer.weight, layer.bias
    means = layer(a).mean((2, 3))
    torch.testing.assert_close(means, gamma * (a.mean((2, 3)) - mu) / (s2 + 1e-6).sqrt() + b)
    assert torch.allclose(means, b.expand(3, -1)) == (in_group == 1)


@pytest.mark.equation("eq:cifar-blind", "minigen.ncsn.NCSN")
def test_a_network_that_is_blind_to_the_color_keeps_that_of_the_noise():
    """The exact denoiser of white pictures of standard deviation s, but for the mean, of which it believes x."""
    method, s, n = NCSN(), 0.5, 1000
    sigmas = method.sigmas(200)

    def blind(x, sigma):
        color = x.mean((2, 3), keepdim=True)
        return color + s**2 / (s**2 + sigma[:, None, None, None] ** 2) * (x - color)

    with seeded(0):
        start = method.start((n, 1, 8, 8), sigmas[0])
        *_, x = samplers.ddim(blind, start, sigmas)
    torch.testing.assert_close(x.mean((2, 3)), start.mean((2, 3)), atol=1e-5, rtol=0)
    assert float(x.mean((2, 3)).std()) == pytest.approx(method.sigma_1 / 8, abs=4 * method.sigma_1 / 8 / sqrt(2 * n))
    rest = (x - x.mean((2, 3), keepdim=True)).std()
    expected = s * method.sigma_1 / sqrt(s**2 + method.sigma_1**2) * sqrt(63 / 64)  # the start is noise alone
    assert float(rest) == pytest.approx(expected, rel=0.02)


# Batches


@pytest.mark.equation("eq:cifar-parts")
def test_the_mean_of_means_is_the_mean():
    with seeded(0):
        net, x = nn.Linear(3, 1), torch.randn(12, 3)
    whole = torch.autograd.grad(net(x).square().mean(), net.weight)[0]
    mean = sum(torch.autograd.grad(net(p).square().mean(), net.weight)[0] for p in x.chunk(4)) / 4
    assert torch.allclose(whole, mean, atol=1e-6)
    uneven = sum(torch.autograd.grad(net(p).square().mean(), net.weight)[0] for p in x.split([1, 11])) / 2
    assert not torch.allclose(whole, uneven, atol=1e-3)


# Distances


def gaussian(n, f, seed):
    with seeded(seed):
        return torch.randn(n, f, dtype=F64) @ torch.randn(f, f, dtype=F64)


@pytest.mark.equation("eq:cifar-w2")
@pytest.mark.equation("eq:cifar-frechet", "minigen.evaluate.frechet_distance")
def test_frechet_is_the_cheapest_coupling():
    a, b = gaussian(400, 4, 0), gaussian(300, 4, 1) + 0.5
    value = frechet_distance(a, b)
    assert value == pytest.approx(features.frechet(a, b), rel=1e-6)  # torchmetrics
    c_a, c_b, shift = a.T.cov(), b.T.cov(), (a.mean(0) - b.mean(0)).square().sum()
    root = lambda c: (lambda w, v: v * w.clamp(min=0).sqrt() @ v.T)(*torch.linalg.eigh(c))
    r_a, r_b = root(c_a), root(c_b)

    def price(Q):  # of the coupling with the cross-covariance r_a Q r_b
        return float(shift + c_a.trace() + c_b.trace() - 2 * (r_a @ Q @ r_b).trace())

    u, _, vh = torch.linalg.svd(r_b @ r_a)
    assert price((u @ vh).T) == pytest.approx(value, rel=1e-9)
    with seeded(2):
        for _ in range(200):
            Q = torch.randn(4, 4, dtype=F64)
            assert price(Q / torch.linalg.matrix_norm(Q, 2)) >= value
    x = gaussian(5000, 1, 3)  # one dimension: sorted pairs are the cheapest
    y = 0.4 * gaussian(5000, 1, 4) + 1
    paired = float((x.sort(0).values - y.sort(0).values).square().mean())
    assert frechet_distance(x, y) == pytest.approx(paired, rel=0.05)


@pytest.mark.equation("eq:cifar-floor")
@pytest.mark.parametrize(("f", "n"), [(3, 200), (8, 400)])
def test_the_floor(f, n):
    with seeded(0):
        spread = torch.linspace(0.5, 2, f, dtype=F64)
        draws = [(torch.randn(2, n, f, dtype=F64) * spread).unbind() for _ in range(300)]
    lam = spread**2
    pairs = (lam[:, None] * lam / (lam[:, None] + lam)).sum()
    expected = float(2.5 * lam.sum() + pairs) / n
    found = torch.tensor([frechet_distance(a, b) for a, b in draws])
    assert float(found.mean()) == pytest.approx(expected, rel=0.05)
    means = torch.tensor([float((a.mean(0) - b.mean(0)).square().sum()) for a, b in draws])
    assert float(means.mean()) == pytest.approx(float(2 * lam.sum()) / n, rel=0.1)
    one, half = torch.ones(f, dtype=F64), torch.full((f, f), 0.5, dtype=F64)
    assert float(2.5 * one.sum() + half.sum()) == f * (f + 5) / 2


@pytest.mark.equation("eq:cifar-precision", "minigen.features.precision_recall")
def test_precision_and_recall_by_counting():
    a, b, k = gaussian(60, 3, 5), gaussian(50, 3, 6), 3

    def covered(x, y):
        radius = torch.tensor([sorted(float((p - q).norm()) for q in y)[k] for p in y])
        return sum(any(float((p - q).norm()) <= r for q, r in zip(y, radius, strict=True)) for p in x) / len(x)

    assert features.precision_recall(a, b, k) == pytest.approx((covered(a, b), covered(b, a)))


# Likelihoods


@pytest.mark.equation("eq:cifar-change", "minigen.samplers.log_likelihood")
def test_the_density_along_a_path():
    s = 0.6  # Gaussian data: the density at each level is known
    velocity = samplers.probability_flow(lambda x, sigma: x * s**2 / (s**2 + sigma[:, None] ** 2))
    logp = lambda x, level: float(-(x**2).sum() / (2 * (s**2 + level**2)) - log(2 * pi * (s**2 + level**2)))
    x, level, d = torch.tensor([[0.3, -0.8]], dtype=F64), 0.5, 1e-4
    move = lambda x, t: x + t * velocity(x, torch.full((1,), level, dtype=F64))
    slope = (logp(move(x, d), level + d) - logp(move(x, -d), level - d)) / (2 * d)
    J = torch.autograd.functional.jacobian(lambda y: velocity(y[None], torch.tensor([level]).double())[0], x[0])
    assert slope == pytest.approx(-float(J.trace()), rel=1e-4)


@pytest.mark.equation("eq:cifar-hutchinson", "minigen.samplers.log_likelihood")
def test_signs_see_the_trace():
    with seeded(0):
        J = torch.randn(6, 6, dtype=F64)
        e = torch.randint(2, (200_000, 6)).double() * 2 - 1
        g = torch.randn(200_000, 6, dtype=F64)
    S = (J + J.T) / 2
    off = float(S.square().sum() - S.diagonal().square().sum())
    value = ((e @ J) * e).sum(1)
    assert float(value.mean()) == pytest.approx(float(J.trace()), abs=4 * sqrt(2 * off / 200_000))
    assert float(value.var()) == pytest.approx(2 * off, rel=0.02)
    assert float(((g @ J) * g).sum(1).var()) == pytest.approx(2 * float(S.square().sum()), rel=0.03)


@pytest.mark.equation("eq:cifar-dequantize", "minigen.likelihood.dequantize")
def test_spreading_over_bins_is_an_upper_bound():
    bins = 5
    x = torch.linspace(-1, 1, bins, dtype=F64)
    log_p = lambda y: (
        torch.logsumexp(torch.stack([-((y - c) ** 2) / 0.02 - 0.5 * log(pi * 0.02) for c in (-0.4, 0.5)]), 0) - log(2)
    )
    fine = torch.linspace(-0.5, 0.5, 4001, dtype=F64)[:-1] + 1 / 8000
    width = 2 / (bins - 1)
    for value in x:
        probability = float(log_p(value + fine * width).exp().mean()) * width
        bound = -float(log_p(value + fine * width).mean()) / log(2) + log2((bins - 1) / 2)
        assert -log2(probability) <= bound
    many = dequantize(x.reshape(1, -1).repeat(20_000, 1), bins, seed=1)
    spread = many - x
    assert float(spread.abs().max()) <= width / 2 and float(spread.var()) == pytest.approx(width**2 / 12, rel=0.02)
