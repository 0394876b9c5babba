"""Distances between sets of samples, coverage of known modes, and bits per dimension.

A distance means little alone: compare it with its floor, the same distance between two sets of true samples of the same
size. Where directions are drawn, they come from a generator with a fixed seed, so that equal sets give equal numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from .core import Method, Net
from .laws import Mixture


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 256, seed: int = 0) -> float:
    """The Wasserstein-1 distance of one-dimensional projections, averaged over random directions.

    Args:
        a: ``n *d``.
        b: ``m *d``; ``n`` and ``m`` may differ.
        projections: number of directions, uniform on the sphere.
        seed: of the directions.

    Returns:
        The distance in the units of the data (Rabin, Peyre, Delon, Bernot 2012, with exponent 1).

    Raises:
        ValueError: if a set is empty or the dimensions differ.
    """
    a, b = _pair(a, b)
    random = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=random, dtype=a.dtype)
    directions = (directions / directions.norm(dim=0)).to(a.device)
    values, order = torch.cat([a @ directions, b @ directions]).sort(dim=0)
    # W1 is the integral of |F_a - F_b|; at every sample one of the two distribution functions jumps
    jump = torch.where(order < len(a), values.new_tensor(1 / len(a)), values.new_tensor(-1 / len(b)))
    return float((jump.cumsum(0)[:-1].abs() * values.diff(dim=0)).sum(0).mean())


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|A - B| - E|A - A'| - E|B - B'| for ``a``: ``n *d``, ``b``: ``m *d`` (Szekely and Rizzo 2013).

    Unbiased: pairs of a sample with itself are left out, so that two samples of one law give 0 on average, and single
    results may be negative.

    Raises:
        ValueError: if a set has fewer than two samples or the dimensions differ.
    """
    a, b = _pair(a, b, least=2)
    return 2 * _mean_distance(a, b) - sum(_mean_distance(x, x) * len(x) / (len(x) - 1) for x in (a, b))


@dataclass(frozen=True)
class Coverage:
    """How samples are spread over the components of a mixture.

    Attributes:
        shares: ``k``: the part of the samples that belongs to each component, by p(k | x); their sum is 1.
        weights: ``k``: what it should be.
        found: number of components that got at least a tenth of what they should.
    """

    shares: Tensor
    weights: Tensor
    found: int


def mode_coverage(x: Tensor, law: Mixture) -> Coverage:
    """The spread of ``x`` (``n *d``) over the components of ``law``, whose widths must be positive."""
    shares = law.responsibilities(x.to(law.means)).mean(0)
    return Coverage(shares, law.weights, int((shares >= law.weights / 10).sum()))


def bits_per_dim(method: Method, net: Net, x: Tensor, bins: int = 256, batch: int = 64) -> tuple[float, float]:
    """The variational bound on -log2 p per dimension: mean over the samples and its standard error.

    Draws noise from torch's random state.

    Args:
        method: one with a ``bound``.
        net: ``(x: b *d, u: b) -> b *o``.
        x: ``n c h w`` in [-1, 1].
        bins: gray values of a pixel.
        batch: samples at a time.

    Raises:
        ValueError: if the method has no bound.
    """
    if not hasattr(method, "bound"):
        raise ValueError(f"{type(method).__name__} has no variational bound: bits per dimension need another method")
    bits = torch.cat([method.bound(net, part, bins).bits.double().cpu() for part in x.split(batch)])
    return float(bits.mean()), float(bits.std() / sqrt(len(bits))) if len(bits) > 1 else float("nan")


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """``|mean_a - mean_b|**2 + tr(C_a + C_b - 2 (C_a C_b)**(1/2))`` of two sets of features, ``n f`` and ``m f``.

    The squared Wasserstein-2 distance of two Gaussians (Frechet 1957; Heusel et al. 2017 for images), in float64. The
    trace of the root is the sum of the singular values of C_a**(1/2) C_b**(1/2): no rank is too low for that.

    Raises:
        ValueError: if a set has fewer than two samples or the dimensions differ.
    """
    a, b = _pair(a.double(), b.double(), least=2)
    cov_a, cov_b = a.T.cov().reshape(a.shape[1], -1), b.T.cov().reshape(b.shape[1], -1)
    root = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root)


def _root(c: Tensor) -> Tensor:
    """The square root of a symmetric, positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(c)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _mean_distance(a: Tensor, b: Tensor) -> float:
    exact = "donot_use_mm_for_euclid_dist"  # else the distance of a point to itself is not 0
    total = sum(torch.cdist(part, b, compute_mode=exact).double().sum() for part in a.split(1024))
    return float(total) / (len(a) * len(b))


def _pair(a: Tensor, b: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
    if min(len(a), len(b)) < least or a.shape[1:] != b.shape[1:]:
        raise ValueError(f"needs {least} or more samples of one shape in each set, got {[*a.shape]} and {[*b.shape]}")
    return a.flatten(1), b.flatten(1).to(a)
