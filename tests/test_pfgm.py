"""PFGM and PFGM++: what is learned, how it is read, and how it is sampled; networks replaced by exact answers."""

from __future__ import annotations

from math import inf, pi, prod, sqrt

import pytest
import torch
from scipy import stats

from minigen import PFGM, PFGMPP, nets, sample, samplers, seeded
from minigen.core import Method
from minigen.evaluate import sliced_wasserstein
from minigen.fields import CAUCHY, CauchyMixture, Kernel, empirical_denoiser, squared_distances
from minigen.fit import for_data
from minigen.generate import draw
from minigen.laws import heart, two_modes

F64 = torch.float64
P = PFGM.for_data((2,))
FIELD = PFGM(gamma=0.13, z_exp=0.3, upper_norm=2000.0)


def points(n, d, seed=0):
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(seed))


def law():
    angle = torch.arange(8, dtype=F64) * pi / 4
    return CauchyMixture.of(torch.stack([2 * angle.cos(), 2 * angle.sin()], 1), 0.15)


@pytest.mark.parametrize("method", [PFGM(), P, PFGMPP(), PFGMPP(D=1)])
def test_they_are_methods(method):
    assert isinstance(method, Method)


def test_defaults_are_the_papers_and_scale_with_the_data():
    cifar = PFGM.for_data((3, 32, 32))
    assert cifar == PFGM() and (cifar.gamma, cifar.M, cifar.z_max, cifar.z_exp) == (5.0, 291, 40.0, 5.0)
    longest = float(cifar.prior((500, 3, 32, 32)).flatten(1).norm(dim=1).max())
    assert longest == pytest.approx(3000, rel=0.01)  # the shipped bound, by the rule of the released script
    digits = PFGM.for_data((1, 8, 8))
    assert digits.gamma == pytest.approx(5 / sqrt(48)) and digits.target == "field" and digits.out_channels(1) == 2
    assert P.target == "denoiser" and P.out_channels(2) == 2
    assert for_data(PFGM(gamma=2.0), (2,)).gamma == 2.0  # what was set stays
    assert for_data(PFGMPP(D=7), (2,)) == PFGMPP(D=7, sigma_data=1.0, P_mean=-0.5)


@pytest.mark.equation("eq:pfgm-mean", "minigen.fields.empirical_denoiser")
@pytest.mark.equation("eq:pfgm-empirical", "minigen.pfgm.PFGM.field_target")
@pytest.mark.parametrize("d", [1, 2, 3])
def test_normalized_field_is_a_mean_displacement(d):
    """As the paper writes it: E = c sum (x~ - x~_i) / |x~ - x~_i|^{N+1}, c the inverse sum of the weights."""
    charges, x, z = points(7, d), points(4, d, 1), torch.tensor([0.1, 0.5, 2.0, 9.0], dtype=F64)
    away = torch.cat([x[:, None] - charges, z[:, None, None].expand(-1, 7, 1)], 2)
    w = away.norm(dim=2, keepdim=True) ** -(d + 1)
    E = (w * away).sum(1) / w.sum(1)
    y_bar = empirical_denoiser(charges, CAUCHY)(x, z)
    assert torch.allclose(E, torch.cat([x - y_bar, z[:, None]], 1), rtol=1e-9)
    v_x, v_z = PFGM(gamma=0.3).field_target(x, z, charges)
    v = -sqrt(d) * E / (E.norm(dim=1, keepdim=True) + 0.3)
    assert torch.allclose(torch.cat([v_x, v_z[:, None]], 1), v, rtol=1e-9)


@pytest.mark.equation("eq:pfgm-target", "minigen.pfgm.PFGM.field_target")
def test_target_has_length_root_n_far_away_and_vanishes_at_a_charge():
    charges = points(50, 64)
    v_x, v_z = PFGM().field_target(1e4 * points(5, 64, 1), torch.full((5,), 10.0, dtype=F64), charges)
    assert torch.allclose((v_x.square().sum(1) + v_z**2).sqrt(), torch.full((5,), 8.0, dtype=F64), rtol=1e-3)
    v_x, v_z = PFGM().field_target(charges[:5] + 1e-6, torch.full((5,), 1e-6, dtype=F64), charges)
    assert float(v_x.abs().max()) < 1e-4 and float(v_z.abs().max()) < 1e-4


