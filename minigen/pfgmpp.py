"""PFGM++, 2023 (Xu, Liu, Tian, Tong, Tegmark, Jaakkola, arXiv 2302.04265): from Poisson flow to diffusion.

============  ===========================================================================================
``D``         the number of added dimensions: 1 is Poisson flow, infinity is diffusion
``r``         their radius, ``r = sigma sqrt(D)``
``sigma``     the noise level in the units of diffusion; the network's clock is log sigma
``F``         the raw network; the denoiser is ``c_skip x + c_out F(c_in x)`` (Karras et al. 2022, table 1)
============  ===========================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, log

import torch
from torch import Tensor

from .core import Denoiser, Net, expand
from .fields import Kernel
from .samplers import heun, karras, probability_flow


@dataclass(frozen=True)
class PFGMPP:
    """The method and its hyper-parameters; the defaults are the paper's for CIFAR-10, with the settings of EDM.

    Attributes:
        D: added dimensions, from 1 to ``inf``.
        sigma_min: smallest noise level of the sampler.
        sigma_max: largest noise level.
        rho: exponent of the sampler's grid.
        sigma_data: standard deviation of a coordinate of the data.
        P_mean: mean of log sigma in training.
        P_std: its standard deviation.
        levels: noise levels of the sampler; each step asks the network twice, the last one once.
    """

    D: float = 2048.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5
    P_mean: float = -1.2
    P_std: float = 1.2
    levels: int = 18

    def __post_init__(self) -> None:
        if not self.D >= 1:
            raise ValueError(f"PFGM++ needs D >= 1 (1: Poisson flow, inf: diffusion), got {self.D}")
        if not 0 < self.sigma_min < self.sigma_max < inf or min(self.rho, self.sigma_data, self.P_std) <= 0:
            raise ValueError("PFGM++ needs 0 < sigma_min < sigma_max, and positive rho, sigma_data and P_std")
        if self.levels < 1:
            raise ValueError(f"levels must be at least 1, got {self.levels}")

    @classmethod
    def for_data(cls, shape: Sequence[int]) -> PFGMPP:
        """Defaults for samples of the given shape: points have coordinates of variance 1, images about 0.25."""
        return cls(sigma_data=1.0, P_mean=-0.5) if len(shape) == 1 else cls()

    @property
    def kernel(self) -> Kernel:
        """The law of the noise: Student-t with ``D`` degrees of freedom."""
        return Kernel(self.D)

    # Network

    def out_channels(self, c: int) -> int:
        """The network predicts a part of the denoised sample: as many channels as the data."""
        return c

    def clock(self, sigma: Tensor) -> Tensor:
        """U = log(sigma / sigma_min) / log(sigma_max / sigma_min), within [0, 1], shape ``b``."""
        return (sigma / self.sigma_min).log().div(log(self.sigma_max / self.sigma_min)).clamp(0.0, 1.0)

    def denoiser(self, net: Net) -> Denoiser:
        """E[y | x, sigma] from the network: what the noise left is kept, what it covered is predicted."""

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            s, d = expand(sigma, x), self.sigma_data
            c_skip = d**2 / (s**2 + d**2)
            c_out = s * d * (s**2 + d**2).rsqrt()
            c_in = (s**2 + d**2).rsqrt()
            return c_skip * x + c_out * net(c_in * x, self.clock(sigma))

        return denoise

    def loss(self, net: Net, x: Tensor) -> Tensor:
        """Section 3.2: the squared error of the denoiser, weighted as in EDM, shape ``b``.

        For many added dimensions the weight makes it the error of F, with targets of variance 1. For few, the tails
        of the kernel enlarge the targets, and for ``D <= 2`` their variance is infinite: train with ``D > 2``. For
        ``D = 1`` ``PFGM`` has a preconditioning of its own.
        """
        sigma = (self.P_mean + self.P_std * torch.randn(len(x), device=x.device)).exp()
        noisy = x + expand(sigma, x) * self.kernel.noise(x)
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        return weight * (self.denoiser(net)(noisy, sigma) - x).square().flatten(1).mean(1)

    # Reverse

    def prior(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """The kernel of width ``sigma_max`` around 0."""
        return self.start(shape, torch.tensor(self.sigma_max), device)

    def start(self, shape: Sequence[int], sigma: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Prior noise at level ``sigma``, ``b *d``."""
        return self.kernel.noise(torch.empty(*shape, device=device)) * float(sigma)

    def reverse(self, net: Net, x: Tensor) -> Iterator[Tensor]:
        """Heun's method on dx/dsigma = (x - D(x, sigma)) / sigma: yields the state after each step, ``b *d``."""
        yield from heun(probability_flow(self.denoiser(net)), x, self.sigmas(self.levels))

    def sigmas(self, steps: int) -> Tensor:
        """Noise levels for the samplers: ``steps`` of them from sigma_max to sigma_min, then 0; float64."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return karras(self.sigma_max, self.sigma_min, steps, self.rho)

    def oracle(self, denoiser: Denoiser) -> Net:
        """The way back: an exact denoiser in the place of the network F, read in float64."""

        def net(x_in: Tensor, u: Tensor) -> Tensor:
            sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** u.double()
            s, d = expand(sigma, x_in), self.sigma_data
            x = x_in.double() * (s**2 + d**2).sqrt()
            F = (denoiser(x, sigma) - d**2 / (s**2 + d**2) * x) * (s**2 + d**2).sqrt() / (s * d)
            return F.to(x_in)

        return net
