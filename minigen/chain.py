"""The Gaussian diffusion of 2015 as a chain: schedules, closed forms, the step back, the divergence of one step.

DDPM keeps this forward process, with its own schedule: both methods take the closed forms from here.

Source: Sohl-Dickstein, Weiss, Maheswaranathan, Ganguli 2015 (arXiv 1503.03585), sections 2.1 to 2.4 and appendix D.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import e, log, pi

import torch
from torch import Tensor

from .bound import gaussian_kl
from .core import Net, at


def fraction(T: int, beta_1: float) -> Tensor:
    """The schedule beta_t = 1 / (T - t + 2), entry 0 is 0, shape ``T + 1``; beta_1 is set apart.

    After the first step each one erases (1 - beta_1) / T of the first signal's variance, and as much is left at the end
    (section 2.4.1). The released code's 1 / linspace(T, 2, T) agrees to a relative 1 / T, apart from 0.001 that it adds
    to beta_1.
    """
    beta = 1 / torch.arange(T + 2, 1, -1, dtype=torch.float64)
    beta[0], beta[1] = 0, beta_1
    return beta


def geometric(T: int, beta_1: float, alpha_bar_T: float) -> Tensor:
    """The schedule whose noise variance 1 - alpha_bar_t grows by one factor per step; entry 0 is 0, shape ``T + 1``."""
    w = torch.linspace(0, 1, T, dtype=torch.float64)
    keep = 1 - beta_1 ** (1 - w) * (1 - alpha_bar_T) ** w
    return torch.cat([w[:1], 1 - keep / torch.cat([keep.new_ones(1), keep[:-1]])])


@dataclass(frozen=True)
class Chain:
    """The forward process of any schedule, and its closed forms; gradients may flow through ``beta``.

    Attributes:
        beta: ``T + 1``, float64; entry 0 is 0.
    """

    beta: Tensor

    @cached_property
    def alpha_bar(self) -> Tensor:
        """The share of the data's variance left after t steps, shape ``T + 1``."""
        return (1 - self.beta).cumprod(0)

    @cached_property
    def signal(self) -> Tensor:
        """The factor sqrt(alpha_bar_t) of x_0 in x_t, shape ``T + 1``."""
        return self.alpha_bar.sqrt()

    @cached_property
    def noise(self) -> Tensor:
        """The factor sqrt(1 - alpha_bar_t) of the noise in x_t, shape ``T + 1``."""
        return (1 - self.alpha_bar).sqrt()

    @cached_property
    def beta_tilde(self) -> Tensor:
        """The variance of q(x_{t-1} | x_t, x_0), shape ``T + 1``; entry 1 is 0."""
        later = self.beta[1:] * (1 - self.alpha_bar[:-1]) / (1 - self.alpha_bar[1:])
        return torch.cat([self.beta[:1], later])

    @cached_property
    def sigma(self) -> Tensor:
        """Noise level sqrt((1 - alpha_bar) / alpha_bar) of x_t / sqrt(alpha_bar), shape ``T + 1``, increasing."""
        return ((1 - self.alpha_bar) / self.alpha_bar).sqrt()

    def perturb(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t from x_0 in one leap: ``x0``, ``noise``: ``b *d``, ``t``: ``b``."""
        return at(self.signal, t, x0) * x0 + at(self.noise, t, x0) * noise

    def posterior(self, x_t: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (``b *d``) and variance (to broadcast) of q(x_{t-1} | x_t, x_0): the product of two Gaussians."""
        on_x0, on_xt = self.weights
        return at(on_x0, t, x_t) * x0 + at(on_xt, t, x_t) * x_t, at(self.beta_tilde, t, x_t)

    @cached_property
    def weights(self) -> tuple[Tensor, Tensor]:
        """The factors of x_0 and of x_t in the mean of the posterior, shape ``T + 1`` each; entry 0 is 0."""
        prev, rest = self.alpha_bar[:-1], 1 - self.alpha_bar[1:]
        on_x0 = prev.sqrt() * self.beta[1:] / rest
        on_xt = (1 - self.beta[1:]).sqrt() * (1 - prev) / rest
        return torch.cat([self.beta[:1], on_x0]), torch.cat([self.beta[:1], on_xt])

    def prior_kl(self, x0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, I)) in nats for ``x0`` (``b *d``), shape ``b``."""
        a, x = self.alpha_bar[-1].to(x0.device), x0.double()
        kl = gaussian_kl(a.sqrt() * x, 1 - a, torch.zeros_like(x), torch.ones_like(a))
        return kl.flatten(1).sum(1).to(x0.dtype)

    def back(self, out: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (``b *d`` each) of p(x_{t-1} | x_t), the forward kernel perturbed by the network.

        Sigma = sigmoid(z_S + logit beta_t), eq. 64; mean = sqrt(1 - beta_t) x_t + sqrt(beta_t) z_mu, as the released
        code has it. ``out`` (``b 2c ...``) holds z_mu and z_S; zeros give the forward kernel.
        """
        z_mu, z_s = out.chunk(2, dim=1)
        beta = at(self.beta, t, x_t)
        return (1 - beta).sqrt() * x_t + beta.sqrt() * z_mu, torch.sigmoid(z_s + beta.logit())

    def kl(self, net: Net, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in nats, ``b``, at ``t`` >= 2 (``b``): a term of eq. 14."""
        x_t = self.perturb(x0, t, noise)
        mean, var = self.back(net(x_t, t / (len(self.beta) - 1)), x_t, t)
        return gaussian_kl(*self.posterior(x_t, x0, t), mean, var).flatten(1).sum(1)

    def entropies(self) -> dict[str, float]:
        """The entropies of eq. 14 in nats per dimension: H_q(X_T | X_0), H_q(X_1 | X_0) and H_p(X_T)."""
        gaussian = {"X_T|X_0": 1 - self.alpha_bar[-1], "X_1|X_0": self.beta[1], "X_T": torch.ones(1)}
        return {name: 0.5 * log(2 * pi * e * float(var)) for name, var in gaussian.items()}

    def entropy_bounds(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bound on H_q(X_{t-1} | X_t), eq. 24, for t = 2 .. T, in nats per dimension, ``T - 1``.

        The upper one needs data of unit variance. They are the entropies of Gaussians of variance beta_tilde and beta.
        """
        return tuple(0.5 * (2 * pi * e * var[2:]).log() for var in (self.beta_tilde, self.beta))
