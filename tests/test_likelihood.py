"""Bits per dimension by the flow, where the density is known, and the estimated divergence against the exact one."""

import json
from math import inf, log, log2, pi, sqrt

import pytest
import torch

from minigen import DDPM, DPM, NCSN, PFGM, PFGMPP, likelihood, samplers
from minigen.__main__ import main
from minigen.core import expand
from minigen.fields import CAUCHY, GAUSSIAN, CauchyMixture

SHAPE, BINS = (1, 2, 2), 17


def gaussian_denoiser(mean, var):
    """For data N(mean, var) in every coordinate."""
    return lambda x, sigma: (var * x + expand(sigma, x) ** 2 * mean) / (var + expand(sigma, x) ** 2)


def pictures(n, mean, std):
    """Gray values of Gaussian numbers."""
    k = ((mean + std * torch.randn(n, *SHAPE, dtype=torch.float64) + 1) * (BINS - 1) / 2).round().clamp(0, BINS - 1)
    return k * 2 / (BINS - 1) - 1


def mixing_denoiser(x, sigma):
    """Coordinates that act on each other: no divergence is a sum over the diagonal alone."""
    a = torch.tensor([[0.5, 0.3, -0.2, 0.1], [0.0, 0.4, 0.3, 0.2], [0.6, -0.1, 0.2, 0.0], [0.2, 0.2, 0.2, 0.3]]).to(x)
    return (x.flatten(1) @ a).tanh().reshape(x.shape) / expand(1 + sigma, x)


