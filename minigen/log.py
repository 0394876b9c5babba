"""The log of a run: one line of CSV per record, cut back to the checkpoint when a run continues, and its plot."""

from __future__ import annotations

import csv
from pathlib import Path

from .core import Record

FIELDS = ("step", "loss", "grad_norm", "lr", "images_per_s", "seconds")


class Log:
    """``log.csv`` of a run, opened to continue after ``step`` updates: later lines are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [row for row in read(path) if row["step"] <= step] if step else []
        part = path.with_name(path.name + ".part")
        with part.open("w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(FIELDS)
            writer.writerows([int(row["step"]), *list(row.values())[1:]] for row in kept)
        part.replace(path)
        self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file)

    def add(self, record: Record, images_per_s: float, seconds: float) -> None:
        """Append one line; numbers keep all their digits."""
        values = (record.step, record.loss, record.grad_norm, record.lr, round(images_per_s, 2), round(seconds, 3))
        self._writer.writerow(values)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(path: Path) -> list[dict[str, float]]:
    """The lines of a log as numbers; a last line cut short by a crash is left out."""
    if not path.is_file():
        return []
    rows = []
    with path.open(newline="", errors="replace") as f:
        for row in list(csv.reader(f))[1:]:
            try:
                rows.append(dict(zip(FIELDS, map(float, row), strict=True)))
            except ValueError:
                continue
    return rows


def plot(run: Path) -> Path:
    """Draw loss and learning rate against the step to ``RUN/loss.png``.

    Raises:
        ValueError: if there is no log.
    """
    rows = read(run / "log.csv")
    if not rows:
        raise ValueError(f"there is nothing to plot in {run / 'log.csv'}: give the folder of a run that was trained")
    from matplotlib.figure import Figure

    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(6, 5), constrained_layout=True)
    for axes, key in zip(figure.subplots(2, sharex=True, height_ratios=(3, 1)), ("loss", "lr"), strict=True):
        axes.plot(steps, [row[key] for row in rows], color="#D55E00", linewidth=1.2)
        axes.set(ylabel={"loss": "loss", "lr": "learning rate"}[key], yscale="log" if key == "loss" else "linear")
    axes.set_xlabel("step")
    figure.savefig(run / "loss.png", dpi=130)
    return run / "loss.png"
