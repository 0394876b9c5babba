"""Exact answers for kernels with heavy tails: one family from Poisson flow to diffusion.

Put a kernel of width ``sigma`` on each data point. Its shape is a multivariate Student-t law with ``D`` degrees of
freedom, the law of ``sigma g sqrt(D / chi2_D)`` with ``g`` standard Gaussian. ``D = 1`` is the Cauchy law of Poisson
flow (sigma = z), ``D = inf`` the Gaussian of diffusion, and in between lies PFGM++ (Xu et al. 2023, arXiv 2302.04265),
which writes ``r = sigma sqrt(D)``. For all of them the flow is ``dx/dsigma = (x - D(x, sigma)) / sigma`` with the
denoiser ``D(x, sigma) = E[y | x]``: ``samplers`` work unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, lgamma, log, pi

import torch
from torch import Tensor

from .core import Denoiser, expand


@dataclass(frozen=True)
class Kernel:
    """A multivariate Student-t law with ``D`` degrees of freedom; ``inf`` is the Gaussian.

    Attributes:
        D: in PFGM++ the number of added dimensions; any number of at least 1.
    """

    D: float = 1.0

    def __post_init__(self) -> None:
        if not self.D >= 1:
            raise ValueError(f"a kernel needs D >= 1 (1: Cauchy, inf: Gaussian), got {self.D}")

    def noise(self, x: Tensor) -> Tensor:
        """Draws of width 1 with the shape, device and dtype of ``x`` (``b *d``): ``g sqrt(D / chi2)``."""
        g = torch.randn_like(x)
        if inf == self.D:
            return g
        if self.D == 1:
            return g / expand(torch.randn_like(g.flatten(1)[:, 0]).abs().clamp(min=1e-20), x)
        df = torch.full((len(x),), float(self.D), device=x.device, dtype=x.dtype)
        chi2 = torch.distributions.Chi2(df, validate_args=False).sample()  # to look at df is to wait for the device
        return g * expand((self.D / chi2).sqrt(), x)

    def log_weight(self, d2: Tensor, sigma: Tensor | float, n: int) -> Tensor:
        """The log-density at squared distance ``d2``, up to a constant in ``d2``; ``n`` is the dimension of the data.

        Never forms a power: in 3072 dimensions ``d2**(-1536)`` is no floating-point number.
        """
        if inf == self.D:
            return -d2 / (2 * sigma**2)
        return -(n + self.D) / 2 * torch.log1p(d2 / (self.D * sigma**2))

    def log_prob(self, x: Tensor, sigma: float) -> Tensor:
        """The log-density at ``x`` (``b *d``) of the kernel of width ``sigma`` around 0, in nats, shape ``b``."""
        n = x[0].numel()
        constant = -n / 2 * log(2 * pi * sigma**2)
        if inf != self.D:
            ratio = lgamma((n + self.D) / 2) - lgamma(self.D / 2)
            if self.D > 1e9:  # their difference would have no digits left
                ratio = n / 2 * log(self.D / 2) + n * (n - 2) / (4 * self.D)
            constant = ratio - n / 2 * log(pi * self.D * sigma**2)
        return constant + self.log_weight(x.flatten(1).square().sum(1), sigma, n)


CAUCHY, GAUSSIAN = Kernel(1.0), Kernel(inf)


def empirical_denoiser(data: Tensor, kernel: Kernel = CAUCHY) -> Denoiser:
    """E[y | x] if ``y`` is one of ``data`` (``m *d``) and ``x`` is ``y`` plus noise from ``kernel``.

    With the Cauchy kernel ``x - E[y | x]`` is the normalized Poisson field of the data as charges on the plane z = 0
    (Xu et al. 2022, section 3.2): a mean displacement with weights ``distance**-(n + 1)``.
    """
    flat = data.flatten(1)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        y, level = flat.to(x), _level(sigma, x)[:, None]
        w = kernel.log_weight(squared_distances(x.flatten(1), y), level, y.shape[1]).softmax(1)  # b m
        with _full_precision(x):
            return (w @ y).reshape(x.shape)

    return denoise


def _level(sigma: Tensor | float, x: Tensor) -> Tensor:
    """One level, or one per sample, in the precision of ``x``: shape ``b``."""
    return torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances between ``x``: ``b n``, ``y``: ``m n``; shape ``b m``.

    By ``|x|**2 + |y|**2 - 2 x y``, which is fast and needs memory ``b m`` instead of ``b m n``. Its error is 1e-7
    (float64: 1e-16) of ``|x|**2 + |y|**2``, so both are measured from the mean of ``y``; and matrix products in
    TensorFloat-32 or under autocast, whose error is ten thousand times larger, are switched off. In float32 and up to
    16 dimensions, where neighbors can be very close, the differences are formed.
    """
    if x.shape[1] <= 16 and x.dtype != torch.float64:
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    center = y.mean(0)
    x, y = x - center, y - center
    with _full_precision(x):
        squares = x.square().sum(1, keepdim=True) + y.square().sum(1)
        return torch.addmm(squares, x, y.T, alpha=-2).clamp(min=0)


