"""The contract between a paper's method and everything else.

A *network* is any callable ``net(x, u)``: it reads a batch ``x`` of noisy samples and a clock ``u`` in [0, 1]
(0 = data, 1 = noise). A *method* is a frozen dataclass of one paper's hyper-parameters. It knows how to compute a
loss from a network, how to draw from its prior, and how to walk from the prior back to data. Neither owns the other,
so that an exact answer can stand wherever a network stands.

Shape letters used in every docstring: ``b`` batch, ``*d`` the dimensions of one sample (``2``, or ``c h w``),
``*o`` the dimensions of one output of the network, ``n`` number of samples, ``s`` number of levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Net = Callable[[Tensor, Tensor], Tensor]
"""``net(x: b *d, u: b) -> b *o``: a network, or an exact answer in its place."""

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``denoiser(x: b *d, sigma: b) -> b *d``: the mean of x_0 given x = x_0 + sigma * noise."""


@runtime_checkable
class Method(Protocol):
    """What a paper's method offers to the trainer, the sampler and the evaluation."""

    def out_channels(self, c: int) -> int:
        """Channels that the network must return for data of ``c`` channels."""
        ...

    def loss(self, net: Net, x: Tensor) -> Tensor:
        """One number per sample, shape ``b``; its mean is minimized."""
        ...

    def prior(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Noise of the given shape, from which ``reverse`` starts."""
        ...

    def reverse(self, net: Net, x: Tensor) -> Iterator[Tensor]:
        """Every state of the paper's own sampler, ``b *d`` each; the last one is data."""
        ...


@runtime_checkable
class Crowd(Protocol):
    """A method whose loss at a few points compares them with the whole batch, so that a part of it is not enough."""

    small_batch: int
    large_batch: int

    def share(self, x: Tensor, i: int, parts: int) -> tuple[Method, Tensor]:
        """The ``i``-th of ``parts`` equal shares of the loss on ``x``: a method and a batch."""
        ...


@dataclass(frozen=True)
class Record:
    """What the trainer reports: step, mean loss since the last report, gradient norm, learning rate."""

    step: int
    loss: float
    grad_norm: float
    lr: float


def expand(a: Tensor, x: Tensor) -> Tensor:
    """Give ``a`` (shape ``b``, or a scalar) as many trailing dimensions as ``x`` (``b *d``) has."""
    return a.reshape(-1, *[1] * (x.ndim - 1))


def at(schedule: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """The entries ``schedule[t]`` (``t``: ``b``, integers) with the device and dtype of ``x``, ready to broadcast.

    Raises:
        ValueError: if ``x`` holds whole numbers, which would cut the schedule to 0.
    """
    if not x.is_floating_point():
        raise ValueError(f"samples must be floating-point numbers, got {x.dtype}: convert them first, x.float()")
    return expand(on_device(schedule, t.device)[t].to(x.dtype), x)


_copies = WeakTensorKeyDictionary()


def on_device(schedule: Tensor, device: torch.device) -> Tensor:
    """``schedule`` on ``device``, copied only once: a copy at every step would make the device wait.

    A schedule is never changed in place. One that is being learned is copied each time, so that gradients flow.
    """
    if schedule.device == device or schedule.requires_grad:
        return schedule.to(device)
    if (copy := _copies.get(schedule)) is None or copy.device != device:
        copy = _copies[schedule] = schedule.to(device)
    return copy


def sample(method: Method, net: Net, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Draw samples with the paper's own sampler.

    Args:
        method: the method, for example ``DDPM()``.
        net: ``(x: b *d, u: b) -> b *o``.
        shape: ``b *d`` of the result.
        device: where to draw.

    Returns:
        The last state of ``method.reverse``, shape ``b *d``.
    """
    x = method.prior(shape, device)
    with torch.no_grad():
        for state in method.reverse(net, x):
            x = state
    return x


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with torch's random state set from ``seed``; the state outside is left as it was."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
