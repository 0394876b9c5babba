"""How to choose noise levels and steps for annealed Langevin dynamics (Song and Ermon 2020, arXiv 2006.09011).

Techniques 1, 2 and 4 of that paper as functions. A ladder is ``sigma_1 > ... > sigma_L``, geometric, with ratio
``gamma``.
Steps are written as in that paper and in ``samplers.langevin``: ``x + step * score + sqrt(2 step) * noise``. The paper
of 2019 writes ``alpha / 2`` for the same step.
"""

from __future__ import annotations

from math import ceil, inf, log, log10, sqrt

import torch
from torch import Tensor
from torch.special import ndtr


def largest_distance(x: Tensor) -> float:
    """Technique 1: the largest Euclidean distance between two samples of ``x`` (``n *d``), a good ``sigma_1``.

    Raises:
        ValueError: if there are fewer than two samples.
    """
    if len(x) < 2:
        raise ValueError(f"a distance needs two samples or more, got {len(x)}")
    flat = x.flatten(1).double()
    return max(float(torch.cdist(part, flat).max()) for part in flat.split(1024))


def overlap(gamma: float | Tensor, dims: int) -> Tensor:
    """The share of the thin shell of level i that lies in the shell (+- 3 standard deviations) of level i - 1.

    Noise of level sigma in ``dims`` dimensions has a length close to N(sqrt(dims) sigma, sigma**2 / 2).
    """
    gamma = torch.as_tensor(gamma, dtype=torch.float64)
    away = sqrt(2 * dims) * (gamma - 1)
    return ndtr(away + 3 * gamma) - ndtr(away - 3 * gamma)


def ratio(dims: int, share: float = 0.5) -> float:
    """Technique 2: the ratio ``gamma`` of neighboring levels at which ``overlap`` has fallen to ``share``.

    Raises:
        ValueError: if there is none: in 4 dimensions or fewer every ratio keeps nearly all of the overlap.
    """
    if not 0 < share < 0.99:
        raise ValueError(f"the share of overlap must lie between 0 and 0.99, got {share}: the paper takes 0.5")
    if dims <= 4:
        raise ValueError(f"the rule says nothing in {dims} dimensions (it needs 5 or more): choose the levels yourself")
    low, high = 1.0, 2.0
    while overlap(high, dims) > share:
        high *= 2
        if high > 1e6:
            raise ValueError(f"no ratio brings the overlap down to {share} in {dims} dimensions: take a larger share")
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if overlap(middle, dims) > share else (low, middle)
    return (low + high) / 2


def levels(sigma_1: float, sigma_L: float, gamma: float) -> int:
    """How many levels a ladder from ``sigma_1`` down to ``sigma_L`` has if its ratio is at most ``gamma``.

    Raises:
        ValueError: unless ``sigma_1 > sigma_L > 0`` and ``gamma > 1``, all finite.
    """
    if not 0 < sigma_L < sigma_1 < inf or not 1 < gamma < inf:
        raise ValueError(f"a ladder needs sigma_1 > sigma_L > 0 and gamma > 1, got {sigma_1}, {sigma_L} and {gamma}")
    return 1 + ceil(log(sigma_1 / sigma_L) / log(gamma) - 1e-9)


def variance(step: float | Tensor, gamma: float, T: int) -> Tensor:
    """Variance after ``T`` steps at a level, in units of its sigma**2, for data of one point; it should be 1.

    ``step`` is in units of sigma**2. The level starts with what the level before should leave, gamma**2.
    """
    step = torch.as_tensor(step, dtype=torch.float64)
    rest = 1 / (1 - step / 2)  # the fixed point of v -> (1 - step)**2 v + 2 step
    return (1 - step) ** (2 * T) * (gamma**2 - rest) + rest


def step_size(gamma: float, T: int, sigma_L: float = 1.0) -> float:
    """Technique 4: the step at ``sigma_L`` that brings ``variance`` closest to 1.

    It is ``eps`` of that paper; ``NCSN.eps`` is twice as large. At level sigma it grows by ``(sigma / sigma_L)**2``.
    """
    low, high = 1e-9, 1.0
    for _ in range(3):  # a grid search, three times finer: the smallest distance from 1, steps below 1
        grid = torch.logspace(log10(low), log10(high), 4001, dtype=torch.float64)
        best = int((variance(grid, gamma, T) - 1).abs().argmin())
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 4000)])
    return float(grid[best]) * sigma_L**2
