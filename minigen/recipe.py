"""How to train: the hyper-parameters, the learning rate as a function of progress, and what works for which data."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, isfinite, pi
from typing import Literal

from .data import Dataset


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are those of Ho, Jain, Abbeel 2020 (appendix B) for CIFAR-10.

    Attributes:
        steps: updates, in the whole run; ``None`` if only time counts.
        minutes: time budget of the whole run; the learning rate then follows the time.
        batch: samples per step and process.
        lr: learning rate of Adam.
        warmup: steps in which it rises from 0 (with a time budget: the first 5 %).
        decay: what it does then: stay, or fall to 0 along a cosine (with a time budget: always).
        ema: decay of the averaged weights, after a ramp.
        grad_clip: largest norm of the gradient.
        seed: of the weights, the order of the data, and the noise.
        precision: ``bf16`` runs the network, and nothing else, in mixed precision.
        compile: compile the network; pays on GPUs.
        log_every: steps between two records.
    """

    steps: int | None = 800_000
    minutes: float | None = None
    batch: int = 128
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
        for name in ("steps", "minutes", "batch", "lr", "grad_clip", "log_every"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and isfinite(value)):
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
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


def preset(data: Dataset) -> TrainConfig:
    """What works for the kind of data: the paper's for images, shorter runs with cosine decay for digits and points."""
    if len(data.shape) == 1:
        return TrainConfig(steps=4000, batch=512, lr=3e-3, warmup=200, decay="cosine", ema=0.999, log_every=50)
    if data.shape[-1] < 32:
        return TrainConfig(steps=4000, batch=128, lr=2e-3, warmup=200, decay="cosine", ema=0.999)
    return TrainConfig()