@pytest.mark.equation("eq:pfgm-perturb", "minigen.pfgm.PFGM.perturb")
def test_perturbation_is_the_papers():
    """Theirs: |eps_x| times an independent direction u. Ours: eps_x. One law: radius, angle and their pairs agree."""
    n, N = 4000, 3
    method = PFGM(M=100)
    with seeded(0):
        m, eps = 100 * torch.rand(n, dtype=F64), torch.randn(n, N + 1, dtype=F64)
        x, z = method.perturb(torch.zeros(n, N, dtype=F64), m, eps)
        m, eps, u = 100 * torch.rand(n, dtype=F64), torch.randn(n, N + 1, dtype=F64), torch.randn(n, N, dtype=F64)
    scale = 0.01 * 1.03**m
    theirs = (scale * eps[:, :N].norm(dim=1))[:, None] * u / u.norm(dim=1, keepdim=True)
    assert bool((z > 0).all())
    for ours, other in ((x[:, 0], theirs[:, 0]), (x.norm(dim=1) / z, theirs.norm(dim=1) / (scale * eps[:, N].abs()))):
        assert stats.ks_2samp(ours.numpy(), other.numpy()).pvalue > 1e-3
    cos = z / (x.square().sum(1) + z**2).sqrt()  # the direction is uniform on the hemisphere of R^4
    assert stats.kstest((cos**2).numpy(), stats.beta(0.5, N / 2).cdf).pvalue > 1e-3


@pytest.mark.equation("eq:pfgm-scales", "minigen.pfgm.PFGM.perturb")
def test_with_all_scales_the_perturbation_is_the_cauchy_kernel_at_every_height():
    """Log-uniform scales forget themselves: at fixed z, far from the ends, x has the Cauchy law of width z."""
    method = PFGM(M=800, sigma=1e-6)
    with seeded(1):
        m, eps = 800 * torch.rand(400_000, dtype=F64), torch.randn(400_000, 3, dtype=F64)
    x, z = method.perturb(torch.zeros(400_000, 2, dtype=F64), m, eps)
    for height in (1e-3, 1.0):
        slab = (z > height) & (z < 1.5 * height)
        ratio = (x[slab].norm(dim=1) / z[slab]).numpy()
        assert len(ratio) > 4000
        assert stats.kstest(ratio, lambda q: 1 - 1 / (1 + q**2) ** 0.5).pvalue > 1e-3


@pytest.mark.equation("eq:pfgm-loss", "minigen.pfgm.PFGM.loss")
def test_loss_is_the_squared_error_of_the_field_at_the_small_batch():
    method = PFGM(small_batch=30, gamma=0.5)
    x, seen = points(200, 2).float(), {}

    def net(x_in, u):
        seen.update(x=x_in, u=u)
        return torch.ones(len(x_in), 3)

    with seeded(0):
        loss = method.loss(net, x)
    with seeded(0):
        m, eps = 291 * torch.rand(30), torch.randn(30, 3)
    x_z, z = method.perturb(x[:30], m, eps)
    t_x, t_z = method.field_target(x_z, z, x)
    direct = torch.cat([1 - t_x, 1 - t_z[:, None]], 1).square().mean(1)
    assert loss.shape == (30,) and torch.allclose(loss, direct, atol=1e-6)
    assert torch.allclose(seen["x"], x_z / (1 + z**2 + x_z.square().mean(1)).sqrt()[:, None], atol=1e-6)
    assert 0 <= float(seen["u"].min()) < 0.2 and 0.8 < float(seen["u"].max()) <= 1


@pytest.mark.equation("eq:pfgm-denoise", "minigen.pfgm.PFGM.loss")
def test_denoiser_loss_draws_from_the_kernel_and_is_least_at_the_mean():
    data = points(40, 2).float()
    batch = data[torch.randint(40, (20_000,))]
    method = PFGM(target="denoiser", small_batch=20_000)
    exact = method.oracle(empirical_denoiser(data.double(), CAUCHY))
    values = {}
    for name, net in {
        "exact": exact,
        "low": lambda x, u: 0.9 * exact(x, u),
        "high": lambda x, u: exact(x, u) + 0.1,
    }.items():
        with seeded(3):
            values[name] = float(method.loss(net, batch).mean())
    assert values["exact"] < min(values["low"], values["high"])
    assert values["high"] - values["exact"] == pytest.approx(0.01, abs=0.003)  # unbiased: only the offset adds


def test_without_its_own_source_in_the_large_batch_the_target_is_wrong():
    """A missing source ruins the target near the data."""
    data = points(500, 8)
    x, z = data[:100] + 0.01 * points(100, 8, 1), torch.full((100,), 0.01, dtype=F64)
    with_own, _ = PFGM().field_target(x, z, data)
    without, _ = PFGM().field_target(x, z, data[100:])
    assert float((without - with_own).norm(dim=1).median()) > 10 * float(with_own.norm(dim=1).median())


