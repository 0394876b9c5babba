"""Denoising diffusion probabilistic models, 2020 (Ho, Jain, Abbeel, arXiv 2006.11239).

==============  =========================================================================================
``T``           number of steps; ``t = 1 .. T`` indexes the schedules, entry 0 means *no noise*
``beta``        variance added by step t; ``alpha = 1 - beta``; ``alpha_bar`` its running product
``beta_tilde``  variance of the posterior q(x_{t-1} | x_t, x_0)
``eps``         the noise in ``x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps``; what the network predicts
``sigma2``      variance of the reverse step, ``beta`` or ``beta_tilde``
``u``           the network's clock, t / T
==============  =========================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import pi
from typing import Literal

import torch
from torch import Tensor

from .bound import Bound, decoder_nll, gaussian_kl
from .chain import Chain
from .core import Denoiser, Net, at, expand


@dataclass(frozen=True)
class DDPM:
    """The method and its hyper-parameters; the defaults are the paper's (section 4).

    Attributes:
        T: number of steps.
        beta_1: first variance of the linear schedule.
        beta_T: last variance of the linear schedule. Both are made for T = 1000: with another T multiply both by
            1000 / T, else ``alpha_bar[T]`` (0.36 at T = 100) leaves signal at the end that the prior lacks.
        schedule: ``linear`` as in the paper, or ``cosine`` (Nichol and Dhariwal 2021, eq. 17).
        variance: of the reverse step: ``beta`` ("fixedlarge") or ``beta_tilde`` ("fixedsmall"), section 3.2.
        clip: keep the predicted image in [-1, 1] while sampling; ``None``: images yes, points no.
        stratified: spread the steps t of a batch evenly over 1 .. T, so that the mean of the loss jumps less
            (Kingma et al. 2021, arXiv 2107.00630, appendix I.1); each process and each part of ``accumulate`` spreads
            its own. Otherwise they are independent, as in Algorithm 1.
    """

    T: int = 1000
    beta_1: float = 1e-4
    beta_T: float = 0.02
    schedule: Literal["linear", "cosine"] = "linear"
    variance: Literal["beta", "beta_tilde"] = "beta"
    clip: bool | None = None
    stratified: bool = False

    def __post_init__(self) -> None:
        if self.T < 2 or not 0 < self.beta_1 <= self.beta_T < 1:
            raise ValueError(
                f"DDPM needs T >= 2 and 0 < beta_1 <= beta_T < 1, got {self.T}, {self.beta_1}, {self.beta_T}"
            )
        if self.schedule not in ("linear", "cosine") or self.variance not in ("beta", "beta_tilde"):
            raise ValueError(
                "DDPM needs a schedule linear or cosine, and a variance beta or beta_tilde, "
                f"got {self.schedule!r} and {self.variance!r}"
            )

    # The schedules: float64, shape T + 1, index t, entry 0 = no noise.

    @cached_property
    def beta(self) -> Tensor:
        """beta_t, shape ``T + 1``."""
        if self.schedule == "linear":
            steps = torch.linspace(self.beta_1, self.beta_T, self.T, dtype=torch.float64)
        else:
            u = torch.linspace(0, 1, self.T + 1, dtype=torch.float64)
            f = ((u + 0.008) / 1.008 * pi / 2).cos().square()
            steps = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        return torch.cat([steps.new_zeros(1), steps])

    @cached_property
    def alpha(self) -> Tensor:
        """alpha_t = 1 - beta_t, shape ``T + 1``."""
        return 1 - self.beta

    @cached_property
    def chain(self) -> Chain:
        """The forward process with these rates, that of 2015, and its closed forms."""
        return Chain(self.beta)

    @property
    def alpha_bar(self) -> Tensor:
        """The product of alpha_1 .. alpha_t, shape ``T + 1``."""
        return self.chain.alpha_bar

    @property
    def beta_tilde(self) -> Tensor:
        """The posterior variance of eq. 7, shape ``T + 1``; entry 1 is 0."""
        return self.chain.beta_tilde

    @cached_property
    def sigma2(self) -> Tensor:
        """Variance of the reverse step, shape ``T + 1``; entry 1, for the decoder, is beta_tilde_2 as in the code."""
        s = (self.beta if self.variance == "beta" else self.beta_tilde).clone()
        s[1] = self.beta_tilde[2]
        return s

    @property
    def sigma(self) -> Tensor:
        """Noise level sqrt((1 - alpha_bar) / alpha_bar) of x_t / sqrt(alpha_bar), shape ``T + 1``, increasing."""
        return self.chain.sigma

    # Forward

    def perturb(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, eq. 4: ``x0``, ``eps``: ``b *d``, ``t``: ``b``."""
        return self.chain.perturb(x0, t, eps)

    def posterior(self, x_t: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (``b *d``) and variance (``b``, shaped to broadcast) of q(x_{t-1} | x_t, x_0), eqs. 6 and 7."""
        return self.chain.posterior(x_t, x0, t)

    # Network

    def out_channels(self, c: int) -> int:
        """The network predicts eps: as many channels as the data."""
        return c

    def clock(self, t: Tensor) -> Tensor:
        """U = t / T, shape ``b``."""
        return t / self.T

    def predict_x0(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The image that ``eps`` implies, eq. 15, clipped if asked; ``b *d``."""
        x0 = (x_t - at(self.chain.noise, t, x_t) * eps) / at(self.chain.signal, t, x_t)
        return self._clip(x0)

    def times(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        """``n`` steps, each uniform in 1 .. T; those of one batch independent, or spread evenly if ``stratified``."""
        if not self.stratified:
            return torch.randint(1, self.T + 1, (n,), device=device)
        u = (torch.rand((), device=device) + torch.arange(n, device=device) / n) % 1
        return 1 + (self.T * u).long().clamp(max=self.T - 1)

    def loss(self, net: Net, x: Tensor) -> Tensor:
        """Algorithm 1: L_simple, eq. 14. ``x``: ``b *d``; returns ``b``."""
        t = self.times(len(x), x.device)
        eps = torch.randn_like(x)
        return (eps - net(self.perturb(x, t, eps), self.clock(t))).square().flatten(1).mean(1)

    # Reverse

    def prior(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """x_T ~ N(0, I)."""
        return torch.randn(*shape, device=device)

    def reverse(self, net: Net, x: Tensor) -> Iterator[Tensor]:
        """Algorithm 2, written with the posterior (eq. 11): yields x_{T-1}, ..., x_0, each ``b *d``."""
        for step in range(self.T, 0, -1):
            t = torch.full((len(x),), step, device=x.device)
            mean, _ = self.posterior(x, self.predict_x0(x, t, net(x, self.clock(t))), t)
            x = mean + at(self.sigma2, t, x).sqrt() * torch.randn_like(x) if step > 1 else mean
            yield x

    def denoiser(self, net: Net) -> Denoiser:
        """The network as an estimate of x_0 given ``x = x_0 + sigma noise`` (``x = x_t / sqrt(alpha_bar)``).

        Between the levels of the schedule the clock is interpolated in log sigma.
        """

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            scale = expand((1 + sigma**2).rsqrt(), x)
            eps = net(x * scale, self.clock(self.time(sigma)))
            return self._clip(x - expand(sigma, x) * eps)

        return denoise

    def oracle(self, denoiser: Denoiser) -> Net:
        """The way back: a denoiser, for example an exact one, in the place of the network that predicts eps.

        It knows the levels of the schedule only: the clock is rounded to a whole t.
        """

        def net(x_t: Tensor, u: Tensor) -> Tensor:
            t = (u * self.T).round().long()
            x, sigma = x_t / at(self.chain.signal, t, x_t), at(self.sigma, t, x_t)
            return (x - denoiser(x, sigma.flatten())) / sigma

        return net

    def time(self, sigma: Tensor) -> Tensor:
        """The (fractional) t at which the noise level is ``sigma`` (``b``), between 1 and T."""
        table = self.sigma[1:].log().to(sigma.device)
        s = sigma.double().log().clamp(float(table[0]), float(table[-1]))
        right = torch.searchsorted(table, s).clamp(1, self.T - 1)
        left = right - 1
        return (right + (s - table[left]) / (table[right] - table[left])).to(sigma.dtype)

    def sigmas(self, steps: int, spacing: Literal["uniform", "quadratic"] = "uniform") -> Tensor:
        """Noise levels for ``samplers.ddim`` and friends: ``steps`` values of t from T down, then 0; float64.

        ``uniform`` takes t = T i / steps, ``quadratic`` t = T (i / steps)**2 (Song, Meng, Ermon 2021, appendix D.2);
        equal t are taken once.

        Raises:
            ValueError: if ``steps`` is not between 1 and T, or there is no such ``spacing``.
        """
        if spacing not in ("uniform", "quadratic"):
            raise ValueError(f"unknown spacing {spacing!r}: use uniform or quadratic")
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps must be between 1 and T = {self.T}, got {steps}")
        i = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        t = (self.T * (i if spacing == "uniform" else i**2)).round().long().clamp(min=1).unique()
        return torch.cat([self.sigma[t].flip(0), self.sigma[:1]])

    def start(self, shape: Sequence[int], sigma: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Prior noise in the coordinates of ``denoiser``, at level ``sigma``: N(0, 1 + sigma**2)."""
        return self.prior(shape, device) * float((1 + sigma**2).sqrt())

    def _clip(self, x0: Tensor) -> Tensor:
        clip = x0.ndim == 4 if self.clip is None else self.clip
        return x0.clamp(-1, 1) if clip else x0

    # The bound

    def term(self, net: Net, x0: Tensor, t: Tensor, bins: int = 256) -> tuple[Tensor, Tensor]:
        """One term of eq. 5 in nats per sample (``b``), and the mean squared error of the predicted x_0 (``b``).

        For t > 1 this is L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), for t = 1 the decoder's L_0. ``t``
        has shape ``b`` and may mix the two.
        """
        x_t = self.perturb(x0, t, torch.randn_like(x0))
        x0_hat = self.predict_x0(x_t, t, net(x_t, self.clock(t)))
        mean, _ = self.posterior(x_t, x0_hat, t)
        target, var = self.posterior(x_t, x0, t)
        s2 = at(self.sigma2, t, x_t)
        kl = gaussian_kl(target, var, mean, s2)
        value = torch.where(expand(t == 1, x0), decoder_nll(x0, mean, s2.sqrt(), bins), kl)
        return value.flatten(1).sum(1), (x0 - x0_hat).square().flatten(1).mean(1)

    def prior_kl(self, x0: Tensor) -> Tensor:
        """L_T = KL(q(x_T | x_0) || N(0, I)) in nats, shape ``b``."""
        return self.chain.prior_kl(x0)

    @torch.no_grad()
    def bound(self, net: Net, x0: Tensor, bins: int = 256) -> Bound:
        """Every term of the variational bound (eq. 5) for a batch ``x0`` (``b *d``): ``T`` calls of the network."""
        pairs = [self.term(net, x0, torch.full((len(x0),), t, device=x0.device), bins) for t in range(1, self.T + 1)]
        terms, mse = (torch.stack(p) for p in zip(*pairs, strict=True))
        return Bound(terms, mse, self.prior_kl(x0), x0[0].numel())
