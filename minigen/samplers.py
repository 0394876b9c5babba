"""Samplers for any Gaussian model, as functions of a denoiser.

Everything here lives in one coordinate system: ``x = x_0 + sigma * noise`` (variance exploding). A denoiser
``D(x, sigma)`` estimates the mean of ``x_0``; then

* the score is ``(D - x) / sigma**2``,
* the noise is ``(x - D) / sigma``,
* the probability-flow equation is ``dx/dsigma = (x - D) / sigma``
  (Song, Sohl-Dickstein et al. 2021, arXiv 2011.13456; Karras et al. 2022, arXiv 2206.00364, eq. 1).

A model whose own state is scaled, like DDPM's ``x_t = sqrt(alpha_bar) x``, brings ``method.denoiser(net)`` and is
sampled here. Each sampler is a generator of states; the last one is the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import exp, log, pi, prod

import numpy as np
import torch
from torch import Tensor

from .core import Denoiser, expand

Velocity = Callable[[Tensor, Tensor], Tensor]
"""``velocity(x: b *d, sigma: b) -> b *d``: dx/dsigma."""


def geometric(sigma_max: float, sigma_min: float, steps: int) -> Tensor:
    """``steps`` levels, equally spaced in log sigma, then 0; shape ``steps + 1``, decreasing, float64."""
    levels = torch.linspace(log(sigma_max), log(sigma_min), steps, dtype=torch.float64).exp()
    return torch.cat([levels, levels.new_zeros(1)])


def karras(sigma_max: float, sigma_min: float, steps: int, rho: float = 7.0) -> Tensor:
    """``steps`` levels equally spaced in sigma**(1/rho), then 0; shape ``steps + 1`` (Karras et al. 2022, eq. 5)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


def probability_flow(denoiser: Denoiser) -> Velocity:
    """The velocity dx/dsigma = (x - D(x, sigma)) / sigma whose flow has the marginals of the noising process."""
    return lambda x, sigma: (x - denoiser(x, sigma)) / expand(sigma, x)