@pytest.mark.parametrize("size", [2, 8, 64])
def test_with_its_source_in_the_batch_the_mean_is_unbiased(size):
    """Given x, the source is one of the data with probability w_i; the other charges are independent draws."""
    data, trials = points(500, 8), 600
    with seeded(0):
        x = data[:150] + 0.5 * CAUCHY.noise(data[:150])
    x = x[x.norm(dim=1) < 8]
    full = empirical_denoiser(data)(x, torch.full((len(x),), 0.5, dtype=F64))
    log_w = CAUCHY.log_weight(squared_distances(x, data), 0.5, 8)
    far = float((full - data.mean(0)).norm(dim=1).mean())
    off, noise = {}, {}
    for own in (True, False):
        total = square = 0
        with seeded(1):
            for _ in range(trials):
                batch = torch.randint(500, (len(x), size))
                if own:
                    batch[:, :1] = torch.multinomial(log_w.softmax(1), 1)
                y = (log_w.gather(1, batch).softmax(1)[:, :, None] * data[batch]).sum(1)
                total, square = total + y, square + y**2
        mean = total / trials
        off[own] = float((mean - full).norm(dim=1).mean()) / far
        noise[own] = float(((square / trials - mean**2).sum(1) / trials).sqrt().mean()) / far
    assert off[True] < 3 * noise[True] < 0.1
    assert off[False] > max(0.2, 10 * noise[False])


@pytest.mark.equation("eq:pfgm-ode", "minigen.pfgm.PFGM.denoiser")
@pytest.mark.parametrize("method", [P, FIELD, PFGM(gamma=0.13, z_exp=0.0, upper_norm=2000.0)])
def test_any_exact_network_is_read_as_the_exact_denoiser(method):
    exact = law()
    denoise = method.denoiser(method.oracle(exact.denoiser))
    for z in (0.02, 0.05, 0.2, 1.0, 30.0):
        x, level = points(20, 2, 3) * (1 + z), torch.full((20,), z, dtype=F64)
        got, want = denoise(x, level), exact.denoiser(x, level)
        assert float((got - want).abs().max()) < 5e-3 * (1 + z)


@pytest.mark.equation("eq:pfgm-substitution", "minigen.pfgm.PFGM.substitute")
@pytest.mark.parametrize(
    ("shape", "gamma", "height", "median", "least"),
    [((2,), 0.13, 0.3, 0.14, 0.2), ((1, 8, 8), None, None, 0.0155, 0.02), ((3, 32, 32), None, None, 0.0056, 0.015)],
)
def test_substitution_recovers_v_z_exactly(shape, gamma, height, median, least):
    """Theirs, gamma s / (1 - s), needs |E| - |E_x| much below gamma: a few per cent at z_exp for pictures."""
    method, n = PFGM.for_data(shape), prod(shape)
    if gamma is not None:  # points do not use the field form by default
        method = PFGM(gamma=gamma, z_exp=height)
    data, z = points(300, n) * 0.5, torch.full((300,), method.z_exp, dtype=F64)
    with seeded(0):
        x = data + method.z_exp * CAUCHY.noise(data)
    keep = x.norm(dim=1) < 900 * method.gamma
    data, z, x = data[keep], z[keep], x[keep]
    v_x, v_z = method.field_target(x, z, data)
    assert torch.allclose(method.substitute(v_x, z), v_z, rtol=1e-6)
    s = v_x.norm(dim=1) / sqrt(n)
    g = method.gamma
    theirs = -sqrt(n) * z / (((g * s / (1 - s)) ** 2 + z**2).sqrt() + g)
    error = (theirs / v_z - 1).abs()
    assert float(error.median()) == pytest.approx(median, rel=0.3)
    assert least < float(error.max()) < 0.3


def test_the_papers_guard_is_singular_where_ours_is_not():
    """1 / (v_z + 1e-5) with v_z < 0 explodes at v_z = -1e-5; ours keeps the sign that E_z = z demands."""
    z = torch.tensor([0.5])
    for v_z in (-1e-5, -2e-5, 0.0, 1e-6):
        net = lambda x, u, v_z=v_z: torch.tensor([[1e-3, 0.0, v_z]])
        x = PFGM(z_exp=0.0).denoiser(net)(torch.zeros(1, 2), z)
        assert float(x[0, 0]) == pytest.approx(0.5 * 1e-3 / (abs(v_z) + 1e-5), rel=1e-4)
    for v_z, factor in ((-0.9e-5, 10), (-0.99e-5, 100)):  # their quotient: far too long, and of the wrong sign
        net = lambda x, u, v_z=v_z: torch.tensor([[1e-3, 0.0, v_z]])
        ours = float(PFGM(z_exp=0.0).denoiser(net)(torch.zeros(1, 2), z)[0, 0])
        theirs = -0.5 * 1e-3 / (v_z + 1e-5)
        assert ours > 0 > theirs and abs(theirs) > factor * ours


