"""Electrostatics: the laws of Coulomb and Gauss, and the lines that carry data to a hemisphere."""

from __future__ import annotations

from math import exp, log, pi, sqrt

import pytest
import torch
from scipy.stats import kstest

from minigen import laws, seeded
from minigen.charges import (
    Charges,
    closed_surface,
    crossing,
    field_lines,
    flux,
    hemisphere,
    sphere_area,
)

F64 = torch.float64


def some(d, n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Charges(torch.randn(n, d, generator=g, dtype=F64), torch.randn(n, generator=g, dtype=F64))


def heart():
    """319 points, centered, within 1.4 of the origin."""
    means = 0.57 * laws.heart().means.double()
    return means - means.mean(0)


def elsewhere(n, d):
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(99))


def test_areas_of_spheres():
    assert [sphere_area(d) for d in (1, 2, 3, 4)] == pytest.approx([2, 2 * pi, 4 * pi, 2 * pi**2])
    assert sphere_area(455) > 0 == sphere_area(456)  # as documented


@pytest.mark.equation("eq:pfgm-coulomb", "minigen.charges.Charges.field")
def test_field_is_the_sum_of_the_charges():
    for d in (2, 3, 5):
        charges, x = some(d), elsewhere(7, d)
        away = x[:, None] - charges.places
        direct = (charges.amounts[:, None] * away / away.norm(dim=2, keepdim=True) ** d).sum(1) / sphere_area(d)
        assert torch.allclose(charges.field(x), direct, rtol=1e-10)


