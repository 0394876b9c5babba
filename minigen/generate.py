"""Draw from a trained network with a chosen sampler, count what it costs, and make a picture of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import samplers
from .core import Method, Net, sample, seeded

LEAST_SIGMA = 0.01
"""Where the adaptive solver hands over to one call of the denoiser: noise below the gray levels of an image."""
TOLERANCE = 1e-3
"""Of the adaptive solver; a smaller one costs several times as many calls and shows no difference in the samples."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".npy")
"""Files that samples are written to."""


def draw(
    method: Method,
    net: Net,
    shape: Sequence[int],
    *,
    sampler: str = "ddim",
    steps: int = 50,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> tuple[Tensor, float]:
    """Samples of the given shape ``n *d`` (on the CPU), and how often the network was called for each.

    Args:
        method: what the network was trained with.
        net: ``(x: b *d, u: b) -> b *o``.
        shape: of the result.
        sampler: ``ddim``, ``euler``, ``heun`` and ``rk45`` need a method with a ``denoiser``; ``paper`` is the method's
            own. Without fresh noise, as here, ``ddim`` and ``euler`` are one method, good for every kernel.
        steps: noise levels of ``ddim``, ``euler`` and ``heun``.
        seed: same seed, same samples.
        device: where to draw.
        precision: ``bf16`` runs the network in mixed precision.

    Raises:
        ValueError: if ``n`` is not positive, the method does not have this sampler, or a sample is not finite.
    """
    (n, *d), calls = shape, 0
    if n < 1:
        raise ValueError(f"--n must be positive, got {n}")

    def counted(x: Tensor, u: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return net(x, u) if precision == "fp32" else _mixed(net, x, u)

    at_once = max(1, (2**18 if torch.device(device).type == "cpu" else 2**20) // prod(d))  # what fits into memory
    sizes = [len(part) for part in torch.empty(n).split(at_once)]
    with torch.no_grad(), seeded(seed):
        bar = tqdm(sizes, desc="sampling", unit="batch", leave=False, disable=len(sizes) == 1)
        x = torch.cat([_draw(method, counted, (size, *d), sampler, steps, device).cpu() for size in bar])
    return finite(x), calls / len(sizes)


def finite(x: Tensor) -> Tensor:
    """The samples themselves, if they are numbers.

    Raises:
        ValueError: if one of them has a number that is not finite.
    """
    if bad := int((~x.isfinite()).flatten(1).any(1).sum()):
        what = f"{bad:,} of {len(x):,} samples are not finite numbers: the run diverged"
        raise ValueError(f"{what}; take an earlier snapshot, or train again with a smaller --lr")
    return x


def _mixed(net: Net, x: Tensor, u: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        return net(x, u).to(x.dtype)


def _draw(method: Any, net: Net, shape: Sequence[int], sampler: str, steps: int, device: torch.device | str) -> Tensor:
    if sampler == "paper":
        return sample(method, net, shape, device)
    if not hasattr(method, "denoiser"):
        raise ValueError(f"{type(method).__name__} has no denoiser for {sampler}: use --sampler paper")
    sigmas, denoiser = method.sigmas(steps), method.denoiser(net)
    x = method.start(shape, sigmas[0], device)
    if sampler == "rk45":
        x = samplers.rk45(samplers.probability_flow(denoiser), x, float(sigmas[0]), LEAST_SIGMA, TOLERANCE).x
        return denoiser(x, torch.full((len(x),), LEAST_SIGMA, device=x.device))
    if sampler == "ddim":
        *_, x = samplers.ddim(denoiser, x, sigmas)
    elif sampler == "euler":
        *_, x = samplers.euler(samplers.probability_flow(denoiser), x, sigmas)
    elif sampler == "heun":
        *_, x = samplers.heun(samplers.probability_flow(denoiser), x, sigmas)
    else:
        raise ValueError(f"unknown sampler {sampler!r}: use ddim, euler, heun, rk45 or paper")
    return x


def check_place(path: Path) -> None:
    """See that a file can be written, before hours are spent on what it should hold; makes its folder.

    Raises:
        OSError: if it cannot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"cannot write to {path}: choose another place")


def check_suffix(path: Path) -> None:
    """See that ``picture`` can write this kind of file.

    Raises:
        ValueError: if it cannot.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} is no kind of file to write samples to: let it end in {', '.join(SUFFIXES)}")


def picture(x: Tensor, path: str | Path) -> None:
    """Write ``x`` as a grid of images (``n c h w`` in [-1, 1]), a scatter plot (``n d``), or raw numbers (``.npy``)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".npy":
        import numpy as np

        with path.open("wb") as f:  # numpy itself would add another suffix to .NPY
            np.save(f, x.numpy())
        return
    from . import viz

    if x.ndim == 4:
        from PIL import Image

        zoom = max(1, 64 // x.shape[-1])  # small images would be hard to see
        grid = viz.image_grid(x.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3), gap=2)
        Image.fromarray(grid).save(path)
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4))
    viz.points(figure.add_subplot(), x, color=viz.MODEL)
    figure.savefig(path, dpi=130)
