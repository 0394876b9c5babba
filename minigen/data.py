"""Data by name: known laws, 8x8 digits, CIFAR-10, any folder of images; and ``Batches``, which feeds them.

Images are decoded once and kept as uint8; points are float32. A whole data set is one tensor on the device, so there
are no worker processes, and the order of the data is one small state that a checkpoint can hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import images
from .core import seeded
from .laws import LAWS


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        name: what was asked for, for example ``folder:photos``.
        x: images, uint8 ``n c h w`` with values 0 .. bins - 1, or points, float32 ``n d``.
        bins: gray values of a pixel; 0 for points.
        flip: whether the mirror image of a sample is as good a sample.
        labels: ``n`` classes, where known.

    Raises:
        ValueError: if ``x`` and ``bins`` do not go together.
    """

    name: str
    x: Tensor
    bins: int = 0
    flip: bool = False
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.x.dtype == torch.uint8:
            if self.bins < 2 or len(self.x) and int(self.x.max()) >= self.bins:
                raise ValueError(f"images in uint8 need bins above their largest value (at least 2), got {self.bins}")
        elif self.x.dtype != torch.float32 or not self.x.isfinite().all():
            raise ValueError(f"data are uint8 images, or finite points in float32, got {self.x.dtype}")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: ``(d,)`` or ``(c, h, w)``."""
        return tuple(self.x.shape[1:])

    def samples(self, n: int, seed: int = 0) -> Tensor:
        """``n`` different samples (all, if there are fewer) in an order fixed by ``seed``, float32 ``n *d``."""
        return self._pick(seed, slice(0, n))

    def others(self, n: int, seed: int = 0) -> Tensor:
        """``n`` samples from the other end of the order of ``samples``: different ones while 2 n fits."""
        return self._pick(seed, slice(max(0, len(self.x) - n), None))

    def _pick(self, seed: int, part: slice) -> Tensor:
        index = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))[part]
        return to_float(self.x[index], self.bins)


def to_float(x: Tensor, bins: int = 256) -> Tensor:
    """uint8 values k = 0 .. bins - 1 as 2 k / (bins - 1) - 1 in [-1, 1]; float tensors (points) pass unchanged."""
    return x if x.is_floating_point() else x.float().mul_(2 / (bins - 1)).sub_(1)


def to_uint8(x: Tensor, bins: int = 256) -> Tensor:
    """The nearest of the ``bins`` values for each number of ``x`` in [-1, 1]; what lies outside is clipped."""
    return ((x + 1) * ((bins - 1) / 2)).round().clamp(0, bins - 1).to(torch.uint8)


def load(spec: str, split: str = "train", root: str | Path | None = None, offline: bool = False) -> Dataset:
    """A data set by name.

    Args:
        spec: ``digits``, ``cifar10``, ``folder:PATH``, or a law of ``laws.LAWS``.
        split: ``train`` or ``test``; for folders see ``images.folder``.
        root: where CIFAR-10 lies or is put; default: the variable MINIGEN_DATA, or ``~/.cache/minigen``.
        offline: download nothing (also with the variable MINIGEN_OFFLINE=1).

    Raises:
        ValueError: in one line that says what to do, if there is no such data, or it is not usable.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: use train or test")
    if spec.startswith("folder:"):
        x, labels = images.folder(spec.removeprefix("folder:"), split)
        return Dataset(spec, x, bins=256, flip=True, labels=labels)
    if spec in LAWS:
        with seeded(split == "test"):
            return Dataset(spec, LAWS[spec]().sample(50_000 if split == "train" else 10_000).float())
    if spec == "digits":
        x, labels = images.digits(split)
        return Dataset(spec, x, bins=17, labels=labels)
    if spec == "cifar10":
        place = Path(root or os.environ.get("MINIGEN_DATA") or "~/.cache/minigen").expanduser()
        x, labels = images.cifar10(split, place, offline or os.environ.get("MINIGEN_OFFLINE", "0") not in ("", "0"))
        return Dataset(spec, x, bins=256, flip=True, labels=labels)
    raise ValueError(f"unknown data {spec!r}: use cifar10, digits, folder:PATH, {', '.join(LAWS)}")


class Batches(Iterator[Tensor]):
    """An endless stream of batches, float32 ``b *d``, on the device of ``x``.

    The stream is one shuffled epoch after another; a batch may reach into the next epoch, so every sample comes exactly
    once per epoch and a batch may be larger than the data. The same seed gives the same stream on every device and in
    every process.

    Args:
        x: the data, uint8 ``n c h w`` or float32 ``n d``, on the device where the batches are wanted.
        batch: samples per batch.
        bins: gray values of a pixel.
        flip: mirror each image with probability 1/2.
        seed: of the order and the flips.
    """

    def __init__(
        self,
        x: Tensor,
        batch: int,
        *,
        bins: int = 256,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        if batch < 1 or not len(x):
            raise ValueError(f"batches need a positive size and at least one sample, got {batch} and {len(x)}")
        self.x, self.batch, self.bins, self.flip = x, batch, bins, flip
        self._random = torch.Generator().manual_seed(seed)  # on the CPU: the same order on every device
        self._left = torch.empty(0, dtype=torch.int64)

    def __next__(self) -> Tensor:
        if (missing := self.batch - len(self._left)) > 0:
            epochs = -(-missing // len(self.x))
            more = [torch.randperm(len(self.x), generator=self._random) for _ in range(epochs)]
            self._left = torch.cat([self._left, *more])
        index, self._left = self._left[: self.batch], self._left[self.batch :]
        x = self.x[index.to(self.x.device, non_blocking=True)]
        if self.flip:
            mirror = (torch.rand(self.batch, generator=self._random) < 0.5).to(x.device, non_blocking=True)
            x = torch.where(mirror[:, None, None, None], x.flip(3), x)
        return to_float(x, self.bins)

    def state(self) -> dict[str, Tensor]:
        """What is left of the epoch, and the state of the generator."""
        return {"left": self._left.clone(), "random": self._random.get_state()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue exactly where ``state`` was taken."""
        self._left = state["left"].clone()
        self._random.set_state(state["random"])
