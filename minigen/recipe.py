"""How to train: the hyper-parameters, the learning rate as a function of progress, and the recipes.

A *recipe* says how a method is trained on images of 32x32 or more: ``paper`` as its authors did, ``fast`` for a budget
of minutes. Smaller images and points have presets of their own, to which ``fast`` only gives a budget of time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import cos, inf, pi
from typing import Literal

import torch

from .data import Dataset

Recipe = Literal["paper", "fast"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are those of Ho, Jain, Abbeel 2020 (appendix B) for CIFAR-10.

    Attributes:
        steps: updates, in the whole run; ``None`` if only time counts.
        minutes: time budget of the whole run; the learning rate then follows the time.
        batch: samples per step, over all processes.
        accumulate: parts into which each process cuts its share of a step, to need less memory;
            the batch stays the same, the noise does not.
        lr: learning rate of Adam.
        warmup: steps in which it rises from 0 (with a time budget: the first 5 %).
        decay: what it does then: stay, or fall to 0 along a cosine (with a time budget: always).
        ema: decay of the averaged weights, after a ramp.
        grad_clip: largest norm of the gradient; ``inf`` leaves it as it is.
        seed: of the weights, the order of the data, and the noise.
        precision: ``bf16`` runs the network, and nothing else, in mixed precision.
        compile: compile the network; pays on GPUs.
        log_every: steps between two records.
    """

    steps: int | None = 800_000
    minutes: float | None = None
    batch: int = 128
    accumulate: int = 1
    lr: float = 2e-4
    warmup: int = 5000
    decay: Literal["constant", "cosine"] = "constant"
    ema: float = 0.9999
    grad_clip: float = 1.0
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    log_every: int = 20

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("training needs an end: give --steps or --minutes")
        for name in ("steps", "minutes", "batch", "accumulate", "lr", "grad_clip", "log_every"):
            value, largest = getattr(self, name), inf if name == "grad_clip" else 1e18
            if value is not None and not 0 < value <= largest:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"--seed must fit into 64 bits, got {self.seed}")
        if self.warmup < 0 or not 0 <= self.ema < 1:
            raise ValueError(f"--warmup must be at least 0 and --ema in [0, 1), got {self.warmup} and {self.ema}")
        if self.decay not in ("constant", "cosine") or self.precision not in ("fp32", "bf16"):
            raise ValueError(f"decay is constant or cosine, precision fp32 or bf16, got {self.decay}, {self.precision}")

    def progress(self, step: int, seconds: float) -> float:
        """The part of the run that is done; 1 is the end."""
        by_steps = step / self.steps if self.steps else 0.0
        return max(by_steps, seconds / (60 * self.minutes) if self.minutes else 0.0)

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """The learning rate of the update that follows ``step`` updates and ``seconds`` of training."""
        done = self.progress(step, seconds)
        rise = done / 0.05 if self.minutes else (step + 1) / max(self.warmup, 1)
        fall = (1 + cos(pi * min(done, 1))) / 2 if self.minutes or self.decay == "cosine" else 1.0
        return self.lr * min(rise, 1.0) * fall


PAPER: dict[str, TrainConfig] = {
    "dpm": TrainConfig(batch=200),
    "ncsn": TrainConfig(steps=200_000, lr=1e-3, warmup=0, ema=0.0, grad_clip=inf),
    "ddpm": TrainConfig(),
    "pfgm": TrainConfig(steps=1_300_000, batch=4096),
    "pfgmpp": TrainConfig(steps=390_625, batch=512, lr=1e-3, warmup=19_531, ema=0.5 ** (512 / 500_000), grad_clip=inf),
}
"""Optimizer settings for CIFAR-10, by method.

* ``dpm``: the batch of the released command; 2015 trained a network of its own with RMSprop, so the rest is DDPM's.
* ``ncsn``: Song and Ermon 2019, appendix B.2: neither warmup, nor averaged weights, nor clipping.
* ``ddpm``: Ho, Jain, Abbeel 2020, appendix B.
* ``pfgm``: the released configuration; 4,096 images are the charges of a step, 128 of them the points. The paper kept
  the best of the checkpoints of 1.3 million steps.
* ``pfgmpp``: that of EDM, whose code it uses: 200 million images, an average with a half-life of 500,000 images.
"""


def preset(
    data: Dataset, method: str = "ddpm", recipe: Recipe = "paper", device: str = "cpu", steps: int | None = None
) -> TrainConfig:
    """What works for the kind of data.

    Args:
        data: images of 32x32 or more follow the ``recipe``; for smaller ones and points there are shorter runs with
            cosine decay.
        method: its name in ``PAPER``.
        recipe: ``paper``, or ``fast``: 20 minutes unless told otherwise, a larger learning rate that falls to 0 with
            the time, an average over at most the last 1,000 steps, and on GPUs batches of 128, compiled, in bf16,
            where they can.
        device: ``cuda`` or ``cpu``, for ``fast``.
        steps: the length of the run, where it is known: for ``fast`` a budget instead of minutes; the small presets
            then warm up for at most a twentieth of it.

    Raises:
        ValueError: if there is no such recipe.
    """
    if recipe not in ("paper", "fast"):
        raise ValueError(f"unknown recipe {recipe!r}: use paper or fast")
    if len(data.shape) == 1:
        small = TrainConfig(steps=4000, batch=512, lr=3e-3, warmup=200, decay="cosine", ema=0.999, log_every=50)
    elif data.shape[-1] < 32:
        small = TrainConfig(steps=4000, batch=128, lr=2e-3, warmup=200, decay="cosine", ema=0.999)
    else:
        return _fast(device, steps) if recipe == "fast" else PAPER.get(method, TrainConfig())
    if steps:
        return replace(small, warmup=min(small.warmup, steps // 20))
    return replace(small, steps=None, minutes=1.0) if recipe == "fast" else small


def _fast(device: str, steps: int | None) -> TrainConfig:
    """For images: 20 minutes, or so many steps; batches of 16 on a processor, where they cost little more; or 128.

    On an H200 DDPM in batches of 512 saw more pictures than in batches of 128, and ended with the larger loss, after
    three and a half minutes at half of the width (book/results/cifar10_ddpm_512_gpu.json and cifar10_ddpm_gpu.json).
    """
    config = TrainConfig(batch=16, lr=1e-3, ema=0.999, decay="cosine", steps=None, minutes=20)
    if steps:
        config = replace(config, steps=steps, minutes=None, warmup=steps // 20)
    if device != "cuda":
        return config
    return replace(config, batch=128, precision="bf16" if _half() else "fp32", compile=_compiles())


def _half() -> bool:
    """Whether the card computes in bf16; those before 2020 (such as the T4) only imitate it, slowly."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def _compiles() -> bool:
    """Whether PyTorch can compile for the card: it takes Triton, and a card of 2017 (capability 7.0) or later."""
    if not torch.cuda.is_available():
        return True
    return find_spec("triton") is not None and torch.cuda.get_device_capability() >= (7, 0)
