"""What a variational bound is made of: Gaussian divergences, the discrete decoder, and the sum with its bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor


def gaussian_kl(mean_q: Tensor, var_q: Tensor, mean_p: Tensor, var_p: Tensor) -> Tensor:
    """KL(N(mean_q, var_q) || N(mean_p, var_p)), elementwise, in nats; the arguments broadcast."""
    return 0.5 * ((var_p / var_q).log() + (var_q + (mean_q - mean_p).square()) / var_p - 1)


def decoder_nll(x0: Tensor, mean: Tensor, sigma: Tensor, bins: int = 256) -> Tensor:
    """-log of the probability that N(mean, sigma**2) gives to the bin of ``x0``, in nats, elementwise
    (Ho, Jain, Abbeel 2020, eq. 13).

    ``bins`` equally spaced values fill [-1, 1]; the first and the last bin are open. Probabilities are floored at
    1e-12, as in the paper's code.
    """
    half = 1 / (bins - 1)
    z, h = ((x0 - mean) / sigma).double(), half / sigma.double()
    p = torch.special.ndtr(h - z.abs()) - torch.special.ndtr(
        -h - z.abs()
    )  # the two tails are alike: take the small ones
    p = torch.where(x0 > 1 - half, torch.special.ndtr(h - z), p)
    p = torch.where(x0 < -1 + half, torch.special.ndtr(h + z), p)
    return -p.clamp(min=1e-12).log().to(x0.dtype)


@dataclass(frozen=True)
class Bound:
    """The bound on -log p(x_0), term by term.

    Attributes:
        terms: ``T b``, nats: row 0 is L_0 (t = 1), row t - 1 is L_{t-1}.
        mse: ``T b``: squared error of the predicted x_0 per dimension, seen from x_t.
        prior: ``b``, nats: L_T.
        dims: numbers in one sample.
    """

    terms: Tensor
    mse: Tensor
    prior: Tensor
    dims: int

    @property
    def bits(self) -> Tensor:
        """The whole bound in bits per dimension, shape ``b``."""
        return (self.terms.sum(0) + self.prior) / (self.dims * log(2))

    @property
    def rate(self) -> Tensor:
        """Bits per dimension sent before x_t is known, t = 1 .. T, mean over the batch
        (progressive coding, Ho, Jain, Abbeel 2020, section 4.3).
        """
        sent = self.terms[1:].flip(0).cumsum(0).flip(0)  # row t - 1: the sum of L_t .. L_{T-1}
        total = torch.cat([sent, sent.new_zeros(1, sent.shape[1])]) + self.prior
        return total.mean(1) / (self.dims * log(2))

    @property
    def distortion(self) -> Tensor:
        """Root mean squared error of the predicted x_0 seen from x_t, t = 1 .. T, on the scale 0 to 255."""
        return self.mse.mean(1).sqrt() * 127.5