@contextmanager
def _full_precision(x: Tensor) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class CauchyMixture:
    """A mixture of Cauchy laws, whose Poisson field is that of point charges below the plane: everything is exact.

    The kernel of Poisson flow is a Cauchy law too, and widths of Cauchy laws add: at height ``z`` component k has the
    scale ``scale_k + z``. Seen from above, it is one point charge at ``(mean_k, -scale_k)``: the method of images.

    Attributes:
        means: ``k *d``.
        scale: ``k``, positive.
        weights: ``k``, positive, with sum 1.
    """

    means: Tensor
    scale: Tensor
    weights: Tensor

    @classmethod
    def of(cls, means: Tensor, scale: float, weights: Tensor | None = None) -> CauchyMixture:
        """Components of one scale, equally likely by default.

        Raises:
            ValueError: if the scale is not positive.
        """
        if not scale > 0:
            raise ValueError(f"a Cauchy law needs a positive scale, got {scale}")
        w = torch.ones(len(means), dtype=means.dtype) if weights is None else weights.to(means)
        return cls(means, torch.full((len(means),), float(scale), dtype=means.dtype), w / w.sum())

    def sample(self, n: int) -> Tensor:
        """``n`` samples, ``n *d``, from torch's global random state."""
        k = torch.multinomial(self.weights, n, replacement=True)
        return self.means[k] + expand(self.scale[k], self.means[k]) * CAUCHY.noise(self.means[k])

    def log_prob(self, x: Tensor, z: Tensor | float = 0.0) -> Tensor:
        """Log-density of y + z * Cauchy noise at ``x`` (``b *d``), in nats, shape ``b``."""
        n = x[0].numel()
        constant = lgamma((n + 1) / 2) - (n + 1) / 2 * log(pi)
        return self._joint(x, z).logsumexp(1) + constant

    def velocity(self, x: Tensor, z: Tensor | float) -> Tensor:
        """dx/dz = E_x / E_z along the field lines, ``b *d``: each image charge pushes along its own ray."""
        w = self._joint(x, z).softmax(1) / self._width(x, z)  # b k
        flat = x.flatten(1)
        return (w.sum(1, keepdim=True) * flat - w @ self.means.to(x).flatten(1)).reshape(x.shape)

    def denoiser(self, x: Tensor, z: Tensor | float) -> Tensor:
        """E[y | y + z * Cauchy noise = x], ``b *d``: ``x - z dx/dz``."""
        level = _level(z, x)
        return x - expand(level, x) * self.velocity(x, level)

    def _width(self, x: Tensor, z: Tensor | float) -> Tensor:
        return self.scale.to(x)[None] + _level(z, x)[:, None]

    def _joint(self, x: Tensor, z: Tensor | float) -> Tensor:
        """log(w_k p(x | k)) without the constant, ``b k``: w_k width / (|x - mean_k|**2 + width**2)**((n + 1) / 2)."""
        width, n = self._width(x, z), x[0].numel()
        rho2 = squared_distances(x.flatten(1), self.means.to(x).flatten(1)) + width**2
        return self.weights.to(x).log() + width.log() - (n + 1) / 2 * rho2.log()
