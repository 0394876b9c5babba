"""Laws of data whose noisy density, score and denoiser are known exactly: the book's toys and its oracles.

Every law is a mixture of round Gaussians. Add noise of level sigma, and each component only becomes wider, so density,
score and denoiser have closed forms at every level. A finite data set is the special case of components of width zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log, pi, sqrt

import torch
from torch import Tensor

from .core import expand


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians N(mean_k, std_k**2 I) with weights w_k.

    Attributes:
        means: ``k *d``.
        std: ``k``; zero is allowed (a finite data set), and then noise of a positive level has to be added before
            there is a density or a score.
        weights: ``k``, positive, with sum 1.
    """

    means: Tensor
    std: Tensor
    weights: Tensor

    @classmethod
    def of(cls, means: Tensor, std: float = 0.0, weights: Tensor | None = None) -> Mixture:
        """Components of one width, equally likely by default; ``Mixture.of(data)`` is the law of a finite data set."""
        k = len(means)
        w = torch.full((k,), 1 / k, dtype=means.dtype) if weights is None else weights.to(means)
        return cls(means, torch.full((k,), float(std), dtype=means.dtype), w / w.sum())

    def sample(self, n: int) -> Tensor:
        """``n`` samples, ``n *d``, from torch's global random state."""
        k = torch.multinomial(self.weights, n, replacement=True)
        noise = torch.randn(n, *self.means.shape[1:], dtype=self.means.dtype)
        return self.means[k] + expand(self.std[k], noise) * noise

    def log_prob(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """Log-density of x_0 + sigma * noise at ``x`` (``b *d``), in nats, shape ``b``."""
        return self._joint(x, sigma).logsumexp(1)

    def responsibilities(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """p(k | x), shape ``b k``."""
        return self._joint(x, sigma).softmax(1)

    def denoiser(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_0 + sigma * noise = x], ``b *d``: each component pulls ``x`` toward its mean, by p(k | x)."""
        level = torch.as_tensor(sigma).to(x).expand(len(x))
        w = self.responsibilities(x, level)  # b k
        var = self.std.to(x)[None] ** 2
        keep = var / (var + level[:, None] ** 2)  # b k
        means = self.means.to(x).flatten(1)
        return (w * keep).sum(1, keepdim=True).mul(x.flatten(1)).add((w * (1 - keep)) @ means).reshape(x.shape)

    def moments(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each coordinate of x_0 given x_0 + sigma * noise = x, ``b *d`` both."""
        level = torch.as_tensor(sigma).to(x).expand(len(x))
        flat, means, var = x.flatten(1).double(), self.means.to(x).flatten(1).double(), self.std.to(x)[None] ** 2
        w = self._joint(x, level).double().softmax(1)  # b k; in float32 its sum would be 1 only to 1e-7
        keep = (var / (var + level[:, None] ** 2)).double()
        w0, w1, w2 = w * (1 - keep), w * keep, w * (1 - keep) ** 2
        mean = w1.sum(1, keepdim=True) * flat + w0 @ means
        # E[(x_0 - x)**2], whose parts are small where the noise is, minus the square of its mean
        about = (w2 @ means**2) - 2 * flat * (w2 @ means) + w2.sum(1, keepdim=True) * flat**2
        within = w1.sum(1, keepdim=True) * level[:, None].double() ** 2
        spread = (about - (mean - flat) ** 2).clamp(min=0) + within
        return mean.to(x).reshape(x.shape), spread.to(x).reshape(x.shape)

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The gradient of ``log_prob`` in ``x``, ``b *d``, by Tweedie's formula; ``sigma`` (``b``) positive."""
        level = torch.as_tensor(sigma).to(x).expand(len(x))
        return (self.denoiser(x, level) - x) / expand(level, x) ** 2

    def _joint(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """log(w_k p(x | k)), shape ``b k``."""
        flat, means = x.flatten(1), self.means.to(x).flatten(1)
        var = self.std.to(x)[None] ** 2 + (torch.as_tensor(sigma).to(x) ** 2).reshape(-1, 1)
        d2 = torch.cdist(flat, means, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        return self.weights.to(x).log() - d2 / (2 * var) - flat.shape[1] / 2 * (2 * pi * var).log()


def standardize(means: Tensor, std: float) -> Mixture:
    """Equal components, moved to mean zero and scaled so that a coordinate has unit variance on average."""
    means = means - means.mean(0)
    scale = sqrt(float(means.square().mean()) + std**2)
    return Mixture.of((means / scale).float(), std / scale)


def two_modes() -> Mixture:
    """Two round modes on a diagonal with weights 0.2 and 0.8: which model gets the proportions right?"""
    return Mixture.of(torch.tensor([[-1.2, -1.2], [1.2, 1.2]]), 0.35, torch.tensor([0.2, 0.8]))


def eight_gaussians() -> Mixture:
    """Eight narrow modes on a circle."""
    angle = torch.arange(8, dtype=torch.float64) * (2 * pi / 8)
    return standardize(torch.stack([angle.cos(), angle.sin()], 1), 0.08)


def swiss_roll() -> Mixture:
    """One and a half turns of a spiral, uniform in arc length, slightly blurred."""
    angle = torch.linspace(1.5 * pi, 4.5 * pi, 4000, dtype=torch.float64)
    curve = torch.stack([angle * angle.cos(), angle * angle.sin()], 1)
    length = torch.cat([torch.zeros(1), (curve[1:] - curve[:-1]).norm(dim=1).cumsum(0)])
    at = torch.searchsorted(length, torch.linspace(0, float(length[-1]), 240)).clamp(max=len(curve) - 1)
    return standardize(curve[at], 0.35)


def heart() -> Mixture:
    """A filled heart, ``(x**2 + y**2 - 1)**3 <= x**2 y**3``, as 300 or so small blots on a hexagonal grid."""
    step = 0.115
    y, x = torch.meshgrid(torch.arange(-16, 17) * step * sqrt(3) / 2, torch.arange(-16, 17) * step, indexing="ij")
    x = x + (torch.arange(33) % 2)[:, None] * step / 2
    inside = (x**2 + y**2 - 1) ** 3 <= x**2 * y**3
    return standardize(torch.stack([x[inside], y[inside]], 1).double(), step / 2)


LAWS: dict[str, Callable[[], Mixture]] = {
    "two_modes": two_modes,
    "eight_gaussians": eight_gaussians,
    "swiss_roll": swiss_roll,
    "heart": heart,
}
"""The 2-D toys by name, as the command line knows them."""


def gaussian(d: int, std: float = 1.0) -> Mixture:
    """N(0, std**2 I) in ``d`` dimensions."""
    return Mixture.of(torch.zeros(1, d), std)


def entropy(law: Mixture, n: int = 100_000) -> float:
    """Differential entropy in nats, by Monte Carlo with ``n`` samples (exact formula for one component)."""
    if len(law.means) == 1:
        d = law.means[0].numel()
        return d / 2 * log(2 * pi * torch.e) + d * float(law.std.log())
    return -float(law.log_prob(law.sample(n)).mean())