@pytest.mark.equation("eq:pfgm-potential", "minigen.charges.Charges.potential")
@pytest.mark.parametrize("d", [2, 3, 6])
def test_field_is_minus_the_gradient_and_has_no_sources_between_the_charges(d):
    charges, x = some(d), elsewhere(6, d).requires_grad_(True)
    grad = torch.autograd.grad(charges.potential(x).sum(), x, create_graph=True)[0]
    assert torch.allclose(-grad, charges.field(x), rtol=1e-9)
    laplace = sum(torch.autograd.grad(grad[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(d))
    assert float((laplace / grad.norm(dim=1)).detach().abs().max()) < 1e-9


@pytest.mark.equation("eq:pfgm-gauss", "minigen.charges.flux")
@pytest.mark.parametrize(("d", "axes"), [(2, [1.0, 2.0]), (2, [3.0, 3.0]), (3, [1.0, 1.5, 2.0]), (3, [2.0, 2.0, 0.7])])
def test_flux_is_the_charge_inside(d, axes):
    places = torch.tensor([[0.3, 0.2, 0.1], [-0.4, -0.6, 0.2], [4.0, 1.0, -3.0]], dtype=F64)[:, :d]
    charges = Charges(places, torch.tensor([1.0, -0.4, 5.0], dtype=F64))
    surface = closed_surface(torch.zeros(d, dtype=F64), torch.tensor(axes), n=400)
    assert flux(charges.field, surface) == pytest.approx(0.6, abs=1e-6)
    # the law holds for the exponent d only
    wrong = lambda x: charges.field(x) / x.norm(dim=1, keepdim=True)
    assert abs(flux(wrong, surface) - 0.6) > 0.01


def test_area_vectors_close():
    for axes in ([1.0, 2.0], [1.0, 2.0, 0.5]):
        _, area = closed_surface(torch.zeros(len(axes), dtype=F64), torch.tensor(axes))
        assert float(area.sum(0).abs().max()) < 1e-10
    points, area = closed_surface(torch.ones(3, dtype=F64), torch.tensor([1.0, 2.0, 0.5]))
    assert float((points * area).sum()) == pytest.approx(3 * 4 / 3 * pi)  # divergence theorem: 3 volumes


@pytest.mark.equation("eq:pfgm-disk", "minigen.charges.Charges.field")
def test_a_disk_in_its_own_plane_collapses_to_its_center():
    """Uniform density 1: the field is x / 2 inside, so all points reach the center together."""
    g = (torch.arange(-100, 101, dtype=F64)) * 0.01
    grid = torch.cartesian_prod(g, g)
    disk = grid[grid.norm(dim=1) <= 1]
    charges = Charges(disk, torch.full((len(disk),), 0.01**2, dtype=F64))
    x = torch.tensor([[0.305, 0.105], [-0.505, 0.205], [0.005, -0.705]], dtype=F64)  # midway between charges
    assert torch.allclose(charges.field(x), x / 2, atol=3e-3)


@pytest.mark.equation("eq:pfgm-half", "minigen.charges.Charges.field")
def test_half_of_the_flux_goes_up():
    """Gaussian data on a line: E_z just above it is p / 2. The exact integral, not charges."""
    y, x, z = torch.linspace(-12, 12, 2_000_001, dtype=F64), 0.7, 1e-3
    p = (-(y**2) / 2).exp() / sqrt(2 * pi)
    step = float(y[1] - y[0])
    E_z = float((p * z / ((x - y) ** 2 + z**2)).sum()) * step / sphere_area(2)
    assert E_z == pytest.approx(exp(-(x**2) / 2) / sqrt(2 * pi) / 2, rel=2e-3)


@pytest.mark.equation("eq:pfgm-far", "minigen.charges.Charges.field")
def test_far_away_the_data_are_one_charge():
    charges = Charges.on_plane(heart())
    x = hemisphere(20, 3)
    errors = []
    for R in (10.0, 20.0, 40.0):
        one = R * x / (sphere_area(3) * R**3)
        errors.append(float(((charges.field(R * x) - one).norm(dim=1) / one.norm(dim=1)).max()))
    assert errors[0] < 0.03
    assert [log(a / b) / log(2) for a, b in zip(errors, errors[1:])] == pytest.approx([2, 2], abs=0.1)


def cap(charges, R, cos, n=60):
    """Flux through the part of the sphere of radius R with cos(theta) > cos, over the flux through the upper half."""
    c = torch.linspace(0, 1, 2 * n + 1, dtype=F64)[1::2] * (1 - cos) + cos
    angle = torch.arange(n, dtype=F64) * 2 * pi / n
    s = (1 - c**2).sqrt()
    u = torch.stack([s[:, None] * angle.cos(), s[:, None] * angle.sin(), c[:, None].expand(-1, n)], 2).flatten(0, 1)
    E_r = (charges.field(R * u) * u).sum(1)
    return 2 * float(E_r.mean()) * 2 * pi * R**2 * (1 - cos)


@pytest.mark.equation("eq:pfgm-quadrupole", "minigen.charges.Charges.field")
def test_what_is_left_at_finite_radius_is_the_quadrupole():
    """No lines are traced: by Gauss the share of lines in a cap is the flux through it."""
    data = heart()
    s2 = float(data.square().mean())
    charges = Charges.on_plane(data)
    assert cap(charges, 10.0, 0.0) == pytest.approx(1, abs=1e-6)
    rest = []
    for R in (20.0, 40.0):
        for c in (0.3, 0.7):
            predicted = (1 - c) + 1.5 * s2 / R**2 * (c**3 - c)
            rest.append(cap(charges, R, c) - predicted)
    assert max(map(abs, rest)) < 0.1 * s2 / 40**2
    assert max(map(abs, rest[2:])) < 0.3 * max(map(abs, rest[:2]))  # the next term falls faster


@pytest.fixture(scope="module")
def lines():
    """3190 field lines of the heart, ten from each charge in directions that are uniform on the hemisphere."""
    charges = Charges.on_plane(heart())
    with seeded(0):
        start = charges.places.repeat(10, 1) + 1e-3 * hemisphere(3190, 3)
    return charges, field_lines(charges, start, 20.0, step=0.4)


@pytest.mark.equation("eq:pfgm-tube", "minigen.charges.field_lines")
def test_the_heart_becomes_a_uniform_hemisphere(lines):
    _, paths = lines
    ks = {}
    for R in (2.0, 5.0, 20.0):
        x = crossing(paths, R)
        assert torch.allclose(x.norm(dim=1), torch.tensor(R, dtype=F64), rtol=1e-6)
        phi = torch.atan2(x[:, 1], x[:, 0]) / (2 * pi) + 0.5
        ks[R] = [kstest(u.clamp(0, 1).numpy(), "uniform").statistic for u in (x[:, 2] / R, phi)]
    critical = 1.63 / sqrt(3190)
    assert max(ks[20.0]) < critical
    assert ks[2.0][0] > 1.3 * critical
    assert ks[2.0][0] > ks[5.0][0] > ks[20.0][0]


@pytest.mark.equation("eq:pfgm-dipole", "minigen.charges.field_lines")
def test_a_shifted_heart_is_off_by_its_dipole():
    shift = torch.tensor([0.5, 0.0], dtype=F64)
    charges = Charges.on_plane(heart() + shift)
    with seeded(1):
        start = charges.places.repeat(3, 1) + 1e-3 * hemisphere(957, 3)
    paths = field_lines(charges, start, 16.0)
    for R in (4.0, 16.0):
        off = crossing(paths, R)[:, 0] / R
        error = float(off.std()) / sqrt(len(off))
        assert float(off.mean()) == pytest.approx(2 / 3 * 0.5 / R, abs=3 * error)
    direct = Charges(torch.tensor([[0.5, 0.0, 0.0]], dtype=F64), torch.ones(1, dtype=F64))  # flux, no lines: exact
    u, area = closed_surface(torch.zeros(3, dtype=F64), torch.ones(3))
    mean = float(((direct.field(32 * u) * area).sum(1) * u[:, 0]).sum()) * 32**2
    assert mean == pytest.approx(2 / 3 * 0.5 / 32, rel=0.001)


def test_lines_end_at_the_charges_that_attract():
    pair = Charges(torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=F64), torch.tensor([1.0, -1.0], dtype=F64))
    start = torch.tensor([[-0.9, 0.05], [-0.999, 0.0]], dtype=F64)
    for back, place in ((False, 1), (True, 0)):
        paths = field_lines(pair, start if not back else -start, 5.0, back=back)
        assert len(paths) < 60 and bool(paths.isfinite().all())
        assert float((paths[-1] - pair.places[place]).norm(dim=1).max()) < 1e-3


def test_lines_lead_back_to_the_charges(lines):
    charges, paths = lines
    back = field_lines(charges, paths[-1][:300], 20.0, back=True)[-1]
    home = (back[:, None] - charges.places).norm(dim=2).min(1)
    start = (paths[0][:300, None] - charges.places).norm(dim=2).min(1)
    assert float(home.values.max()) < 1e-3
    assert float((home.indices == start.indices).double().mean()) > 0.97  # the rest left along the plane


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="charges need places"):
        Charges(torch.zeros(3, 1), torch.ones(3))
    with pytest.raises(ValueError, match="2 or 3 dimensions"):
        closed_surface(torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match="before it leaves"):
        crossing(torch.zeros(2, 1, 3), 1.0)
