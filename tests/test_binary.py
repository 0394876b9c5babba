"""The model of 2015 for bits, and the heartbeat."""

from __future__ import annotations

import math

import pytest
import torch

from minigen import sample
from minigen.binary import BinaryDPM, bernoulli_kl, heartbeat

LN2 = math.log(2)


def silent(x, u):
    return torch.zeros_like(x)


@pytest.mark.equation("eq:dpm-binomial", "minigen.binary.BinaryDPM.step_rate")
@pytest.mark.equation("eq:dpm-fraction", "minigen.binary.BinaryDPM.beta")
def test_steps_and_leaps_agree():
    method = BinaryDPM(T=12)
    assert torch.allclose(method.alpha_bar, 1 - torch.arange(13, dtype=torch.float64) / 12)
    rate = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    start = rate.clone()
    for t in range(1, 13):
        rate = method.step_rate(rate, torch.tensor([t]))  # linear in x: the rate after one more step
        assert torch.allclose(rate, method.rate(start, torch.tensor([t])))
    assert torch.allclose(rate, torch.full((1, 2), 0.2, dtype=torch.float64))


@pytest.mark.equation("eq:dpm-posterior-bits", "minigen.binary.BinaryDPM.posterior")
def test_the_posterior_by_counting_paths():
    method, t = BinaryDPM(T=9), 5
    n = torch.full((1_000_000, 1), t)[:, 0]
    torch.manual_seed(0)
    x0 = torch.ones(1_000_000, 1)
    before = method.perturb(x0, n - 1)
    after = torch.bernoulli(method.step_rate(before, n))
    for bit in (0.0, 1.0):
        seen = after[:, 0] == bit
        measured = float(before[seen].mean())
        exact = float(method.posterior(torch.tensor([[bit]]), torch.ones(1, 1), torch.tensor([t])))
        assert abs(measured - exact) < 4 * math.sqrt(exact * (1 - exact) / int(seen.sum()))


def test_a_silent_network_gives_l_null():
    torch.manual_seed(0)
    for states in (heartbeat(), torch.eye(6), torch.bernoulli(torch.full((8, 10), 0.7))):
        for steps, base in ((5, 0.2), (30, 0.5), (60, 0.3)):
            method = BinaryDPM(T=steps, base_rate=base)
            x0 = states.repeat(8000 // len(states), 1)
            gap = (method.elbo(silent, x0) - method.null(x0)) / LN2
            assert abs(float(gap.mean())) < 4 * float(gap.std()) / len(x0) ** 0.5
            assert float(gap.std()) / len(x0) ** 0.5 < 0.08


@pytest.mark.equation("eq:dpm-best-bits", "minigen.binary.BinaryDPM.oracle")
@pytest.mark.parametrize(
    ("steps", "expected"), [(5, -9.87), (10, -6.76), (20, -4.82), (50, -3.49), (200, -2.69), (2000, -2.373)]
)
def test_the_best_factorized_bound_of_the_heartbeat(steps, expected):
    method = BinaryDPM(T=steps)
    torch.manual_seed(0)
    x0 = heartbeat(max(500, 60_000 // steps) if steps < 2000 else 250)
    k = method.elbo(method.oracle(heartbeat()), x0) / LN2
    error = float(k.std()) / len(x0) ** 0.5
    assert abs(float(k.mean()) - expected) < 0.03 + 4 * error
    assert float(k.mean()) - 4 * error < math.log2(1 / 5)  # a bound on the truth
    assert math.isclose(-20 * (0.2 * math.log2(0.2) + 0.8 * math.log2(0.8)), 14.439, abs_tol=1e-3)  # L_null, base 0.2


def test_the_best_step_beats_its_neighbors():
    method, t = BinaryDPM(T=20), torch.full((4000,), 7)
    best = method.oracle(heartbeat())
    torch.manual_seed(0)
    x0 = heartbeat(4000)

    def cost(net):
        torch.manual_seed(1)
        return method.kl(net, x0, t).mean()

    for shift in (-0.5, 0.5):
        for i in (0, 7, 19):
            one = shift * torch.eye(20)[i]
            assert cost(lambda x, u, s=one: best(x, u) + s) > cost(best)


def test_jarzynski_measures_the_share_of_valid_sequences():
    method, n = BinaryDPM(T=20), 20_000
    best, phases = method.oracle(heartbeat()), heartbeat()
    torch.manual_seed(0)
    x, log_w = heartbeat(n), torch.zeros(n)
    for t in range(1, 21):
        at = torch.full((n,), t)
        ahead = torch.bernoulli(method.step_rate(x, at))
        forward, back = method.step_rate(x, at), method.rate_back(best, ahead, at)
        log_w += torch.where(x > 0.5, back, 1 - back).log().sum(1)
        log_w -= torch.where(ahead > 0.5, forward, 1 - forward).log().sum(1)
        x = ahead
    log_w += method.null(x)
    weight = (log_w + torch.log(torch.tensor(5.0))).exp()  # exp(-W); every phase has probability 1/5
    drawn = sample(method, best, (n, 20))
    valid = float((drawn[:, None] == phases).all(2).any(1).float().mean())
    error = math.hypot(float(weight.std()), math.sqrt(valid * (1 - valid))) / n**0.5
    assert 0.4 < valid < 0.6
    assert abs(float(weight.mean()) - valid) < 4 * error


def test_the_heartbeat_is_drawn_with_many_steps():
    method = BinaryDPM(T=300)
    torch.manual_seed(0)
    x = sample(method, method.oracle(heartbeat()), (2000, 20))
    shares = (x[:, None] == heartbeat()).all(2).float().mean(0)
    assert float(shares.sum()) > 0.92
    assert float((shares / shares.sum() - 0.2).abs().max()) < 4 * math.sqrt(0.16 / 2000)


def test_divergence_of_bits_and_bad_input():
    q, p = torch.tensor([0.0, 0.3, 1.0]), torch.tensor([0.1, 0.3, 0.5])
    assert torch.allclose(bernoulli_kl(q, p), torch.tensor([-math.log(0.9), 0.0, math.log(2)]), atol=1e-6)
    assert float(bernoulli_kl(torch.zeros(1), torch.zeros(1))) == 0
    with pytest.raises(ValueError, match="BinaryDPM needs"):
        BinaryDPM(base_rate=0.0)
    with pytest.raises(ValueError, match="BinaryDPM needs"):
        BinaryDPM(T=1)
