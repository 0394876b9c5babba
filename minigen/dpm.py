"""Diffusion probabilistic models, 2015, Gaussian kernels (Sohl-Dickstein, Weiss, Maheswaranathan, Ganguli, 1503.03585).

==============  =========================================================================================
``T``           number of steps; ``t = 1 .. T`` indexes the schedule, entry 0 means *no noise*
``beta``        variance added by step t (the diffusion rate); ``alpha = 1 - beta``, ``alpha_bar`` its product
``pi``          the equilibrium N(0, I), which every step leaves as it is
``q``, ``p``    the forward process, fixed, and the reverse process, learned
``z_mu, z_S``   what the network gives: how far a step back is from the forward kernel; 2c channels
``K``           the paper's lower bound on the mean of log p(x_0), in nats here (divide by log 2 for bits)
``u``           the network's clock, t / T
==============  =========================================================================================

The bits of section 2.1's other process, the binomial one, are in ``minigen.binary``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log, pi
from typing import Literal

import torch
from torch import Tensor

from .bound import Bound, decoder_nll
from .chain import Chain, fraction, geometric
from .core import Denoiser, Net, at, expand
from .multiply import Multiply


@dataclass(frozen=True)
class DPM:
    """The method and its hyper-parameters.

    Attributes:
        T: number of steps.
        beta_1: the first diffusion rate, fixed in the paper "to prevent overfitting"; it sets the scale of K.
        schedule: of the other steps: ``fraction`` erases an equal part of the first signal's variance in each (section
            2.4.1), ``geometric`` lets the noise variance grow by one factor.
        alpha_bar_T: what ``geometric`` leaves of the data's variance.
        betas: a schedule of your own, t = 1 .. T, for example a learned one; replaces the fields above.
    """

    T: int = 1000
    beta_1: float = 1e-3
    schedule: Literal["fraction", "geometric"] = "fraction"
    alpha_bar_T: float = 1e-3
    betas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.T < 2 or not 0 < self.beta_1 < 1 - self.alpha_bar_T < 1:
            raise ValueError(
                "DPM needs T >= 2 and 0 < beta_1 < 1 - alpha_bar_T < 1, "
                f"got {self.T}, {self.beta_1} and {self.alpha_bar_T}"
            )
        if self.betas and (len(self.betas) != self.T or not all(0 < b < 1 for b in self.betas)):
            raise ValueError(f"betas must be T = {self.T} numbers between 0 and 1, got {len(self.betas)} of them")

        if self.schedule not in ("fraction", "geometric"):
            raise ValueError(f"DPM needs a schedule fraction or geometric, got {self.schedule!r}")
        if self.chain.beta.detach().float().max() >= 1:
            raise ValueError("the last rate of the schedule rounds to 1 in float32: give a larger alpha_bar_T")

    @cached_property
    def chain(self) -> Chain:
        """The forward process with this schedule."""
        if self.betas:
            return Chain(torch.tensor([0.0, *self.betas], dtype=torch.float64))
        if self.schedule == "fraction":
            return Chain(fraction(self.T, self.beta_1))
        return Chain(geometric(self.T, self.beta_1, self.alpha_bar_T))

    @property
    def sigma(self) -> Tensor:
        """Noise level of x_t / sqrt(alpha_bar), shape ``T + 1``, increasing."""
        return self.chain.sigma

    # Network

    def out_channels(self, c: int) -> int:
        """Mean and variance of the step back: twice the channels of the data."""
        return 2 * c

    def loss(self, net: Net, x: Tensor) -> Tensor:
        """The part of -K that the network can change, by one random t in 2 .. T; nats per dimension, shape ``b``.

        There are T - 1 such terms. (The released code multiplies by T, and draws one t for the whole batch.)
        """
        t = torch.randint(2, self.T + 1, (len(x),), device=x.device)
        return (self.T - 1) * self.chain.kl(net, x, t, torch.randn_like(x)) / x[0].numel()

    # Reverse

    def prior(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """x_T ~ pi = N(0, I)."""
        return torch.randn(*shape, device=device)

    def step_back(self, net: Net, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Mean and variance (``b *d``) of p(x_{t-1} | x_t = x); t = 1 is fixed to the forward kernel (appendix B)."""
        steps = torch.full((len(x),), t, device=x.device)
        out = net(x, steps / self.T) if t > 1 else torch.zeros_like(torch.cat([x, x], 1))
        return self.chain.back(out, x, steps)

    def reverse(self, net: Net, x: Tensor, multiply: Multiply | None = None) -> Iterator[Tensor]:
        """Draw x_{T-1}, ..., x_0 from the reverse process, each ``b *d``.

        The last step, p(x_0 | x_1), is drawn too: the bound is about this x_0. (The released sampler stops at x_1.)

        Args:
            net: ``(x: b *d, u: b) -> b 2c ...``.
            x: x_T.
            multiply: a second distribution by which each step is multiplied: ``by_slope``, ``by_gaussian``,
                ``by_clamp``, or your own.
        """
        for t in range(self.T, 0, -1):
            mean, var = self.step_back(net, x, t)
            mean, var = multiply(mean, var, t) if multiply else (mean, var)
            x = mean + var.sqrt() * torch.randn_like(x)
            yield x

    def denoiser(self, net: Net) -> Denoiser:
        """The step back read as an estimate of x_0, given ``x = x_0 + sigma noise``, at the schedule's levels t >= 2.

        The mean of q(x_{t-1} | x_t, x_0) is linear in x_0, so the learned mean of x_{t-1} is a guess of x_0.
        """

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            t = self.time(sigma)
            x_t = x * expand((1 + sigma**2).rsqrt(), x)
            mean, _ = self.chain.back(net(x_t, t / self.T), x_t, t)
            on_x0, on_xt = self.chain.weights
            x0 = (mean - at(on_xt, t, x) * x_t) / at(on_x0, t, x)
            return x0.clamp(-1, 1) if x.ndim == 4 else x0

        return denoise

    def oracle(self, moments: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Net:
        """The exact mean and variance of x_0 (``laws.Mixture.moments``) in the place of the network, at t >= 2.

        Its step back has the mean and the variance, per coordinate, of the true q(x_{t-1} | x_t); variances above 1,
        which the sigmoid of eq. 64 cannot reach, are capped.
        """

        def net(x_t: Tensor, u: Tensor) -> Tensor:
            t = (u * self.T).round().long()
            beta, bar = at(self.chain.beta, t, x_t), at(self.chain.alpha_bar, t, x_t)
            x0, spread = moments(x_t / bar.sqrt(), at(self.sigma, t, x_t).flatten())
            mean, var = self.chain.posterior(x_t, x0, t)
            var = var + at(self.chain.weights[0], t, x_t) ** 2 * spread
            z_mu = (mean - (1 - beta).sqrt() * x_t) / beta.sqrt()
            return torch.cat([z_mu, var.clamp(max=1 - 1e-6).logit() - beta.logit()], dim=1)

        return net

    def time(self, sigma: Tensor) -> Tensor:
        """The step t in 2 .. T whose noise level is nearest to ``sigma`` (``b``), on a logarithmic scale; integers."""
        table = self.sigma[2:].log().to(sigma.device)
        return (sigma.double().log()[:, None] - table).abs().argmin(1) + 2

    def sigmas(self, steps: int) -> Tensor:
        """Noise levels for ``samplers.ddim`` and friends: ``steps`` values of t from T down to 2, then 0; float64.

        Equal t are taken once: there are T - 1 of them.

        Raises:
            ValueError: if ``steps`` is not between 1 and T.
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps must be between 1 and T = {self.T}, got {steps}")
        t = torch.linspace(self.T, 2, steps, dtype=torch.float64).round().long().unique().flip(0)
        return torch.cat([self.sigma[t], self.sigma[:1]])

    def start(self, shape: Sequence[int], sigma: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Prior noise in the coordinates of ``denoiser``, at level ``sigma``: N(0, 1 + sigma**2)."""
        return self.prior(shape, device) * float((1 + sigma**2).sqrt())

    # The bound

    def terms(self, net: Net, x0: Tensor) -> Tensor:
        """The divergences of eq. 14 in nats, ``T - 1 b``: row k belongs to t = k + 2. Calls the network T - 1 times."""
        steps = (torch.full((len(x0),), t, device=x0.device) for t in range(2, self.T + 1))
        with torch.no_grad():
            return torch.stack([self.chain.kl(net, x0, t, torch.randn_like(x0)) for t in steps])

    def K(self, net: Net, x0: Tensor) -> Tensor:
        """The paper's bound, eq. 14 = 51, in nats, one number per sample (``b``); its mean is K.

        Right only for data with mean square 1: two entropies stand where the data should.
        """
        h = self.chain.entropies()
        return x0[0].numel() * (h["X_T|X_0"] - h["X_1|X_0"] - h["X_T"]) - self.terms(net, x0).sum(0)

    def elbo(self, net: Net, x0: Tensor) -> Tensor:
        """The same bound on log p(x_0) without that assumption: E log p(x_0 | x_1) - sum KL - KL(q(x_T | x_0) || pi).

        Nats, shape ``b``. The mean of the first part over x_1 is taken in closed form.
        """
        return self.edge(x0) - self.terms(net, x0).sum(0) - self.prior_kl(x0)

    def edge(self, x0: Tensor) -> Tensor:
        """E log p(x_0 | x_1), nats, ``b``, with p(x_0 | x_1) = N(sqrt(1 - beta_1) x_1, beta_1 I) as in eq. 44."""
        b = float(self.chain.beta[1])
        return -0.5 * (log(2 * pi * b) + 1 - b + b * x0.square()).flatten(1).sum(1)

    def prior_kl(self, x0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, I)) in nats, ``b``."""
        return self.chain.prior_kl(x0)

    def null(self, x0: Tensor) -> Tensor:
        """Log pi(x_0), the log-likelihood of an isotropic Gaussian, L_null of the paper's Table 1; nats, ``b``."""
        return -0.5 * (log(2 * pi) + x0.square()).flatten(1).sum(1)

    @torch.no_grad()
    def bound(self, net: Net, x0: Tensor, bins: int = 256) -> Bound:
        """The bound as a code length for pixels of ``bins`` values, as DDPM counts it; ``x0``: ``b *d`` in [-1, 1].

        The step back is no guess of x_0 at t = 1, so ``Bound.mse`` and ``distortion`` are not measured: they are NaN.
        """
        x_1 = self.chain.perturb(x0, torch.ones(len(x0), dtype=torch.long, device=x0.device), torch.randn_like(x0))
        mean, var = self.step_back(net, x_1, 1)
        first = decoder_nll(x0, mean, var.sqrt(), bins).flatten(1).sum(1)
        terms = torch.cat([first[None], self.terms(net, x0)])
        return Bound(terms, torch.full_like(terms, float("nan")), self.prior_kl(x0), x0[0].numel())

    @torch.no_grad()
    def log_weight(self, net: Net, x0: Tensor) -> Tensor:
        """Log w of one forward path from each ``x0``, in nats, ``b``; E[w] = p(x_0), eq. 9.

        For a fixed ``x0``, log p(x_0) - log w is the work that this path dissipates.
        """
        x, log_w = x0, torch.zeros(len(x0), device=x0.device)
        for t in range(1, self.T + 1):
            beta = float(self.chain.beta[t])
            ahead = (1 - beta) ** 0.5 * x + beta**0.5 * torch.randn_like(x)
            mean, var = self.step_back(net, ahead, t)
            forward = (ahead - (1 - beta) ** 0.5 * x).square() / beta + log(beta)
            back = (x - mean).square() / var + var.log()
            log_w = log_w + 0.5 * (forward - back).flatten(1).sum(1)
            x = ahead
        return log_w + self.null(x)
