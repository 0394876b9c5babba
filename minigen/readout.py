"""The networks of 2015: a body that does not know the time, and a read-out that does.

Sohl-Dickstein, Weiss, Maheswaranathan, Ganguli 2015, appendix D: a linear read-out of its own for every
step in the toys (D.1), bump functions of time for images (D.2.1). All are called like any network of this package,
``net(x: b *d, u: b) -> b out``, with u = t / T, and their read-out starts at zero: the first model is the forward
process run backwards.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PerStep(nn.Module):
    """A linear read-out with its own weights for every step: features ``b k`` at u = t / T to ``b out``."""

    def __init__(self, k: int, out: int, T: int) -> None:
        super().__init__()
        self.T = T
        self.weight = nn.Parameter(torch.zeros(T + 1, out, k))
        self.bias = nn.Parameter(torch.zeros(T + 1, out))

    def forward(self, h: Tensor, u: Tensor) -> Tensor:
        """``h``: ``b k``, ``u``: ``b``."""
        t = (u * self.T).round().long()
        weight = F.embedding(t, self.weight.flatten(1)).unflatten(1, self.weight.shape[1:])  # faster than indexing
        return torch.einsum("bok,bk->bo", weight, h) + F.embedding(t, self.bias)


class RBF(nn.Module):
    """Normalized radial basis functions and a read-out per step, for points: the network of the Swiss roll (D.1.1).

    Args:
        centers: ``units d``, where the bumps begin, for example at data points; learned, as is each width.
        out: numbers per point, ``method.out_channels(d)``.
        T: number of steps.
    """

    def __init__(self, centers: Tensor, out: int, T: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(centers.clone())
        self.log_width = nn.Parameter(torch.full((len(centers),), -1.0))
        self.readout = PerStep(len(centers), out, T)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """``x``: ``b d``, ``u``: ``b``; returns ``b out``."""
        d2 = x.square().sum(1, keepdim=True) - 2 * x @ self.centers.T + self.centers.square().sum(1)
        return self.readout(torch.softmax(-d2 / (2 * self.log_width.exp() ** 2), dim=1), u)


class Dense(nn.Module):
    """Hidden tanh layers and a read-out per step, for vectors: the network of the heartbeat (D.1.2: 50, 50, 50)."""

    def __init__(self, d: int, out: int, T: int, hidden: tuple[int, ...] = (50, 50, 50)) -> None:
        super().__init__()
        layers = [f for a, b in pairwise((d, *hidden)) for f in (nn.Linear(a, b), nn.Tanh())]
        self.body, self.readout = nn.Sequential(*layers), PerStep(hidden[-1], out, T)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """``x``: ``b d``, ``u``: ``b``; returns ``b out``."""
        return self.readout(self.body(x), u)


class Bumps(nn.Module):
    """Dense layers that never see the time, and weights g_j(t) that mix their J answers, eqs. 62 and 63, for images.

    g_j(t) is a Gaussian bump around tau_j, divided by the sum of all bumps; the centers are spread over (0, T), and
    a bump is as wide as their spacing.

    Args:
        d: numbers in one image.
        out: numbers per image, for DPM 2 d.
        J: bumps.
        hidden: units of the tanh layers.
    """

    def __init__(self, d: int, out: int, J: int = 10, hidden: tuple[int, ...] = (256, 256)) -> None:
        super().__init__()
        layers = [f for a, b in pairwise((d, *hidden)) for f in (nn.Linear(a, b), nn.Tanh())]
        self.body, self.readout = nn.Sequential(*layers), nn.Linear(hidden[-1], out * J)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)
        self.J = J

    def bumps(self, u: Tensor) -> Tensor:
        """g_j at u = t / T (``b``), shape ``b J``; each row sums to 1."""
        spacing = 1 / self.J
        tau = (torch.arange(self.J, device=u.device) + 0.5) * spacing
        return torch.softmax(-((u[:, None] - tau) ** 2) / (2 * spacing**2), dim=1)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """``x``: ``b c h w``, ``u``: ``b``; returns ``b out/(h w) h w``."""
        y = self.readout(self.body(x.flatten(1))).reshape(len(x), -1, self.J)
        return torch.einsum("boj,bj->bo", y, self.bumps(u)).reshape(len(x), -1, *x.shape[2:])
