"""Noise conditional score networks, 2019 (Song, Ermon, arXiv 1907.05600), with the repairs of 2020 (arXiv 2006.09011).

============  =========================================================================================
``ladder``    the noise levels ``sigma_1 > ... > sigma_L``, geometric; entry 0 is sigma_1, as in the paper
``z``         the noise in ``x = x_0 + sigma z``
``score``     s(x, sigma), the gradient of the log-density of x
``alpha``     the step of Langevin dynamics at a level, ``eps sigma**2 / sigma_L**2``: x + alpha / 2 s + sqrt(alpha) z
``F``         what the network returns: ``sigma s``, an estimate of -z
``u``         the network's clock: 1 at sigma_1, 0 at sigma_L, linear in log sigma, so also in the number of the level
============  =========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, log

import torch
from torch import Tensor

from . import ladder, samplers
from .core import Denoiser, Net, at, expand

Score = Callable[[Tensor, Tensor], Tensor]
"""``score(x: b *d, sigma: b) -> b *d``: the gradient of the log-density of x_0 + sigma * noise."""


@dataclass(frozen=True)
class NCSN:
    """The method and its hyper-parameters; the defaults are those of 2019 (section 5), for pixels in [-1, 1].

    The paper has pixels in [0, 1]: its noise levels are half of ours, its ``eps`` (2e-5) a quarter.

    Attributes:
        sigma_1: the largest noise level.
        sigma_L: the smallest noise level.
        L: number of levels.
        T: steps of Langevin dynamics per level.
        eps: the step alpha at the last level.
        denoise: end with one call of the denoiser (2020), which removes the noise of level sigma_L.
        box: sampling starts from uniform noise in [-box, box].
        sigma_data: standard deviation of a coordinate of the data; scales the network's input (Karras et al. 2022).
    """

    sigma_1: float = 2.0
    sigma_L: float = 0.02
    L: int = 10
    T: int = 100
    eps: float = 8e-5
    denoise: bool = False
    box: float = 1.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.sigma_L < self.sigma_1 < inf or self.L < 2 or self.T < 1:
            what = f"{self.sigma_1}, {self.sigma_L}, {self.L}, {self.T}"
            raise ValueError(f"NCSN needs sigma_1 > sigma_L > 0, L >= 2 and T >= 1, got {what}")
        if self.box <= 0 or self.sigma_data <= 0:
            raise ValueError(f"NCSN needs positive box and sigma_data, got {self.box} and {self.sigma_data}")
        if not 0 < self.eps < 4 * self.sigma_L**2:
            limit = 4 * self.sigma_L**2
            raise ValueError(f"Langevin steps diverge unless 0 < eps < 4 sigma_L**2 = {limit:g}, got {self.eps:g}")

    @classmethod
    def improved(
        cls,
        dims: int,
        sigma_1: float,
        sigma_L: float = 0.02,
        T: int = 5,
        sigma_data: float = 0.5,
    ) -> NCSN:
        """NCSNv2 (Song, Ermon 2020) for samples of ``dims`` numbers: Techniques 2 and 4, and the final denoising.

        ``sigma_1`` is the largest distance between two training samples (Technique 1, ``ladder.largest_distance``).
        """
        n = ladder.levels(sigma_1, sigma_L, ladder.ratio(dims))
        gamma = (sigma_1 / sigma_L) ** (1 / (n - 1))
        return cls(sigma_1, sigma_L, n, T, 2 * ladder.step_size(gamma, T, sigma_L), True, sigma_data=sigma_data)

    @classmethod
    def for_data(cls, shape: Sequence[int]) -> NCSN:
        """Defaults for data of this shape: the paper's for images; a wider ladder for points of unit variance."""
        if len(shape) > 1:
            return cls()
        return cls(sigma_1=5.0, L=20, T=50, eps=8e-5, denoise=True, box=3.0, sigma_data=1.0)

    @cached_property
    def ladder(self) -> Tensor:
        """The noise levels, float64, shape ``L``, decreasing."""
        return samplers.geometric(self.sigma_1, self.sigma_L, self.L)[:-1]

    # Network

    def out_channels(self, c: int) -> int:
        """The network predicts sigma times the score: as many channels as the data."""
        return c

    def clock(self, i: Tensor) -> Tensor:
        """The clock of level number ``i`` (``b``, from 0; may be fractional): (L - 1 - i) / (L - 1)."""
        return 1 - i / (self.L - 1)

    def scale(self, sigma: Tensor) -> Tensor:
        """What the network's input is multiplied by, so that its coordinates have variance 1."""
        return (sigma**2 + self.sigma_data**2).rsqrt()

    def loss(self, net: Net, x: Tensor) -> Tensor:
        """Eqs. 5 and 6 with lambda = sigma**2, per coordinate. ``x``: ``b *d``; returns ``b``."""
        i = torch.randint(self.L, (len(x),), device=x.device)
        z = torch.randn_like(x)
        sigma = at(self.ladder, i, x)
        F = net(self.scale(sigma) * (x + sigma * z), self.clock(i))
        return 0.5 * (F + z).square().flatten(1).mean(1)

    def score(self, net: Net) -> Score:
        """The network as a score: s = F / sigma. Between two levels F is interpolated, in log sigma, by two calls."""

        def score(x: Tensor, sigma: Tensor) -> Tensor:
            i = self.index(sigma)
            y, above, w = x * expand(self.scale(sigma), x), i.floor(), i - i.floor()
            if bool(((w < 0.01) | (w > 0.99)).all()):  # on a level
                F = net(y, self.clock(i.round()))
            else:
                w = expand(w, x)
                F = (1 - w) * net(y, self.clock(above)) + w * net(y, self.clock((above + 1).clamp(max=self.L - 1)))
            return F / expand(sigma, x)

        return score

    def denoiser(self, net: Net) -> Denoiser:
        """The network as an estimate of x_0: x + sigma**2 s (Tweedie)."""
        score = self.score(net)
        return lambda x, sigma: x + expand(sigma, x) ** 2 * score(x, sigma)

    def oracle(self, denoiser: Denoiser) -> Net:
        """The way back: a denoiser, for example an exact one, in the place of the network."""

        def net(y: Tensor, u: Tensor) -> Tensor:
            sigma = (log(self.sigma_L) + u.double() * log(self.sigma_1 / self.sigma_L)).exp().to(y.dtype)
            x = y / expand(self.scale(sigma), y)
            return (denoiser(x, sigma) - x) / expand(sigma, y)

        return net

    def index(self, sigma: Tensor) -> Tensor:
        """The (fractional) number, from 0, of the level ``sigma`` (``b``); beyond the ladder the nearest end."""
        i = (self.L - 1) * (self.sigma_1 / sigma.double()).log() / log(self.sigma_1 / self.sigma_L)
        return i.clamp(0, self.L - 1).to(sigma.dtype)

    # Sampling

    def prior(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Uniform noise in [-box, box]."""
        return self.box * (2 * torch.rand(*shape, device=device) - 1)

    def reverse(self, net: Net, x: Tensor) -> Iterator[Tensor]:
        """Algorithm 1, annealed Langevin dynamics: yields L T states (one more with ``denoise``), each ``b *d``."""
        yield from self._anneal(self.denoiser(net), x)

    def inpaint(self, net: Net, x: Tensor, known: Tensor, mask: Tensor) -> Iterator[Tensor]:
        """Algorithm 2: as ``reverse``, but where ``mask`` is true the state is ``known`` plus noise of the level.

        The noise is drawn once per level. ``x``, ``known``: ``b *d``; ``mask``: bool, broadcasts to ``x``. After a
        final denoising the known part is ``known`` itself.
        """
        yield from self._anneal(self.denoiser(net), x, known, mask.bool())

    def _anneal(
        self, denoiser: Denoiser, x: Tensor, known: Tensor | None = None, mask: Tensor | None = None
    ) -> Iterator[Tensor]:
        for sigma in self.ladder.tolist():
            step = self.eps * (sigma / self.sigma_L) ** 2 / 2
            seen = None if known is None else known + sigma * torch.randn_like(known)
            for _ in range(self.T):
                (x,) = samplers.langevin(denoiser, x, sigma, step, 1)
                x = x if seen is None else torch.where(mask, seen, x)
                yield x
        if self.denoise:
            x = denoiser(x, torch.full((len(x),), self.sigma_L, dtype=x.dtype, device=x.device))
            yield x if known is None else torch.where(mask, known, x)

    def sigmas(self, steps: int) -> Tensor:
        """Noise levels for ``samplers.ddim`` and friends: ``steps`` from sigma_1 to sigma_L, geometric, then 0.

        Raises:
            ValueError: if ``steps`` is not positive.
        """
        if steps < 1:
            raise ValueError(f"steps must be positive, got {steps}")
        return samplers.geometric(self.sigma_1, self.sigma_L, steps)

    def start(self, shape: Sequence[int], sigma: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Noise of level ``sigma``, from which the samplers of the ladder ``sigmas`` start: N(0, sigma**2)."""
        return float(sigma) * torch.randn(*shape, device=device)