def test_bits_of_a_gaussian():
    x, var = pictures(30, 0.1, 0.3), 0.3**2
    high = 200.0
    ends = likelihood.Span(0.01, high, lambda z: GAUSSIAN.log_prob(z - 0.1, sqrt(var + high**2)))
    y = likelihood.dequantize(x, BINS, seed=3)
    at = var + (2 / (BINS - 1)) ** 2 / 12  # the noise of sigma_0 has the variance of the noise in the bins
    expected = -0.5 * ((y - 0.1).square() / at + log(2 * pi * at)).flatten(1).sum(1)
    found = likelihood.log_density(gaussian_denoiser(0.1, var), y, ends, BINS, tol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    bits = -found / (4 * log(2)) + log2((BINS - 1) / 2)
    entropy = 0.5 * log2(2 * pi * 2.718281828 * var) + log2((BINS - 1) / 2)  # of a continuous pixel, in bins
    assert float(bits.mean()) == pytest.approx(entropy, abs=0.15)


def test_bits_are_those_of_a_probability_over_gray_values():
    """E_U[p (2 / (bins - 1))] summed over the values of one pixel is 1: the change of variables is the right one."""
    k = torch.arange(-40, BINS + 40, dtype=torch.float64)  # beyond the gray values, too, to the end of the tails
    x = (k * 2 / (BINS - 1) - 1).reshape(-1, 1, 1, 1).repeat(200, 1, 1, 1)
    ends = likelihood.Span(0.01, 100.0, lambda z: GAUSSIAN.log_prob(z, 100.0))
    y = likelihood.dequantize(x, BINS)
    assert float((y - x).abs().max()) <= 1 / (BINS - 1) and float((y - x).mean().abs()) < 1e-3
    log_p = likelihood.log_density(gaussian_denoiser(0.0, 0.2), y, ends, BINS, tol=1e-4)
    bits = -log_p / log(2) + log2((BINS - 1) / 2)
    assert float((-bits * log(2)).exp().reshape(200, -1).mean(0).sum()) == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("D", [8.0, inf])
def test_pfgmpp_and_its_prior(D):
    """D = inf with the exact network; finite D against the exact divergence with the prior written out."""
    method, var = PFGMPP(D=D, sigma_max=60.0), 0.2
    x = pictures(4, 0.0, var**0.5)
    net = method.oracle(gaussian_denoiser(0.0, var))
    found = likelihood.flow_bits(method, net, x, BINS, probes=0, tol=1e-5)
    y = likelihood.dequantize(x, BINS)
    low = 2 / (BINS - 1) / sqrt(12)
    prior = lambda z: method.kernel.log_prob(z, 60.0)
    log_p = samplers.log_likelihood(method.denoiser(net), y, low, 60.0, 1e-5, prior).extra
    torch.testing.assert_close(found.bits, -log_p / (4 * log(2)) + log2((BINS - 1) / 2))
    if inf == D:
        exact = -0.5 * (y.square() / (var + low**2) + log(2 * pi * (var + low**2))).flatten(1).sum(1)
        # the prior lacks the data's variance: var / (2 sigma_max**2) nats for each coordinate
        torch.testing.assert_close(log_p, exact, atol=4 * var / 60**2 + 1e-3, rtol=0)


def test_pfgm_has_the_density_of_its_charges():
    method = PFGM(target="denoiser", z_max=2000.0)
    law = CauchyMixture.of(torch.tensor([[[[0.2, -0.3], [0.1, 0.4]]]], dtype=torch.float64), 0.3)
    x = pictures(5, 0.0, 0.4)
    found = likelihood.flow_bits(method, method.oracle(law.denoiser), x, BINS, probes=0, tol=1e-5)
    low = 2 / (BINS - 1) / sqrt(12)
    exact = law.log_prob(likelihood.dequantize(x, BINS), low)
    torch.testing.assert_close(found.bits, -exact / (4 * log(2)) + log2((BINS - 1) / 2), atol=2e-3, rtol=0)
    assert likelihood.span(method).log_prior(x) == pytest.approx(CAUCHY.log_prob(x, 2000.0))


@pytest.mark.parametrize("method", [NCSN(sigma_1=30.0, L=400), DDPM(clip=True)], ids=["ncsn", "ddpm"])
def test_score_methods_against_the_exact_gaussian(method):
    """Their oracles know the levels of the ladder only, so the agreement is that of its steps; nothing is clipped."""
    var, x = 0.2, pictures(12, 0.0, sqrt(0.2))
    found = likelihood.flow_bits(method, method.oracle(gaussian_denoiser(0.0, var)), x, BINS, probes=0, tol=1e-4)
    low = max(likelihood.span(method).sigma_min, 2 / (BINS - 1) / sqrt(12))
    y = likelihood.dequantize(x, BINS)
    exact = -0.5 * (y.square() / (var + low**2) + log(2 * pi * (var + low**2))).flatten(1).sum(1)
    torch.testing.assert_close(found.bits, -exact / (4 * log(2)) + log2((BINS - 1) / 2), atol=0.02, rtol=0)


def test_the_estimated_divergence_has_the_exact_mean():
    x = torch.randn(300, 1, 2, 2, dtype=torch.float64) / 2
    x[:] = x[0]  # one point, 300 different probes
    run = lambda probes, seed=0: samplers.log_likelihood(mixing_denoiser, x, 0.05, 20.0, 1e-4, None, probes, seed).extra
    exact, one, four = run(0)[0], run(1), run(4)
    assert torch.equal(one, run(1)) and not torch.equal(one, run(1, seed=1))
    for estimate in (one, four):
        error = float(estimate.std()) / sqrt(len(x))
        assert error > 0 and abs(float(estimate.mean() - exact)) < 4 * error
    assert float(one.std() / four.std()) == pytest.approx(2, rel=0.25)


def test_signs_that_need_no_luck():
    """Where no coordinate acts on another, one vector of signs gives the exact divergence."""
    x, denoiser = torch.randn(5, 1, 2, 2, dtype=torch.float64), gaussian_denoiser(0.2, 0.5)
    one, exact = (samplers.log_likelihood(denoiser, x, 0.1, 10.0, probes=k).extra for k in (1, 0))
    torch.testing.assert_close(one, exact)


def test_one_seed_one_number_and_its_error():
    method, x = PFGMPP(D=inf), pictures(20, 0.0, 0.4).float()
    net = method.oracle(mixing_denoiser)
    a, b, c = (likelihood.flow_bits(method, net, x, BINS, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.bits, b.bits) and not torch.equal(a.bits, c.bits) and a.bits.shape == (20,)
    assert a.error == pytest.approx(float(a.bits.std()) / sqrt(20)) and a.calls == b.calls > 10


def test_what_has_no_flow_says_so():
    with pytest.raises(ValueError, match="DPM has no flow with a known prior: use its bound"):
        likelihood.flow_bits(DPM(), lambda x, u: x, torch.zeros(1, *SHAPE))
    with pytest.raises(ValueError, match="tolerance must be positive"):
        likelihood.flow_bits(PFGM(), lambda x, u: x, torch.zeros(1, *SHAPE), tol=0)


@pytest.mark.parametrize("method", ["ddpm", "ncsn", "pfgm", "pfgmpp", "dpm"])
def test_evaluate_names_the_kind_of_bits(method, tmp_path, capsys):
    run = tmp_path / "run"
    words = ["--width", "8", "--batch", "16", "--device", "cpu", "--steps", "2"]
    words += ["--T", "5"] if method in ("ddpm", "dpm") else []
    assert main(["train", method, "--data", "digits", "--out", str(run), *words]) == 0
    results = []
    for _ in range(2 if method == "ddpm" else 1):
        more = ["--n", "4", "--steps", "2", "--bits", "3", "--tol", "0.05", "--features", "none"]
        assert main(["evaluate", str(run), *more]) == 0
        results.append(json.loads((run / "evaluate.json").read_text()))
        del results[-1]["seconds"]
    found = results[0]
    assert found == results[-1]
    assert ("bits_bound" in found) == (method in ("ddpm", "dpm"))
    assert ("bits_ode" in found) == (method != "dpm")
    assert found["bits_n"] == 3 and "bits_per_dim" not in found
    if "bits_ode" in found:
        assert found["bits_ode_error"] > 0 and found["bits_ode_calls"] > 5 and found["bits_ode_tol"] == 0.05
    assert "bits_" in capsys.readouterr().out