@pytest.mark.equation("eq:pfgm-log", "minigen.samplers.rk45")
def test_log_z_saves_evaluations():
    from scipy.integrate import solve_ivp

    exact = law()
    with seeded(0):
        x = 40 * CAUCHY.noise(torch.empty(100, 2, dtype=F64))
    flow = samplers.probability_flow(exact.denoiser)
    in_log = samplers.rk45(flow, x, 40.0, 1e-3, tol=1e-4)

    def rate(z, y):
        return exact.velocity(torch.from_numpy(y).reshape(100, 2), torch.tensor(z, dtype=F64)).flatten().numpy()

    in_z = solve_ivp(rate, (40.0, 1e-3), x.flatten().numpy(), method="RK45", rtol=1e-4, atol=1e-4)
    assert in_log.nfe < 0.7 * in_z.nfev
    assert torch.allclose(in_log.x.flatten(), torch.from_numpy(in_z.y[:, -1]), atol=0.02, rtol=0.01)


def test_every_sampler_of_an_exact_pfgm_finds_the_law():
    exact = law()
    near = lambda x: x * (4 / x.norm(dim=1, keepdim=True)).clamp(max=1)
    seeds, floor, away = range(6), 0.0, {}
    for seed in seeds:
        with seeded(90 + seed):
            real, again = exact.sample(1000).float(), exact.sample(1000).float()
        floor += sliced_wasserstein(near(again), near(real), 64) / len(seeds)
        for label, method in (("denoiser", P), ("field", FIELD)):
            net = method.oracle(exact.denoiser)
            for name, steps in (("euler", 30), ("ddim", 30), ("heun", 30), ("rk45", 0), ("paper", 0), ("few", 0)):
                sampler, n = ("euler", 5) if name == "few" else (name, steps or 1)
                x, calls = draw(method, net, (1000, 2), sampler=sampler, steps=n, seed=seed)
                d = sliced_wasserstein(near(x), near(real), 64)
                away[label, name] = away.get((label, name), 0) + d / len(seeds)
                assert calls == {"euler": 30, "ddim": 30, "heun": 59, "few": 5}.get(name, calls)
                assert calls < 300
    for (label, name), d in away.items():
        if name == "few":
            assert d > 2 * floor, label  # five steps are not enough, and the distance sees it
        else:
            assert d < 1.25 * floor, (label, name)


@pytest.mark.parametrize("D", [1.0, 2.0, 128.0, inf])
def test_pfgmpp_with_an_exact_network_finds_the_modes(D):
    modes = two_modes().sample(600)
    method = PFGMPP(D=D, sigma_data=1.0, sigma_max=200.0)
    with seeded(0):
        x = sample(method, method.oracle(empirical_denoiser(modes.double(), Kernel(D))), (600, 2))
        real = modes
    share = float((x[:, 0] < 0).double().mean())
    assert share == pytest.approx(float((modes[:, 0] < 0).double().mean()), abs=4 * 0.4 / sqrt(600) + 0.01)
    assert sliced_wasserstein(x, real) < 0.15


def test_pfgmpp_with_D_1_is_pfgm_and_with_infinity_diffusion():
    data, x = points(9, 2), points(20, 2, 1)
    z = torch.full((20,), 0.6, dtype=F64)
    one = PFGMPP(D=1, sigma_data=1.0)
    flow = samplers.probability_flow(one.denoiser(one.oracle(empirical_denoiser(data, one.kernel))))(x, z)
    pfgm = samplers.probability_flow(P.denoiser(P.oracle(empirical_denoiser(data, CAUCHY))))(x, z)
    assert torch.allclose(flow, pfgm, rtol=1e-6)
    v_x, v_z = PFGM(gamma=0.1).field_target(x, z, data)
    assert torch.allclose(flow, v_x / v_z[:, None], rtol=1e-6)
    with seeded(0):
        a = PFGMPP(D=1, sigma_max=40.0).prior((50, 2))
    with seeded(0):
        b = PFGM(upper_norm=1e30).prior((50, 2))
    assert torch.allclose(a, b)
    with seeded(0):
        a = PFGMPP(D=inf).prior((50, 2))
    with seeded(0):
        b = 80 * torch.randn(50, 2)
    assert torch.equal(a, b)


