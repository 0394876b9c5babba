"""An electrostatics laboratory: point charges, their field and potential, flux through closed surfaces, field lines.

Units in which Gauss' law reads *flux = enclosed charge*: the field of a charge ``q`` in ``d`` dimensions is
``q r / (S |r|**d)``, with ``S`` the area of the unit sphere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, lgamma, log, pi

import numpy as np
import torch
from torch import Tensor

from .fields import squared_distances


def sphere_area(d: int) -> float:
    """The area of the unit sphere in ``d`` dimensions, ``2 pi**(d/2) / Gamma(d/2)``: 2, 2 pi, 4 pi, ...

    For few dimensions: from 456 on the area is below the smallest floating-point number, and this is 0.
    """
    return 2 * exp(d / 2 * log(pi) - lgamma(d / 2))


@dataclass(frozen=True)
class Charges:
    """Point charges at rest.

    Attributes:
        places: ``n d``, with ``d`` at least 2.
        amounts: ``n``; negative ones are allowed.
    """

    places: Tensor
    amounts: Tensor

    def __post_init__(self) -> None:
        if self.places.ndim != 2 or self.places.shape[1] < 2 or self.amounts.shape != self.places.shape[:1]:
            shapes = [*self.places.shape], [*self.amounts.shape]
            raise ValueError(
                f"charges need places (n, d) with d >= 2 and amounts (n,), got {shapes[0]} and {shapes[1]}"
            )

    @classmethod
    def on_plane(cls, data: Tensor) -> Charges:
        """Data (``n d``) as equal charges with sum 1 on the plane z = 0 of one more dimension; float64."""
        places = torch.cat([data.double(), torch.zeros(len(data), 1, dtype=torch.float64)], 1)
        return cls(places, torch.full((len(data),), 1 / len(data), dtype=torch.float64))

    def field(self, x: Tensor) -> Tensor:
        """E at ``x`` (``b d``), ``b d``: the gradient of the potential, downhill; at a charge it has no meaning."""
        d, places = x.shape[1], self.places.to(x)
        w = self.amounts.to(x) * squared_distances(x, places) ** (-d / 2) / sphere_area(d)
        return x * w.sum(1, keepdim=True) - w @ places

    def potential(self, x: Tensor) -> Tensor:
        """The potential at ``x`` (``b d``), ``b``: ``-log r / (2 pi)`` per unit charge in the plane, else a power."""
        d, r2 = x.shape[1], squared_distances(x, self.places.to(x))
        one = -r2.log() / (4 * pi) if d == 2 else r2 ** (1 - d / 2) / ((d - 2) * sphere_area(d))
        return one @ self.amounts.to(x)


def closed_surface(center: Tensor, axes: Tensor, n: int = 200) -> tuple[Tensor, Tensor]:
    """An ellipse (``d = 2``) or ellipsoid (``d = 3``): points and outward area vectors, ``k d`` each.

    Args:
        center: ``d``.
        axes: ``d``, the half axes.
        n: points around (and, in three dimensions, n / 2 circles at the nodes of Gauss and Legendre).

    Raises:
        ValueError: if ``d`` is not 2 or 3.
    """
    angle = (torch.arange(n, dtype=torch.float64) + 0.5) * (2 * pi / n)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    if len(center) == 2:
        u, area = circle, torch.full((n,), 2 * pi / n, dtype=torch.float64)
    elif len(center) == 3:
        height, weight = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(n // 2))
        ring = (1 - height**2).sqrt()[:, None, None] * circle
        u = torch.cat([ring, height[:, None, None].expand(-1, n, 1)], 2).flatten(0, 1)
        area = (weight * 2 * pi / n).repeat_interleave(n)
    else:
        raise ValueError(f"closed surfaces are drawn in 2 or 3 dimensions, got {len(center)}")
    axes = axes.double()
    return center + axes * u, axes.prod() / axes * u * area[:, None]


def flux(field: Callable[[Tensor], Tensor], surface: tuple[Tensor, Tensor]) -> float:
    """The integral of the field's outward component over a closed surface: by Gauss' law the charge inside."""
    points, area = surface
    return float((field(points) * area).sum())


def hemisphere(n: int, d: int) -> Tensor:
    """``n`` points, uniform on the upper half of the unit sphere in ``d`` dimensions, ``n d``; float64."""
    g = torch.randn(n, d, dtype=torch.float64)
    g[:, -1] = g[:, -1].abs()
    return g / g.norm(dim=1, keepdim=True)


def field_lines(
    charges: Charges, x: Tensor, radius: float, *, back: bool = False, step: float = 0.3, most: int = 200
) -> Tensor:
    """Follow the field lines from ``x`` (``b d``): all states, ``s b d``, the first one ``x``.

    Runge and Kutta's fourth order along the direction of the field, each step ``step`` times the distance to the
    nearest charge. A line ends on the sphere of the given radius around the origin, or within 0.001 of a negative
    charge; followed against the field (``back``) it ends within 0.001 of a positive charge.
    """
    sign, states = -1.0 if back else 1.0, [x]
    ends = charges.places[sign * charges.amounts < 0].to(x)  # the charges at which a line can arrive

    def along(x: Tensor) -> Tensor:
        E = sign * charges.field(x)
        return E / E.norm(dim=1, keepdim=True).clamp(min=1e-300)

    for _ in range(most):
        near = squared_distances(x, charges.places.to(x)).amin(1).sqrt()
        done = (squared_distances(x, ends) < 1e-6).any(1) if len(ends) else torch.zeros_like(near, dtype=torch.bool)
        if not back:
            done = done | (x.norm(dim=1) > radius * (1 - 1e-9))
        if bool(done.all()):
            break
        h = torch.where(done, torch.zeros_like(near), step * near)[:, None]
        k1 = along(x)
        k2 = along(x + h / 2 * k1)
        k3 = along(x + h / 2 * k2)
        new = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + along(x + h * k3))
        x = new if back else _stop(x, new, radius)
        states.append(x)
    return torch.stack(states)


def crossing(lines: Tensor, radius: float) -> Tensor:
    """Where each of ``lines`` (``s b d``, from ``field_lines``) first leaves the sphere of this radius, ``b d``.

    Raises:
        ValueError: if a line does not.
    """
    outside = lines.norm(dim=2) >= radius * (1 - 1e-9)
    if not bool(outside.any(0).all()):
        raise ValueError(f"a line ends before it leaves the sphere of radius {radius}")
    k, b = outside.float().argmax(0), torch.arange(lines.shape[1])
    return _stop(lines[(k - 1).clamp(min=0), b], lines[k, b], radius)


def _stop(x: Tensor, new: Tensor, radius: float) -> Tensor:
    """``new``, or where the chord from ``x`` to ``new`` leaves the sphere."""
    chord = new - x
    a, b, c = chord.square().sum(1), (x * chord).sum(1), x.square().sum(1) - radius**2
    share = (-b + (b**2 - a * c).clamp(min=0).sqrt()) / a.clamp(min=1e-300)
    out = new.norm(dim=1) > radius
    return torch.where(out[:, None], x + share.clamp(0, 1)[:, None] * chord, new)