def euler(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """Euler's method along ``sigmas`` (shape ``s``, any direction), from ``x`` (``b *d``) at ``sigmas[0]``.

    Global error of order 1 in the step; one evaluation per step.
    """
    for now, new in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (new - now).to(x) * velocity(x, _level(now, x))
        yield x


def heun(velocity: Velocity, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """Heun's method along ``sigmas`` (shape ``s``, any direction), from ``x`` (``b *d``) at ``sigmas[0]``.

    Global error of order 2; two evaluations per step (Karras et al. 2022, Algorithm 1). A step that ends at 0, or below
    a sixteenth of its level, is an Euler step: the mean of two slopes multiplies a change of the denoiser by half of
    the ratio of the levels. Where that is large (1,000 in the first step of a cosine schedule) the state would explode.
    """
    for now, new in zip(sigmas[:-1], sigmas[1:], strict=True):
        d = velocity(x, _level(now, x))
        x_new = x + (new - now).to(x) * d
        if 16 * new > now:
            x_new = x + (new - now).to(x) * (d + velocity(x_new, _level(new, x))) / 2
        x = x_new
        yield x


def ddim(denoiser: Denoiser, x: Tensor, sigmas: Tensor, eta: float = 0.0) -> Iterator[Tensor]:
    """Denoising diffusion implicit models (Song, Meng, Ermon 2021, arXiv 2010.02502, eqs. 12 and 16).

    In these coordinates the step from ``sigma`` to ``sigma'`` keeps a part ``sqrt(sigma'**2 - s**2)`` of the predicted
    noise and draws the rest, ``s = eta * sigma' * sqrt(1 - sigma'**2 / sigma**2)``, anew. ``eta = 0`` is Euler's
    method on the probability flow; ``eta = 1`` is the chain of DDPM's posteriors.

    Args:
        denoiser: ``(x: b *d, sigma: b) -> b *d``.
        x: ``b *d``, at level ``sigmas[0]``.
        sigmas: ``s`` decreasing levels, the last one 0.
        eta: the share of fresh noise, 0 to 1.

    Yields:
        The state after each step, ``b *d``.
    """
    for now, new in zip(sigmas[:-1], sigmas[1:], strict=True):
        x0 = denoiser(x, _level(now, x))
        eps = (x - x0) / now.to(x)
        s = eta * new * (1 - (new / now) ** 2).clamp(min=0).sqrt()
        x = x0 + (new**2 - s**2).clamp(min=0).sqrt().to(x) * eps
        if s > 0:
            x = x + s.to(x) * torch.randn_like(x)
        yield x


def langevin(denoiser: Denoiser, x: Tensor, sigma: float, step: float, n: int) -> Iterator[Tensor]:
    """Unadjusted Langevin dynamics at one level: ``x + step * score + sqrt(2 step) * noise``, ``n`` times.

    For small ``step`` it samples the data law blurred with ``sigma`` (Welling and Teh 2011).
    """
    for _ in range(n):
        level = _level(torch.tensor(sigma, dtype=torch.float64), x)
        score = (denoiser(x, level) - x) / sigma**2
        x = x + step * score + (2 * step) ** 0.5 * torch.randn_like(x)
        yield x


@dataclass
class Solution:
    """The result of ``rk45``: the state ``x`` (``b *d``), the number of function evaluations, and added integrals."""

    x: Tensor
    nfe: int
    extra: Tensor = field(default_factory=lambda: torch.zeros(0))


def rk45(velocity: Velocity, x: Tensor, start: float, end: float, tol: float = 1e-5) -> Solution:
    """Dormand-Prince 4(5) from ``scipy``, in log sigma, with relative and absolute tolerance ``tol``.

    The whole batch is one system, so the number of evaluations is that of its hardest member (as in Song,
    Sohl-Dickstein et al. 2021). ``start`` and ``end`` must be positive; finish with one call of the denoiser if
    sigma = 0 is wanted.

    Raises:
        ValueError: if a level is not positive.
        RuntimeError: if the integrator gives up.
    """
    return _solve(lambda y, level: (velocity(y, level), y.new_zeros(0)), x, start, end, tol, extra=0)


def log_likelihood(
    denoiser: Denoiser,
    x0: Tensor,
    sigma_min: float,
    sigma_max: float,
    tol: float = 1e-5,
    prior: Callable[[Tensor], Tensor] | None = None,
    probes: int = 0,
    seed: int = 0,
) -> Solution:
    """Log-density of ``x0`` under the probability flow, in nats: ``extra`` of the result, shape ``b``.

    Follows ``d log p = - div v dsigma`` from ``sigma_min`` (at which ``x0`` is taken to lie) to ``sigma_max``, where
    ``prior`` gives the log-density, ``b *d`` to ``b``; by default that of ``N(0, sigma_max**2)`` (Song, Sohl-Dickstein
    et al. 2021, eq. 39).

    With ``probes = 0`` the divergence is exact: one backward pass per dimension, so for few dimensions. Otherwise it is
    estimated without bias by ``e (dv/dx) e``, the mean over ``probes`` vectors ``e`` of random signs for each sample,
    drawn with ``seed`` and kept along the path: one backward pass each (Skilling 1989, Hutchinson 1990).
    """
    flow = probability_flow(denoiser)
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (probes, *x0.shape), generator=random).to(x0) * 2 - 1

    def with_divergence(y: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            v = flow(y, level)
            return v.detach(), _divergence(v, y, signs)

    out = _solve(with_divergence, x0, sigma_min, sigma_max, tol, extra=len(x0))
    if prior is not None:
        return Solution(out.x, out.nfe, prior(out.x) + out.extra)
    d = prod(x0.shape[1:])
    log_prior = -out.x.flatten(1).square().sum(1) / (2 * sigma_max**2) - d * (log(sigma_max) + 0.5 * log(2 * pi))
    return Solution(out.x, out.nfe, log_prior + out.extra)


def _divergence(v: Tensor, y: Tensor, signs: Tensor) -> Tensor:
    """The divergence of ``v(y)``, shape ``b``: exact, or with ``signs`` (``k b *d``) their mean of e (dv/dy) e."""
    if len(signs):
        pulled = (torch.autograd.grad((v * e).sum(), y, retain_graph=True)[0] * e for e in signs)
        return sum(p.flatten(1).sum(1) for p in pulled) / len(signs)
    columns = v.flatten(1).unbind(1)
    return sum(torch.autograd.grad(c.sum(), y, retain_graph=True)[0].flatten(1)[:, i] for i, c in enumerate(columns))


def _level(sigma: Tensor, x: Tensor) -> Tensor:
    """One level, repeated for each sample of ``x``: shape ``b``."""
    return sigma.to(x).expand(len(x))


def _solve(
    rates: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    start: float,
    end: float,
    tol: float,
    extra: int,
) -> Solution:
    """Integrate the state, and ``extra`` further numbers, in log sigma with scipy's RK45 in float64."""
    from scipy.integrate import solve_ivp

    if min(start, end) <= 0:
        raise ValueError(f"rk45 works in log sigma and needs positive levels, got {start} and {end}")
    n = x.numel()

    def rhs(log_sigma: float, y: np.ndarray) -> np.ndarray:
        sigma = exp(log_sigma)
        state = torch.from_numpy(y[:n]).reshape(x.shape).to(x)
        v, e = rates(state, _level(torch.tensor(sigma, dtype=torch.float64), x))
        return (torch.cat([v.flatten(), e]).detach().double().cpu() * sigma).numpy()

    y0 = torch.cat([x.flatten(), x.new_zeros(extra)]).detach().double().cpu().numpy()
    out = solve_ivp(rhs, (log(start), log(end)), y0, method="RK45", rtol=tol, atol=tol)
    if not out.success:
        raise RuntimeError(f"rk45 stopped early: {out.message}")
    y = torch.from_numpy(out.y[:, -1].copy())
    return Solution(y[:n].reshape(x.shape).to(x), int(out.nfev), y[n:].to(x))