@pytest.mark.equation("eq:pfgm-plus", "minigen.pfgmpp.PFGMPP.loss")
@pytest.mark.equation("eq:pfgm-precondition", "minigen.pfgmpp.PFGMPP.denoiser")
def test_pfgmpp_loss_is_the_weighted_error_of_the_network_itself():
    """With the weight 1 / c_out^2 the loss is |F - (y - c_skip x) / c_out|^2, and this target has variance 1."""
    method = PFGMPP(D=inf, sigma_data=0.7)
    with seeded(0):
        y = 0.7 * torch.randn(50_000, 2)
    net = lambda x, u: torch.zeros_like(x)
    with seeded(1):
        loss = method.loss(net, y)
    assert float(loss.mean()) == pytest.approx(1.0, abs=0.02)
    with seeded(1):
        sigma = (-1.2 + 1.2 * torch.randn(50_000)).exp()
        x = y + sigma[:, None] * torch.randn(50_000, 2)
    c_skip = 0.7**2 / (sigma**2 + 0.7**2)
    c_out = sigma * 0.7 / (sigma**2 + 0.7**2).sqrt()
    direct = ((y - c_skip[:, None] * x) / c_out[:, None]).square().mean(1)
    assert torch.allclose(loss, direct, rtol=1e-3, atol=1e-4)


def test_targets_have_variance_one_only_for_many_added_dimensions():
    with seeded(0):
        y = 0.5 * torch.randn(50_000, 2)
    size = {}
    for D in (1, 2, 4, 64):
        with seeded(1):
            size[D] = float(PFGMPP(D=D).loss(lambda x, u: torch.zeros_like(x), y).mean())
    assert size[64] == pytest.approx(1, abs=0.05) and 1.3 < size[4] < 2
    assert size[2] > 3 and size[1] > 1000  # infinite: what is drawn depends on the largest draw


def test_the_target_is_the_same_under_autocast():
    data, z = points(200, 64).float(), torch.full((50,), 0.3)
    x = data[:50] + 0.3 * points(50, 64, 1).float()
    plain, _ = PFGM().field_target(x, z, data)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = PFGM().field_target(x, z, data)
    assert cast.dtype == torch.float32 and torch.allclose(cast, plain, rtol=1e-4, atol=1e-5)


def test_levels_are_drawn_before_the_noise():
    x = torch.zeros(6, 2)
    method, seen = PFGMPP(D=5.0), {}
    with seeded(0):
        method.loss(lambda x, u: seen.update(u=u) or x, x)
    with seeded(0):
        sigma = (-1.2 + 1.2 * torch.randn(6)).exp()
    assert torch.allclose(seen["u"], method.clock(sigma))


def test_learned_field_of_the_heart():
    """A short training in the denoiser form: it removes most of the error that is left without the network.

    The direction of the field says little: without any network its cosine to the exact one is 0.98 above z = 0.1.
    """
    data = heart()
    with seeded(0):
        method = PFGM.for_data((2,))
        net = nets.build(nets.preset((2,), method.out_channels(2), 64))
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for k in range(600):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1, (k + 1) / 50, (600 - k) / 300)
            loss = method.loss(net, data.sample(256)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        charges = data.sample(4000)
        z = 0.1 * 100 ** torch.rand(1000)
        x = data.sample(1000) + z[:, None] * CAUCHY.noise(torch.empty(1000, 2))
        untrained = nets.build(nets.preset((2,), method.out_channels(2), 64))
    exact, kept = empirical_denoiser(charges)(x, z), method.precondition(x, z)[0]

    def left(f):  # the error of the mean, in units of the error with a network that returns 0
        with torch.no_grad():
            return float((method.denoiser(f)(x, z) - exact).norm() / (exact - kept).norm())

    assert left(net) < 0.5
    assert left(untrained) > 0.9


def test_likelihood_of_the_method():
    exact = law()
    method = PFGM(target="denoiser", z_min=1e-4, z_max=1000.0)
    with seeded(0):
        x = exact.sample(20)
    out = method.log_likelihood(method.oracle(exact.denoiser), x, tol=1e-6)
    assert float((out.extra - exact.log_prob(x)).abs().max()) < 0.02


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PFGM(z_min=50.0), "z_min < z_max"),
        (lambda: PFGM(gamma=0.0), "positive"),
        (lambda: PFGM(small_batch=0), "batches"),
        (lambda: PFGM().sigmas(0), "steps"),
        (lambda: PFGMPP(D=0.5), "D >= 1"),
        (lambda: PFGMPP(sigma_min=90.0), "sigma_min < sigma_max"),
        (lambda: PFGMPP(levels=0), "levels"),
        (lambda: PFGMPP().sigmas(0), "steps"),
    ],
)
def test_bad_input_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
