"""Multiply a step back by a second distribution (Sohl-Dickstein et al. 2015, section 2.5 and appendix C).

Each function returns a rule ``(mean, var, t) -> (mean, var)`` for the step from x_t to x_{t-1}, which ``DPM.reverse``
applies to every step. Samples follow p(x_0) r(x_0) exactly only if the r of step t is the mean of r(x_0) given x_t;
with one r for all steps they do not, as the chapter measures.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Multiply = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""``(mean: b *d, var: b *d, t) -> (mean, var)``: a Gaussian step back, multiplied by r(x_{t-1})."""


def by_slope(log_r: Callable[[Tensor, int], Tensor]) -> Multiply:
    """For smooth r, eq. 61: the mean moves by var * grad log r, the variance stays.

    Args:
        log_r: ``(x: b *d, t - 1) -> b``, differentiable.
    """

    def rule(mean: Tensor, var: Tensor, t: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = mean.detach().requires_grad_()
            (slope,) = torch.autograd.grad(log_r(x, t - 1).sum(), x)
        return mean + var * slope, var

    return rule


def by_gaussian(
    center: Callable[[int], Tensor | float], spread: Callable[[int], float], scale: float = 1.0
) -> Multiply:
    """For a Gaussian r(x) = N(center; scale * x, spread), multiplied exactly: precisions add.

    Args:
        center: ``center(t - 1)``: a number or ``b *d``.
        spread: ``spread(t - 1)``: a variance, may be infinite (no knowledge).
        scale: factor of x.
    """

    def rule(mean: Tensor, var: Tensor, t: int) -> tuple[Tensor, Tensor]:
        v = spread(t - 1)
        total = 1 / (1 / var + scale**2 / v)
        return total * (mean / var + scale / v * center(t - 1)), total

    return rule


def by_clamp(known: Tensor, values: Callable[[int], Tensor]) -> Multiply:
    """For a delta function: where ``known`` (``*d``, bool) holds, x_{t-1} is ``values(t - 1)`` (``b *d``): inpainting.

    The paper's code takes the clean values at every step.
    """

    def rule(mean: Tensor, var: Tensor, t: int) -> tuple[Tensor, Tensor]:
        return torch.where(known, values(t - 1), mean), torch.where(known, torch.zeros_like(var), var)

    return rule
