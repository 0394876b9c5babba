"""Poisson flow generative models, 2022 (Xu, Liu, Tegmark, Jaakkola, arXiv 2209.11178).

============  ===========================================================================================
``z``         the added dimension; the data are charges on the plane ``z = 0``; the network's clock is log z
``E``         the normalized field: ``x`` minus a mean over the charges, and ``z``: ``(x - E[y | x, z], z)``
``v``         what the network predicts, ``-sqrt(N) E / (|E| + gamma)``, with ``N`` the dimension of the data
``sigma``     smallest noise; the noise of step ``m`` is ``sigma (1 + tau)**m``, ``m`` uniform on [0, M]
``z_exp``     below this height v_z is computed from v_x instead of learned ("z-substitution")
============  ===========================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import log, prod, sqrt
from typing import Literal

import torch
from torch import Tensor

from .core import Denoiser, Net, expand
from .fields import CAUCHY, empirical_denoiser
from .samplers import Solution, geometric, log_likelihood, probability_flow, rk45


@dataclass(frozen=True)
class PFGM:
    """The method and its hyper-parameters; the defaults are those of the paper's code for CIFAR-10.

    Attributes:
        sigma: smallest scale of the perturbation.
        tau: ratio of two neighboring scales, minus 1.
        M: number of scales.
        gamma: length below which the target shrinks to 0, where the direction of the field is ill-defined.
        z_min: where the backward equation ends.
        z_max: where it starts.
        z_exp: height of the z-substitution; 0: none.
        upper_norm: longest prior sample; ``None``: the longest typical perturbation, ``sqrt(N) sigma (1 + tau)**M``
            (``target="field"``), or ``50 z_max``.
        target: what the network predicts: the normalized ``field`` with its z-component, as in the paper, or
            E[y | x, z] (``denoiser``), learned from the whole Cauchy kernel: far points, too.
        small_batch: points at which the field is learned in a step; the whole batch are the charges.
        large_batch: charges in a step; the default batch size of the command line.
        tol: relative and absolute tolerance of the sampler.
    """

    sigma: float = 0.01
    tau: float = 0.03
    M: int = 291
    gamma: float = 5.0
    z_min: float = 1e-3
    z_max: float = 40.0
    z_exp: float = 5.0
    upper_norm: float | None = None
    target: Literal["field", "denoiser"] = "field"
    small_batch: int = 128
    large_batch: int = 4096
    tol: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < self.z_min < self.z_max:
            raise ValueError(f"PFGM needs 0 < z_min < z_max, got {self.z_min} and {self.z_max}")
        if min(self.sigma, self.tau, self.gamma, self.tol) <= 0 or self.z_exp < 0 or self.M < 1:
            raise ValueError("PFGM needs positive sigma, tau, gamma and tol, z_exp >= 0 and M >= 1")
        if min(self.small_batch, self.large_batch) < 1 or (self.upper_norm is not None and self.upper_norm <= 0):
            raise ValueError("PFGM needs batches of at least 1 and a positive upper_norm")
        if self.target not in ("field", "denoiser"):
            raise ValueError(f"PFGM needs a target field or denoiser, got {self.target!r}")

    @classmethod
    def for_data(cls, shape: Sequence[int]) -> PFGM:
        """Defaults for samples of the given shape: the paper's for CIFAR-10 and all larger ones, scaled for smaller.

        (At 64x64 its code took z_max = 60, z_exp = 1 and 512 charges.)

        ``sigma`` and ``z`` measure noise per coordinate and stay. ``gamma`` is the length of a vector and scales with
        sqrt(N); the substitution begins where that vector is a few gamma long. Points get the denoiser form: the
        field form sees nothing beyond its longest perturbation, and in the plane 46 % of the prior lie there.
        """
        gamma = 5 * sqrt(prod(shape) / 3072)
        if len(shape) == 1:
            return cls(gamma=gamma, z_exp=0.3, z_min=0.01, target="denoiser", small_batch=512, large_batch=512)
        return cls(gamma=gamma, z_exp=0.3, large_batch=1024) if prod(shape) < 3072 else cls()

    # Forward

    def perturb(self, x0: Tensor, m: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Algorithm 2: where the field is learned, ``x`` (``b *d``) and ``z`` (``b``).

        Args:
            x0: ``b *d``.
            m: ``b``, real numbers in [0, M].
            eps: ``b n+1``, standard Gaussian. The paper turns ``eps_x`` in a random direction, which changes no law.
        """
        scale = self.sigma * (1 + self.tau) ** m
        x = x0 + expand(scale, x0) * eps[:, :-1].reshape(x0.shape)
        return x, (scale * eps[:, -1].abs()).clamp(min=1e-10)

    def field_target(self, x: Tensor, z: Tensor, charges: Tensor) -> tuple[Tensor, Tensor]:
        """The normalized field of ``charges`` (``m *d``), section 3.2: v_x (``b *d``) and v_z (``b``)."""
        E_x = x - empirical_denoiser(charges, CAUCHY)(x, z)
        norm = (E_x.flatten(1).square().sum(1) + z**2).sqrt()
        scale = -sqrt(x[0].numel()) / (norm + self.gamma)
        return expand(scale, x) * E_x, scale * z

    # Network

    def out_channels(self, c: int) -> int:
        """As many as the data, and one more for v_z where the network predicts the field."""
        return c + (self.target == "field")

    def clock(self, z: Tensor) -> Tensor:
        """U = log(z / z_min) / log(z_top / z_min), within [0, 1], shape ``b``; z_top is the largest z in training."""
        return (z.clamp(min=self.z_min) / self.z_min).log().div(log(self._top / self.z_min)).clamp(max=1.0)

    def predict(self, net: Net, x: Tensor, z: Tensor) -> Tensor:
        """The network at ``(x, z)``: it sees ``x / sqrt(1 + z**2 + |x|**2 / N)``, bounded however far ``x`` lies."""
        c_in = (1 + z**2 + x.flatten(1).square().mean(1)).rsqrt()
        return net(expand(c_in, x) * x, self.clock(z))

    def predict_field(self, net: Net, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """v_x (``b *d``) and v_z (``b``): the mean of the last channel over all pixels."""
        out = self.predict(net, x, z)
        c = x.shape[1]
        return out[:, :c], out[:, c:].flatten(1).mean(1)

    def precondition(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """For the denoiser form: what is kept of ``x`` (``b *d``), and the size of what the network adds.

        The posterior of a Cauchy kernel has a variance of order z, not z**2, hence the root. A far ``x`` is cut to
        3 per coordinate, since no data lie there.
        """
        near = x * expand((3 * x.flatten(1).square().mean(1).rsqrt()).clamp(max=1), x)
        return near / expand(1 + z, x), expand((z / (1 + z)).sqrt(), x)

    def loss(self, net: Net, x: Tensor) -> Tensor:
        """Algorithm 1: the mean squared error of v at the first ``small_batch`` points, one number for each.

        In the denoiser form: of E[y | x, z], weighted so that the error is that of the network's own output.
        """
        x0 = x[: self.small_batch]
        if self.target == "denoiser":  # the kernel itself: the mean over many sources is the field's
            z = self.z_min * (self.z_max / self.z_min) ** torch.rand(len(x0), device=x.device)
            x_z = x0 + expand(z, x0) * CAUCHY.noise(x0)
            kept, size = self.precondition(x_z, z)
            return (self.predict(net, x_z, z) - (x0 - kept) / size).square().flatten(1).mean(1)
        m = self.M * torch.rand(len(x0), device=x.device)
        eps = torch.randn(len(x0), x0[0].numel() + 1, device=x.device)
        x_z, z = self.perturb(x0, m, eps)
        t_x, t_z = self.field_target(x_z, z, x)
        v_x, v_z = self.predict_field(net, x_z, z)
        return ((v_x - t_x).square().flatten(1).sum(1) + (v_z - t_z) ** 2) / eps.shape[1]

    def share(self, x: Tensor, i: int, parts: int) -> tuple[PFGM, Tensor]:
        """The ``i``-th of ``parts`` equal shares of a step: some of the points, all of the charges ``x``."""
        points = min(self.small_batch, len(x)) // parts
        return replace(self, small_batch=points), x.roll(-i * points, 0) if i else x

    # Reverse

    def prior(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """The uniform hemisphere projected on z = z_max: ``z_max g / |g'|``, no longer than ``upper_norm``."""
        return self.start(shape, torch.tensor(self.z_max), device)

    def start(self, shape: Sequence[int], sigma: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Prior noise at height ``sigma``, ``b *d``."""
        longest = sqrt(prod(shape[1:])) * self.sigma * (1 + self.tau) ** self.M
        cap = self.upper_norm or (longest if self.target == "field" else 50 * self.z_max)
        x = CAUCHY.noise(torch.empty(*shape, device=device)) * self.z_max
        return x * expand((cap / x.flatten(1).norm(dim=1)).clamp(max=1), x) * (float(sigma) / self.z_max)

    def reverse(self, net: Net, x: Tensor) -> Iterator[Tensor]:
        """The paper's sampler, Dormand-Prince in log z from z_max to z_min: it yields one state, the data."""
        yield rk45(probability_flow(self.denoiser(net)), x, self.z_max, self.z_min, self.tol).x

    def denoiser(self, net: Net) -> Denoiser:
        """The network as E[y | x, z]: for the field it is ``x - z v_x / v_z``, since E_z = z (section 3.3)."""

        def denoise(x: Tensor, z: Tensor) -> Tensor:
            if self.target == "denoiser":
                kept, size = self.precondition(x, z)
                return kept + size * self.predict(net, x, z)
            v_x, v_z = self.predict_field(net, x, z)
            v_z = torch.where(z < self.z_exp, self.substitute(v_x, z), v_z)
            return x + expand(z / (v_z.abs() + 1e-5), x) * v_x  # v_z is negative

        return denoise

    def substitute(self, v_x: Tensor, z: Tensor) -> Tensor:
        """v_z for small z from v_x alone (appendix B.2.3), ``b``: its length gives that of E_x, and E_z is z.

        The paper takes ``|E|`` for ``|E_x|`` and finds ``gamma s / (1 - s)``; the quadratic equation needs no guess.
        It is exact up to ``|E| = 1000 gamma``, where s is cut.
        """
        root_n = sqrt(v_x[0].numel())
        s = (v_x.flatten(1).norm(dim=1) / root_n).clamp(max=1 - 1e-3)  # |E_x| / (|E| + gamma)
        E_x = s * (self.gamma + ((self.gamma * s) ** 2 + (1 - s**2) * z**2).sqrt()) / (1 - s**2)
        return -root_n * z / ((E_x**2 + z**2).sqrt() + self.gamma)

    def sigmas(self, steps: int) -> Tensor:
        """Heights for the samplers: ``steps`` of them, even in log z from z_max to z_min, then 0; float64."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return geometric(self.z_max, self.z_min, steps)

    def log_likelihood(self, net: Net, x0: Tensor, tol: float = 1e-5) -> Solution:
        """log p(x_0) in nats (``extra``, shape ``b``) by the exact divergence, with the prior's density in R^N."""
        prior = lambda x: CAUCHY.log_prob(x, self.z_max)
        return log_likelihood(self.denoiser(net), x0, self.z_min, self.z_max, tol, prior)

    def oracle(self, denoiser: Denoiser) -> Net:
        """The way back: an exact E[y | x, z] in the place of the network, read in float64.

        The network's input is bounded, so far out ``x`` is a difference of nearly equal numbers: pass it in float64.
        """

        def net(x_in: Tensor, u: Tensor) -> Tensor:
            z = self.z_min * (self._top / self.z_min) ** u.double()
            rms2 = x_in.double().flatten(1).square().mean(1)
            x = expand(((1 + z**2) / (1 - rms2)).sqrt(), x_in) * x_in.double()
            y = denoiser(x, z)
            if self.target == "denoiser":
                kept, size = self.precondition(x, z)
                return ((y - kept) / size).to(x_in)
            norm = ((x - y).flatten(1).square().sum(1) + z**2).sqrt()
            scale = -sqrt(x[0].numel()) / (norm + self.gamma)
            last = expand(scale * z, x).expand(-1, 1, *x.shape[2:])
            return torch.cat([expand(scale, x) * (x - y), last], 1).to(x_in)

        return net

    @property
    def _top(self) -> float:
        return self.z_max if self.target == "denoiser" else max(self.z_max, 4 * self.sigma * (1 + self.tau) ** self.M)
