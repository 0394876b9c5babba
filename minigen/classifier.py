"""A small classifier of images, whose last hidden layer serves as features to compare sets of images with.

A residual network (He, Zhang, Ren, Sun 2016, arXiv 1512.03385): a convolution at full resolution, then one residual
block per halving of the resolution, the mean over the pixels (the features), and a linear layer. Labels do not fit
the contract of the methods, so it has a short training loop of its own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint
from .core import seeded
from .data import Dataset, to_float

KIND = "classifier"
"""How the header of the file says what it holds."""


@dataclass(frozen=True)
class ClassifierConfig:
    """The network; stored with its weights.

    Attributes:
        shape: of an image, ``(c, h, h)``.
        classes: how many there are.
        widths: channels at full resolution, then after each halving; the last is the number of features.
    """

    shape: tuple[int, int, int]
    classes: int
    widths: tuple[int, ...] = (16, 64, 128, 128)

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or self.shape[1] != self.shape[2] or self.shape[1] % 2 ** (len(self.widths) - 1):
            side = 2 ** (len(self.widths) - 1)
            raise ValueError(f"the classifier needs square images with a multiple of {side} pixels, got {self.shape}")
        if self.classes < 2:
            raise ValueError(f"a classifier needs 2 or more classes, got {self.classes}")


@dataclass(frozen=True)
class ClassifierRecipe:
    """How to train it: stochastic gradient descent with one cycle of the learning rate.

    Attributes:
        epochs: passes over the data.
        batch: images per step.
        lr: the largest learning rate; it rises over a quarter of the training, then falls to 0, both linearly.
        seed: of the weights, the order, the flips and the shifts.
        shift: images move by up to so many pixels, their border mirrored.
        precision: ``bf16`` trains the network in mixed precision.
    """

    epochs: int = 16
    batch: int = 128
    lr: float = 0.1
    seed: int = 0
    shift: int = 4
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "lr"):
            value = getattr(self, name)
            if not (value > 0 and isfinite(value)):
                raise ValueError(f"--{name} must be positive, got {value}")


def preset(data: Dataset) -> tuple[ClassifierConfig, ClassifierRecipe]:
    """A network and a recipe for labeled images: 128 features from 16 pixels on, 32 below.

    Raises:
        ValueError: if the data have no labels, or are no images.
    """
    if len(data.shape) != 3 or data.labels is None:
        raise ValueError(f"{data.name} has no labels: use cifar10, digits, or a folder with train/CLASS/*.png")
    classes = int(data.labels.max()) + 1
    if data.shape[-1] < 16:
        return ClassifierConfig(data.shape, classes, (16, 32, 32)), ClassifierRecipe(80, 64, 0.05, shift=1)
    return ClassifierConfig(data.shape, classes), ClassifierRecipe()


class Classifier(nn.Module):
    """Images ``b c h h`` in [-1, 1] to ``b classes`` logits; ``features`` gives the ``b f`` numbers before them."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        first, *rest = config.widths
        blocks = [Block(a, b) for a, b in zip(config.widths, rest, strict=False)]
        self.body = nn.Sequential(_conv(config.shape[0], first), nn.ReLU(), *blocks)
        self.head = nn.Linear(config.widths[-1], config.classes)
        self.to(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> Tensor:
        """``x``: ``b c h h`` in [-1, 1]; returns ``b f``."""
        return self.body(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``b c h h`` in [-1, 1]; returns ``b classes``."""
        return self.head(self.features(x))


class Block(nn.Module):
    """A residual block that halves the resolution: ``b a h h`` to ``b c h/2 h/2``."""

    def __init__(self, a: int, c: int) -> None:
        super().__init__()
        self.first, self.second = _conv(a, c, stride=2), _conv(c, c)
        self.skip = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(a, c, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``b a h h``."""
        return F.relu(self.skip(x) + self.second(F.relu(self.first(x))))


def _conv(a: int, c: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, c, 3, stride, 1, bias=False), nn.BatchNorm2d(c))


def fit(
    data: Dataset, config: ClassifierConfig, recipe: ClassifierRecipe, device: torch.device | str = "cpu"
) -> Iterator[tuple[Classifier, dict[str, float]]]:
    """Train; after each epoch the network, and its mean loss and accuracy in training and the seconds so far.

    Same seed, same weights, on one machine with one number of threads.
    """
    with seeded(recipe.seed):
        net = Classifier(config).to(device)
        order = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    steps = -(-len(data) // recipe.batch) * recipe.epochs
    optimizer = torch.optim.SGD(net.parameters(), recipe.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    rate = lambda step: min((step + 1) / (0.25 * steps), (steps - step) / (0.75 * steps), 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    images, labels, began = data.x.to(device), data.labels.to(device), time.monotonic()
    for _ in range(recipe.epochs):
        total, right = torch.zeros(2, device=device)
        net.train()
        for part in torch.randperm(len(data), generator=order).split(recipe.batch):
            if len(part) < 2 <= len(data):
                continue  # one image has no variance to normalize by
            index = part.to(device)
            x = _augment(to_float(images[index], data.bins), recipe.shift, data.flip, order)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                logits = net(x)
            loss = F.cross_entropy(logits.float(), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(part)
            right += (logits.argmax(1) == labels[index]).sum()
        if not isfinite(total):
            raise FloatingPointError("the loss is not finite: use a smaller --lr or fp32")
        seconds = time.monotonic() - began
        yield net, {"loss": float(total) / len(data), "accuracy": float(right) / len(data), "seconds": seconds}


def _augment(x: Tensor, shift: int, flip: bool, random: torch.Generator) -> Tensor:
    """Each image moved by up to ``shift`` pixels and, with ``flip``, mirrored with probability 1/2."""
    side = x.shape[-1]
    padded = F.pad(x, (shift,) * 4, mode="reflect")
    i, j = torch.randint(2 * shift + 1, (2, len(x)), generator=random).to(x.device)
    x = padded.unfold(2, side, 1).unfold(3, side, 1)[torch.arange(len(x), device=x.device), :, i, j]
    mirror = (torch.rand(len(x), generator=random) < 0.5 * flip).to(x.device)
    return torch.where(mirror[:, None, None, None], x.flip(3), x)


@torch.no_grad()
def accuracy(net: Classifier, data: Dataset, batch: int = 500) -> float:
    """The part of the images of ``data`` whose label ``net`` finds."""
    net.eval()
    device = next(net.parameters()).device
    guess = [net(to_float(part.to(device), data.bins)).argmax(1).cpu() for part in data.x.split(batch)]
    return float((torch.cat(guess) == data.labels).float().mean())


def save(net: Classifier, path: str | Path, about: dict[str, Any]) -> None:
    """Write the weights in half precision, and in the header the network and ``about`` (plain JSON values)."""
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    checkpoint.write(path, tensors, {"kind": KIND, "net": asdict(net.config), **about})


def load(path: str | Path) -> tuple[Classifier, dict[str, Any]]:
    """The classifier in a file that ``save`` wrote, ready to use, and what its header says.

    Raises:
        ValueError: in one line, if there is none.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"there is no classifier {path}: make one with python -m minigen train classifier")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path} may not be read: ask its owner to change its permissions")
    try:
        with safe_open(path, framework="pt") as f:
            info = json.loads((f.metadata() or {}).get("minigen", "{}"))
            tensors = {k: f.get_tensor(k).float() for k in f.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, ValueError, OSError) as e:
        raise ValueError(f"{path} is damaged or not a classifier: train it again, or take another copy") from e
    if not isinstance(info, dict) or info.get("kind") != KIND or not isinstance(info.get("net"), dict):
        raise ValueError(f"{path} holds no classifier: make one with python -m minigen train classifier")
    net = Classifier(checkpoint.construct(ClassifierConfig, info["net"], path))
    checkpoint.restore(net, tensors, "", path)
    return net.requires_grad_(False).eval(), info
