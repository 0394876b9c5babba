"""Features of images, and what is measured with them: Frechet distance, precision and recall.

============  ==============================================================================================
``cifar``     128 features of a classifier of 3x32x32 images that ships with the package
``digits``    32 features of a classifier of 1x8x8 images that ships with the package
``inception`` 2,048 features of the Inception network of the literature: with these, and 50,000 samples against the
              50,000 training images, the Frechet distance is the FID of the papers
``NAME``      a file of your own, NAME.safetensors, from ``python -m minigen train classifier``
============  ==============================================================================================

Numbers from different features have nothing in common; everything here carries the name of its features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import classifier
from .data import to_float
from .fields import squared_distances
from .images import ASSETS

SHIPPED = {"cifar": ASSETS / "classifier_cifar10.safetensors", "digits": ASSETS / "classifier_digits.safetensors"}
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d"
"""How the sum of the file begins; no other file is read, since this one must be unpickled."""
BATCH = 250
"""Images at a time, always: so the same images give the same features, bit for bit."""
ROWS = 1000
"""Points at a time whose distances to all others are formed."""


@dataclass(frozen=True)
class Features:
    """A named map from pictures to features.

    Attributes:
        name: as in the keys of results, for example ``cifar``.
        about: what they come from, in words.
        extract: ``uint8 b c h h`` with values 0 .. bins - 1, and ``bins``, to ``b f``.
    """

    name: str
    about: str
    extract: Callable[[Tensor, int], Tensor]

    @torch.no_grad()
    def __call__(self, x: Tensor, bins: int, device: torch.device | str = "cpu") -> Tensor:
        """The features of pictures ``x``, uint8 ``n c h h`` with values 0 .. bins - 1: float32 ``n f``, on the CPU."""
        if x.dtype != torch.uint8:
            raise ValueError(f"features are those of pictures in uint8, got {x.dtype}")
        return torch.cat([self.extract(part.to(device), bins).float().cpu() for part in x.split(BATCH)])


def find(
    name: str,
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    weights: str | Path | None = None,
    offline: bool = False,
) -> Features | None:
    """The features called ``name``, for images of the given shape.

    Args:
        name: ``cifar``, ``digits``, ``inception``, a file NAME.safetensors, ``none``, or ``auto``: what ships for this
            shape, if anything does.
        shape: of one sample.
        device: where they are computed.
        weights: the file of the Inception network, if not where torch keeps downloads.
        offline: download nothing.

    Raises:
        ValueError: in one line, if there are no such features, or they do not fit the shape.
    """
    if name == "auto":
        name = {(3, 32, 32): "cifar", (1, 8, 8): "digits"}.get(tuple(shape), "none")
    if name == "none":
        return None
    if name == "inception":
        if len(shape) != 3:
            raise ValueError(f"--features inception needs images, these data have the shape {tuple(shape)}")
        return _inception(_inception_file(weights, offline), device)
    if name not in SHIPPED and not name.endswith(".safetensors"):
        raise ValueError(f"unknown features {name!r}: use auto, {', '.join(SHIPPED)}, inception, none or a file")
    net, info = classifier.load(SHIPPED.get(name, name))
    if tuple(shape) != net.config.shape:
        raise ValueError(f"the features {name} are of images {net.config.shape}, these data have {tuple(shape)}")
    net.to(device)
    about = f"a classifier of {info.get('data')}, test accuracy {info.get('accuracy', float('nan')):.2%}"
    key = name if name in SHIPPED else f"file_{Path(name).stem}"
    return Features(key, about, lambda x, bins: net.features(to_float(x, bins)))


def _inception_file(weights: str | Path | None, offline: bool) -> Path:
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rpartition("/")[2]).expanduser()
    if not path.is_file():
        how = f"get {INCEPTION_URL} and give --inception-weights PATH, or use other --features"
        if weights or offline:
            raise ValueError(f"the Inception network is not in {path}: {how}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), INCEPTION_SHA256)
        except (OSError, RuntimeError) as e:
            raise ValueError(f"the Inception network cannot be downloaded ({type(e).__name__}): {how}") from e
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(INCEPTION_SHA256):
        raise ValueError(f"{path} is not the Inception network of the literature: get {INCEPTION_URL}")
    return path


def _inception(path: Path, device: torch.device | str) -> Features:
    from torchmetrics.image.fid import FrechetInceptionDistance

    # antialias=False is the resizing of the literature
    net = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(path), antialias=False).inception.to(device)

    def extract(x: Tensor, bins: int) -> Tensor:
        x = x if bins == 256 else (x.float() * (255 / (bins - 1))).round().to(torch.uint8)
        return net(x.expand(-1, 3, -1, -1))

    return Features("inception", "the Inception network of the literature", extract)


class _Given(nn.Module):
    """Features that are there already, for a metric that wants to compute them."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``b f``, as it is."""
        return x


def frechet(a: Tensor, b: Tensor) -> float:
    """The Frechet distance of two sets of features, ``n f`` and ``m f``, by torchmetrics in float64.

    The definition is that of ``evaluate.frechet_distance``. It is biased upward by an amount that falls about as 1/n:
    compare only with equal n.

    Raises:
        ValueError: if a set has fewer than two samples or the dimensions differ.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:]:
        raise ValueError(f"needs 2 or more samples of one shape in each set, got {[*a.shape]} and {[*b.shape]}")
    metric = FrechetInceptionDistance(_Given(a.shape[1]), antialias=False).set_dtype(torch.float64)
    for x, real in ((a, False), (b, True)):
        for part in x.double().split(4096):
            metric.update(part, real=real)
    return float(metric.compute())


def precision_recall(a: Tensor, b: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall of samples ``a``: ``n f`` of the data ``b``: ``m f`` (Kynkaanniemi, Karras, Laine,
    Lehtinen, Aila 2019, arXiv 1904.06991, eqs. 1 and 2).

    Around each point lies a ball that reaches to its k-th nearest neighbor in its own set. Precision is the part of
    the samples inside a ball of the data, recall the part of the data inside a ball of the samples.

    Raises:
        ValueError: if a set has ``k`` points or fewer, or the dimensions differ.
    """
    if min(len(a), len(b)) <= k or a.shape[1:] != b.shape[1:]:
        raise ValueError(f"needs more than {k} samples of one shape in each set, got {[*a.shape]} and {[*b.shape]}")
    a, b = a.double(), b.double()
    radii_a, radii_b = _radii(a, k), _radii(b, k)
    precise, found = torch.zeros(len(a)), torch.zeros(len(b), dtype=torch.bool)
    for start in range(0, len(a), ROWS):
        rows = slice(start, start + ROWS)
        near = squared_distances(a[rows], b)
        precise[rows] = (near <= radii_b).any(1).float()
        found |= (near <= radii_a[rows, None]).any(0)
    return float(precise.double().mean()), float(found.double().mean())


def _radii(x: Tensor, k: int) -> Tensor:
    """The squared distance of each point to its k-th nearest neighbor; the nearest of all is the point itself."""
    parts = [squared_distances(part, x).topk(k + 1, dim=1, largest=False).values[:, k] for part in x.split(ROWS)]
    return torch.cat(parts)
