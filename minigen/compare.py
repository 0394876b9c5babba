"""Is a run on track? Its loss beside that of a run that is known to have worked, at equal numbers of images seen.

The references ship in ``assets/curves.json``: the log of a real run per method and kind of data, thinned, with its
settings. Losses of different methods, noise levels or shapes of data are never compared; of two kinds of photographs of
one shape it cannot know.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import log2, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from . import checkpoint, log

CURVES = Path(__file__).parent / "assets" / "curves.json"
BAND = 0.05
"""Relative difference of losses that is nothing to worry about, beside three standard errors."""

LOSS: dict[str, tuple[str, ...]] = {
    "dpm": ("T", "beta_1", "schedule", "alpha_bar_T", "betas"),
    "ncsn": ("sigma_1", "sigma_L", "L", "sigma_data"),
    "ddpm": ("T", "beta_1", "beta_T", "schedule"),
    "pfgm": ("sigma", "tau", "M", "gamma", "z_min", "z_max", "target"),
    "pfgmpp": ("D", "sigma_data", "P_mean", "P_std"),
}
"""The fields of each method that decide what noise it sees, and so the value of its loss."""
SCHEDULE = ("steps", "minutes", "warmup", "decay")
"""The settings that decide the learning rate at a given number of images."""


@dataclass(frozen=True)
class Curve:
    """The log of a run.

    Attributes:
        info: its description, as ``Trainer.describe`` gives it.
        images: noisy images seen so far, one number per record, increasing.
        loss: the mean loss since the record before.
    """

    info: dict[str, Any]
    images: list[float]
    loss: list[float]

    def around(self, images: float) -> tuple[float, float]:
        """Mean loss, and its standard error, over the last fifth before ``images`` were seen.

        Raises:
            ValueError: if there are fewer than three records in it.
        """
        inside = [y for x, y in zip(self.images, self.loss, strict=True) if 0.8 * images <= x <= images]
        if len(inside) < 3:
            raise ValueError(f"too few records before {images:.0f} images: use a smaller --log-every")
        return fmean(inside), stdev(inside) / sqrt(len(inside))


@dataclass(frozen=True)
class Row:
    """One line of the comparison: images seen, the loss of the run and of the reference, and the band around 0.

    ``band`` is the relative difference that noise and taste explain: three standard errors of both, or 5 %.
    """

    images: float
    mine: float
    reference: float
    band: float

    @property
    def ratio(self) -> float:
        """Relative difference of the losses; positive: the run's is larger."""
        return self.mine / self.reference - 1

    @property
    def ok(self) -> bool:
        """Whether the difference is inside the band."""
        return abs(self.ratio) <= self.band


def points(info: dict[str, Any]) -> int:
    """Noisy images that the network sees in a step of the run that ``info`` describes."""
    return min(info["train"]["batch"], info["method_fields"].get("small_batch", info["train"]["batch"]))


def read(run: str | Path) -> Curve:
    """The curve of a run's folder.

    Raises:
        ValueError: if there is no log.
        CheckpointError: if there is no checkpoint.
    """
    _, info = checkpoint.read(run, with_tensors=False)
    rows = [row for row in log.read(Path(run) / "log.csv") if row["step"] <= info["step"]]
    if len(rows) < 3:
        raise ValueError(f"there is nothing to compare in {Path(run) / 'log.csv'}: train longer, or log more often")
    return Curve(info, [row["step"] * points(info) for row in rows], [row["loss"] for row in rows])


def reference(info: dict[str, Any], curves: Path = CURVES) -> tuple[str, Curve]:
    """The reference for a run of this description: same method, loss and shape of the data, nearest width and batch.

    Raises:
        ValueError: if none ships.
    """
    known = {name: Curve(**c) for name, c in json.loads(curves.read_text()).items()}
    like = {
        name: c
        for name, c in known.items()
        if c.info["method"] == info["method"] and list(c.info["net"]["shape"]) == list(info["net"]["shape"])
    }
    fields = json.loads(json.dumps(info["method_fields"]))
    decisive = LOSS.get(info["method"], ())
    other = [
        {k: v for k, v in c.info["method_fields"].items() if k in decisive and v != fields.get(k)}
        for c in like.values()
    ]
    if other and all(other):
        raise ValueError(f"another loss than that of the references: theirs have {' or '.join(map(_words, other))}")
    like = {name: c for (name, c), differs in zip(like.items(), other, strict=True) if not differs}
    if not like:
        shape = "x".join(map(str, info["net"]["shape"]))
        raise ValueError(f"no reference for {info['method']} on data of shape {shape}: {', '.join(known)}")

    def far(item: tuple[str, Curve]) -> tuple[float, float]:
        other = item[1].info
        return abs(other["net"]["width"] - info["net"]["width"]), abs(log2(points(other) / points(info)))

    return min(like.items(), key=far)


def _words(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def compare(run: Curve, other: Curve, lines: int = 5) -> list[Row]:
    """The losses at up to ``lines`` numbers of images seen by both, each twice the one before.

    Raises:
        ValueError: if the two share no stretch.
    """
    end, rows = min(run.images[-1], other.images[-1]), []
    for k in range(lines - 1, -1, -1):
        try:
            (a, da), (b, db) = (curve.around(end / 2**k) for curve in (run, other))
        except ValueError:
            continue
        band = max(BAND, 3 * sqrt(da**2 + db**2) / abs(b))
        rows.append(Row(end / 2**k, a, b, band))
    if not rows:
        raise ValueError("the run has no stretch in common with the reference: train longer, or log more often")
    return rows


def causes(run: Curve, other: Curve, rows: list[Row]) -> list[str]:
    """What may explain the last row, the likely first; empty if the run is on track."""
    last = rows[-1]
    if last.ok:
        return []
    mine, theirs = run.info, other.info
    found = []
    tail = run.around(run.images[-1])[0]
    if tail > 1.3 * min(run.around(x)[0] for x in (r.images for r in rows)):
        found.append("the loss rises again: a smaller --lr, or --grad-clip 1")
    settings = {name: (mine["train"][name], theirs["train"][name]) for name in ("lr", "grad_clip", "precision")}
    settings |= {name: (mine["net"][name], theirs["net"][name]) for name in ("width", "blocks", "dropout")}
    settings["groups"] = tuple(net.get("groups", 32) for net in (mine["net"], theirs["net"]))
    settings["the batch"] = points(mine), points(theirs)
    found += [f"{name} is {a}, there it is {b}" for name, (a, b) in settings.items() if a != b]
    n = mine["data"]["n"]
    if last.ratio < 0 and n < theirs["data"]["n"] / 2:
        found.append(f"{n} images are few: a small loss may mean that they are known by heart")
    if any(mine["train"].get(k) != theirs["train"].get(k) for k in SCHEDULE):
        found.append("the schedules differ, so the learning rate was another at this number of images")
    return found or ["the settings agree, so look at the data: RUN/samples, values in [-1, 1], images the right way up"]
