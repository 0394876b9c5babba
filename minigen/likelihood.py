"""Bits per dimension by the probability flow: for every method whose prior has a density.

Pictures have discrete values, the flow has a density. Let ``k`` be the values of a picture, 0 .. bins - 1 in each of
its ``N`` pixels and channels, and ``x = 2 k / (bins - 1) - 1`` what the method sees. Spread each value evenly over its
bin: ``y = k + U`` with ``U`` uniform in [-1/2, 1/2]. A density p of x is the density ``p (2 / (bins - 1))**N`` of y,
and its integral over the bins of a picture is the probability P of the picture. By Jensen's inequality

    log P(k) = log E_U[p(x(y)) (2 / (bins - 1))**N] >= E_U[log p(x(y))] + N log(2 / (bins - 1)),

so that ``- log2 p(x(y)) / N + log2((bins - 1) / 2)`` bits per dimension are, on average over U, no less than those of
the model (uniform dequantization; Theis, van den Oord, Bethge 2016, arXiv 1511.01844).

The density is that of the flow at the level ``sigma_0`` where the noise has the variance of U, ``2 / (bins - 1)`` over
the root of 12, or at the method's lowest level if that is higher. Nearer to 0 a good model knows that values are
discrete, and finds the points between them unlikely. A model that is exact at ``sigma_0`` still pays for the uniform
law in the place of the Gaussian one: log2(pi e / 6) / 2 = 0.25 bits per dimension, less where sigma_0 is higher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log, log2, sqrt
from typing import Any

import torch
from torch import Tensor

from .core import Denoiser, Method, Net
from .ddpm import DDPM
from .fields import CAUCHY, GAUSSIAN
from .ncsn import NCSN
from .pfgm import PFGM
from .pfgmpp import PFGMPP
from .samplers import log_likelihood

BATCH = 16
"""Images that the adaptive solver takes as one system."""


@dataclass(frozen=True)
class Span:
    """Where the flow of a method begins and ends.

    Attributes:
        sigma_min: its lowest noise level.
        sigma_max: its highest.
        log_prior: the log-density of the noise from which sampling starts at ``sigma_max``, ``b *d`` to ``b``; for PFGM
            of the whole Cauchy law, of which ``start`` cuts the far part to ``upper_norm`` (half of the draws of
            images): there bits and samples belong to two priors.
    """

    sigma_min: float
    sigma_max: float
    log_prior: Callable[[Tensor], Tensor]


def span(method: Method) -> Span | None:
    """The flow of ``method``; ``None`` if its prior has no density here."""
    if isinstance(method, PFGM):
        return Span(method.z_min, method.z_max, lambda x: CAUCHY.log_prob(x, method.z_max))
    if isinstance(method, PFGMPP):
        return Span(method.sigma_min, method.sigma_max, lambda x: method.kernel.log_prob(x, method.sigma_max))
    if isinstance(method, NCSN):
        return Span(method.sigma_L, method.sigma_1, lambda x: GAUSSIAN.log_prob(x, method.sigma_1))
    if isinstance(method, DDPM):
        low, high = float(method.sigma[1]), float(method.sigma[-1])
        return Span(low, high, lambda x: GAUSSIAN.log_prob(x, sqrt(1 + high**2)))  # x_T / sqrt(alpha_bar_T)
    return None


@dataclass(frozen=True)
class FlowBits:
    """Bits per dimension by the flow: those of each image (``n``), and network calls for each of them."""

    bits: Tensor
    calls: float

    @property
    def mean(self) -> float:
        """The mean over the images."""
        return float(self.bits.mean())

    @property
    def error(self) -> float:
        """Its standard error; that of the noise in the bins and of the probes is part of it."""
        return float(self.bits.std() / sqrt(len(self.bits))) if len(self.bits) > 1 else float("nan")


def dequantize(x: Tensor, bins: int, seed: int = 0) -> Tensor:
    """``x`` (``n c h w`` in [-1, 1], one of ``bins`` values each), spread evenly over the bins."""
    u = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype).to(x.device)
    return x + (u - 0.5) * (2 / (bins - 1))


def flow_bits(
    method: Any, net: Net, x: Tensor, bins: int = 256, *, probes: int = 1, tol: float = 1e-3, seed: int = 0
) -> FlowBits:
    """Bits per dimension of pictures, as this module derives them.

    Args:
        method: one with a ``span``. What it clips in sampling is not clipped here: a flow needs a derivative.
        net: ``(x: b *d, u: b) -> b *o``.
        x: ``n c h w`` in [-1, 1].
        bins: values of a pixel.
        probes: random vectors for each divergence; 0: the exact one.
        tol: relative and absolute tolerance of the solver, over all numbers of a batch together. Its error is the same
            for all images and no part of ``error``: for a Gaussian law of 3,072 numbers 0.007 bits at 1e-3, 0.001 at
            1e-4 and 0.4 at 1e-2, mostly too few bits.
        seed: of the noise in the bins and the probes.

    Raises:
        ValueError: if the method has no such flow, or the tolerance is not positive.
    """
    ends = span(method)
    if ends is None:
        raise ValueError(f"{type(method).__name__} has no flow with a known prior: use its bound")
    if not tol > 0:
        raise ValueError(f"the tolerance must be positive, got {tol}")
    calls = 0

    def counted(x: Tensor, u: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return net(x, u)

    open_method = replace(method, clip=False) if hasattr(method, "clip") else method
    denoiser, log_p = open_method.denoiser(counted), []
    parts = dequantize(x, bins, seed).split(BATCH)
    for i, part in enumerate(parts):
        log_p.append(log_density(denoiser, part, ends, bins, probes, tol, seed + i))
    bits = -torch.cat(log_p).double().cpu() / (x[0].numel() * log(2)) + log2((bins - 1) / 2)
    return FlowBits(bits, calls / len(parts))


def log_density(
    denoiser: Denoiser, y: Tensor, ends: Span, bins: int, probes: int = 0, tol: float = 1e-5, seed: int = 0
) -> Tensor:
    """The log-density of dequantized pictures ``y`` (``b *d``) at the level sigma_0, in nats, shape ``b``."""
    sigma_0 = max(ends.sigma_min, 2 / (bins - 1) / sqrt(12))
    return log_likelihood(denoiser, y, sigma_0, ends.sigma_max, tol, ends.log_prior, probes, seed).extra
