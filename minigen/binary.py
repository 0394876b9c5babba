"""Diffusion probabilistic models, 2015, binomial kernels: data of zeros and ones (Sohl-Dickstein et al., 1503.03585).

Every step sets a bit anew with probability beta_t, to 1 with the base rate b, and leaves it alone otherwise
(appendix, Table App.1; the printed base rate is 0.5, the heartbeat was run with 0.2).

==============  ==========================================================================================
``T``           number of steps; ``t = 1 .. T`` indexes the schedule, entry 0 means *no noise*
``beta``        1 / (T - t + 1): each step erases 1 / T of the first signal, nothing is left at the end
``b``           base rate of the equilibrium pi = B(b), independent bits
``f_b``         rate of the reverse step, P(x_{t-1} = 1 | x_t): the sigmoid of what the network gives, plus the
                logit of the forward kernel's rate
==============  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log

import torch
from torch import Tensor

from .core import Net, at, expand


@dataclass(frozen=True)
class BinaryDPM:
    """The method and its hyper-parameters; the defaults are those of the heartbeat (appendix D.1.2).

    Attributes:
        T: number of steps.
        base_rate: b, the mean activity at equilibrium, which should be that of the data.
    """

    T: int = 2000
    base_rate: float = 0.2

    def __post_init__(self) -> None:
        if self.T < 2 or not 0 < self.base_rate < 1:
            raise ValueError(f"BinaryDPM needs T >= 2 and a base rate in (0, 1), got {self.T} and {self.base_rate}")

    @cached_property
    def beta(self) -> Tensor:
        """1 / (T - t + 1), section 2.4.1, float64, shape ``T + 1``; entry 0 is 0."""
        beta = 1 / torch.arange(self.T + 1, 0, -1, dtype=torch.float64)
        beta[0] = 0
        return beta

    @cached_property
    def alpha_bar(self) -> Tensor:
        """The chance that a bit was never set anew, 1 - t / T, shape ``T + 1``."""
        return (1 - self.beta).cumprod(0)

    # Forward

    def step_rate(self, x: Tensor, t: Tensor) -> Tensor:
        """P(x_t = 1 | x_{t-1} = x), the forward kernel; ``x``: ``b *d``, ``t``: ``b``."""
        beta = at(self.beta, t, x)
        return x * (1 - beta) + self.base_rate * beta

    def rate(self, x0: Tensor, t: Tensor) -> Tensor:
        """P(x_t = 1 | x_0): ``x0``: ``b *d``, ``t``: ``b``."""
        bar = at(self.alpha_bar, t, x0)
        return x0 * bar + self.base_rate * (1 - bar)

    def perturb(self, x0: Tensor, t: Tensor) -> Tensor:
        """A draw of x_t given x_0."""
        return torch.bernoulli(self.rate(x0, t))

    def posterior(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """P(x_{t-1} = 1 | x_t, x_0) by Bayes' rule, per bit, ``b *d``."""
        before = self.rate(x0, t - 1)
        on, off = (self._likelihood(x_t, bit, t) for bit in (1.0, 0.0))
        return on * before / (on * before + off * (1 - before))

    def _likelihood(self, x_t: Tensor, bit: float, t: Tensor) -> Tensor:
        """The probability of ``x_t`` if the bit before was ``bit``."""
        beta = at(self.beta, t, x_t)
        rate = bit * (1 - beta) + self.base_rate * beta
        return torch.where(x_t > 0.5, rate, 1 - rate)

    # Reverse

    def out_channels(self, c: int) -> int:
        """One logit per bit."""
        return c

    def rate_back(self, net: Net, x_t: Tensor, t: Tensor) -> Tensor:
        """f_b, the model's P(x_{t-1} = 1 | x_t); zeros from the network, and t = 1, give the forward kernel."""
        forward = self.step_rate(x_t, t)
        learned = torch.sigmoid(net(x_t, t / self.T) + forward.logit())
        return torch.where(expand(t == 1, x_t), forward, learned)

    def oracle(self, states: Tensor) -> Net:
        """The best factorized step back for data that are equally likely rows of ``states`` (``k d``).

        Its rate is P(x_{t-1} = 1 | x_t) = sum over x_0 of q(x_0 | x_t) q(x_{t-1} = 1 | x_t, x_0), bit by bit.
        """

        def net(x_t: Tensor, u: Tensor) -> Tensor:
            t = (u * self.T).round().long()
            rates = torch.stack([self.rate(s.expand_as(x_t), t) for s in states.to(x_t)], 1)  # b k d
            log_q = torch.where(x_t[:, None] > 0.5, rates, 1 - rates).clamp(min=1e-30).log().sum(-1)
            each = torch.stack([self.posterior(x_t, s.expand_as(x_t), t) for s in states.to(x_t)], 1)
            best = (log_q.softmax(1)[..., None] * each).sum(1)
            return best.logit() - self.step_rate(x_t, t).logit()

        return net

    def loss(self, net: Net, x: Tensor) -> Tensor:
        """The part of -K that the network can change, by one random t in 2 .. T; nats per bit of data, ``b``."""
        t = torch.randint(2, self.T + 1, (len(x),), device=x.device)
        return (self.T - 1) * self.kl(net, x, t) / x[0].numel()

    def kl(self, net: Net, x0: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in nats, ``b``, for one draw of x_t."""
        x_t = self.perturb(x0, t)
        return bernoulli_kl(self.posterior(x_t, x0, t), self.rate_back(net, x_t, t)).flatten(1).sum(1)

    def prior(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Independent bits, 1 with probability b."""
        return torch.bernoulli(torch.full(tuple(shape), self.base_rate, device=device))

    def reverse(self, net: Net, x: Tensor) -> Iterator[Tensor]:
        """Draw x_{T-1}, ..., x_0 from the reverse process."""
        for step in range(self.T, 0, -1):
            x = torch.bernoulli(self.rate_back(net, x, torch.full((len(x),), step, device=x.device)))
            yield x

    # The bound

    @torch.no_grad()
    def elbo(self, net: Net, x0: Tensor) -> Tensor:
        """E log p(x_0 | x_1) - sum of divergences, in nats, ``b``: eq. 14 where the activity of the data is b.

        q(x_T | x_0) is exactly pi, so there is no third part. The first part is averaged over x_1 in closed form.
        """
        steps = (torch.full((len(x0),), t, device=x0.device) for t in range(2, self.T + 1))
        return self.edge(x0) - torch.stack([self.kl(net, x0, t) for t in steps]).sum(0)

    def edge(self, x0: Tensor) -> Tensor:
        """E log p(x_0 | x_1) in nats, ``b``: the step back to x_0 is the forward kernel of beta_1."""
        t = torch.ones(len(x0), dtype=torch.long, device=x0.device)
        on = self.rate(x0, t)  # P(x_1 = 1 | x_0)
        when = [self._likelihood(x0, bit, t).log() for bit in (0.0, 1.0)]
        return ((1 - on) * when[0] + on * when[1]).flatten(1).sum(1)

    def null(self, x0: Tensor) -> Tensor:
        """Log pi(x_0) in nats, ``b``."""
        return (x0 * log(self.base_rate) + (1 - x0) * log(1 - self.base_rate)).flatten(1).sum(1)


def bernoulli_kl(q: Tensor, p: Tensor) -> Tensor:
    """KL(B(q) || B(p)) in nats, elementwise; 0 log 0 is 0."""
    p = p.clamp(1e-12, 1 - 1e-7)
    return torch.special.xlogy(q, q / p) + torch.special.xlogy(1 - q, (1 - q) / (1 - p))


def heartbeat(n: int | None = None, length: int = 20, period: int = 5) -> Tensor:
    """The paper's binary toy: a 1 in every fifth bin, the phase at random; ``n length``, or each phase once.

    The phases are equally likely, so the true log-likelihood of a sequence is log2(1/5) = -2.322 bits.
    """
    bins = torch.arange(length) % period
    phase = torch.arange(period) if n is None else torch.randint(period, (n,))
    return (bins == phase[:, None]).float()
