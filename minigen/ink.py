"""Ink in warm water: the Ornstein-Uhlenbeck process forward, its exact densities, and its reversal. No network.

A particle is pulled to the origin and kicked, dx = -x/2 dt + dW (Uhlenbeck and Ornstein 1930). Time ``t`` has no unit:
the memory of the start fades as exp(-t/2), the equilibrium is N(0, I). One step of strength ``beta``,
``sqrt(1 - beta) x + sqrt(beta) eps``, is this process exactly, for a time -log(1 - beta). A mixture of Gaussians stays
one, so that everything here has a closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import exp, expm1, sqrt

import torch
from torch import Tensor

from .core import expand
from .laws import Mixture

Score = Callable[[Tensor, float], Tensor]
"""``score(x: b *d, t) -> b *d``: the gradient of log p_t at ``x``."""


def step(x: Tensor, beta: float) -> Tensor:
    """One step forward, ``sqrt(1 - beta) x + sqrt(beta) eps``, for particles ``x`` (``b *d``)."""
    return sqrt(1 - beta) * x + sqrt(beta) * torch.randn_like(x)


def mix(x: Tensor, betas: Tensor) -> Iterator[Tensor]:
    """The forward film of particles ``x`` (``b *d``): yields the state after each of the steps ``betas`` (``s``)."""
    for beta in betas.tolist():
        x = step(x, beta)
        yield x


def clock(betas: Tensor) -> Tensor:
    """The time after each number of steps, ``s + 1``, float64: entry 0 is 0, entry k the sum of -log(1 - beta)."""
    passed = -torch.log1p(-betas.double()).cumsum(0)
    return torch.cat([passed.new_zeros(1), passed])


def step_back(x: Tensor, beta: float, slope: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    """Undo one step of strength ``beta``: ``(x + beta slope) / sqrt(1 - beta) + sqrt(beta) noise``, ``b *d``.

    With the exact score at ``x`` as ``slope`` and no noise this is the exact mean of the state before the step
    (Tweedie's formula); with standard Gaussian noise it is, for small ``beta``, a step of the reversed process
    (Anderson 1982).
    """
    return (x + beta * slope) / sqrt(1 - beta) + sqrt(beta) * noise


def unmix(score: Score, x: Tensor, betas: Tensor) -> Iterator[Tensor]:
    """The film backwards: yields the states before the last, ..., before the first of the steps ``betas`` (``s``).

    Args:
        score: ``(x: b *d, t) -> b *d``, for example ``Ink(law).score``.
        x: ``b *d``, the particles after all steps; draws of N(0, I) will do if the steps are many.
        betas: strengths of the forward steps, in forward order.

    Yields:
        ``s`` states, ``b *d``. The last one is a mean, without a kick.
    """
    times = clock(betas).tolist()
    for k in range(len(betas), 0, -1):
        slope = score(x, times[k])
        x = step_back(x, float(betas[k - 1]), slope, torch.randn_like(x) if k > 1 else 0.0)
        yield x


def reverse_kernel(law: Mixture, x: Tensor, beta: float) -> Mixture:
    """Where did the particle come from? The law of the state before one step, given the state ``x`` after it.

    Bayes' rule for each component of ``law``, whose widths must be positive: its weight is multiplied by the density it
    gives to ``x``, its mean and variance are the usual compromise of two Gaussians.

    Args:
        law: the law before the step, means ``k *d``.
        x: one state after the step, ``*d``.
        beta: strength of the step, between 0 and 1.

    Returns:
        A mixture of ``k`` components, in float64.

    Raises:
        ValueError: if ``beta`` is not between 0 and 1, or a component of the law has no width.
    """
    if not 0 < beta < 1:
        raise ValueError(f"a step back needs 0 < beta < 1, got {beta}")
    if not bool((law.std > 0).all()):
        raise ValueError("the law has components of width zero: give them a width, as in Mixture.of(points, std=0.01)")
    m, v, x = law.means.double(), law.std.double() ** 2, x.double()
    var = beta * v / ((1 - beta) * v + beta)
    mean = expand(var / v, m) * m + expand(var * sqrt(1 - beta) / beta, m) * x
    after = Mixture(m * sqrt(1 - beta), ((1 - beta) * v + beta).sqrt(), law.weights.double())
    return Mixture(mean, var.sqrt(), after.responsibilities(x[None])[0])


@dataclass(frozen=True)
class Ink:
    """Particles that start from ``law`` and follow the Ornstein-Uhlenbeck process; all densities are exact.

    Attributes:
        law: the law at time 0.
    """

    law: Mixture

    def at(self, t: float) -> Mixture:
        """The law of x_t = exp(-t/2) x_0 + sqrt(1 - exp(-t)) eps: again a mixture."""
        return Mixture(self.law.means * exp(-t / 2), (self.law.std**2 * exp(-t) - expm1(-t)).sqrt(), self.law.weights)

    def score(self, x: Tensor, t: float) -> Tensor:
        """The gradient of log p_t at ``x`` (``b *d``), for ``t`` > 0; shape ``b *d``."""
        return self.law.score(x * exp(t / 2), torch.tensor(sqrt(expm1(t)), dtype=x.dtype)) * exp(t / 2)

    def free_energy(self, x: Tensor, t: float) -> Tensor:
        """The terms ``|x|**2 / 2 + log p_t(x)`` at draws ``x`` (``b *d``) of p_t, nats, ``b``; their mean is F(t)."""
        return x.flatten(1).square().sum(1) / 2 + self.at(t).log_prob(x)

    def dissipation(self, x: Tensor, t: float) -> Tensor:
        """The terms ``|x + score|**2 / 2`` at draws ``x`` (``b *d``) of p_t, shape ``b``; their mean is -dF/dt."""
        return (x + self.score(x, t)).flatten(1).square().sum(1) / 2
