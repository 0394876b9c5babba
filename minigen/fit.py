"""A training run in a folder: progress bar, log, sample grids, checkpoints, and an orderly end when interrupted."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from . import checkpoint, log
from .core import Record
from .generate import draw, picture
from .train import Trainer

GRIDS = 10
"""Sample grids per run, beside those asked for."""


def for_data(method: Any, shape: tuple[int, ...], given: Collection[str] = ()) -> Any:
    """The method with its defaults for data of this shape, where its class has such.

    Args:
        method: its fields stay as they are where they differ from the defaults of the class.
        shape: of one sample.
        given: names of fields that stay as they are in any case.
    """
    cls = type(method)
    if not hasattr(cls, "for_data"):
        return method
    usual = asdict(cls())
    kept = {name: value for name, value in asdict(method).items() if name in given or value != usual[name]}
    return replace(cls.for_data(shape), **kept)


class Signals:
    """Inside a ``with`` block Ctrl-C and SIGTERM set ``caught`` to the signal's number; a second one acts as usual."""

    def __init__(self) -> None:
        self.caught = 0
        self._before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def __enter__(self) -> Signals:
        for number in self._before:
            signal.signal(number, self._catch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.caught = number
        signal.signal(number, self._before[signal.Signals(number)])


class Marks:
    """``n`` marks, evenly spread over a run."""

    def __init__(self, n: int, progress: float) -> None:
        self.n, self._last = n, int(progress * n)

    def passed(self, progress: float) -> bool:
        """Whether a mark was passed since the last time."""
        before, self._last = self._last, int(progress * self.n)
        return self._last > before


def fit(
    trainer: Trainer, out: Path, sample_every: int, save_every: int, save_minutes: float, snapshots: int = 0
) -> int:
    """Train to the end, or until a signal.

    Args:
        trainer: fresh, or loaded from the checkpoint in ``out``.
        out: folder of the run.
        sample_every: steps between two grids; 0: only the ten that every run has.
        save_every: steps between two checkpoints; 0: by time only.
        save_minutes: minutes between two checkpoints.
        snapshots: points of the run at which the averaged weights are kept.

    Returns the exit code: 0, or 128 + the number of the signal.
    """
    if trainer.progress >= 1:
        print(f"{out} is complete at step {trainer.step}: give a larger --steps or --minutes to go on")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with alone(out) if trainer.processes.rank == 0 else nullcontext():
        return _fit(trainer, out, sample_every, save_every, save_minutes, snapshots)


def _fit(trainer: Trainer, out: Path, sample_every: int, save_every: int, save_minutes: float, snapshots: int) -> int:
    here, file = trainer.processes, out / checkpoint.NAME
    if not trainer.step:
        trainer.save(file)  # a full disk or a forbidden folder shows now, not after an hour
    if here.rank == 0:
        (out / "config.json").write_text(json.dumps(trainer.describe(), indent=2) + "\n")
    saved, grids, kept = time.monotonic(), Marks(GRIDS, trainer.progress), Marks(snapshots, trainer.progress)
    with Signals() as signals, Report(trainer, out) as report:
        for record in trainer.steps():
            with unharmed():
                report.step(record)
            if grids.passed(trainer.progress) or _multiple(trainer.step, sample_every):
                with unharmed():
                    report.grid()
            if kept.passed(trainer.progress):
                with unharmed():
                    trainer.export(out / "snapshots" / f"step-{trainer.step:06d}.safetensors")
            ask = here.world == 1 or record is not None  # several processes agree, which costs time, only now and then
            stop = ask and here.any(signals.caught > 0)
            old = ask and here.any(time.monotonic() - saved > 60 * save_minutes)
            last = stop or trainer.progress >= 1
            if last or old or _multiple(trainer.step, save_every):
                with nullcontext() if last else unharmed():
                    trainer.save(file)
                saved = time.monotonic()
            if stop:
                break
    _farewell(trainer, out, snapshots)
    return 128 + (signals.caught or signal.SIGINT) if trainer.progress < 1 else 0


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Inside a ``with`` block no other process of this kind trains in the folder ``out``.

    Raises:
        ValueError: if another one does.
    """
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process trains in {out}: wait for its end, or choose another --out") from None
    except NotImplementedError:  # a file system that knows no locks
        pass
    try:
        yield
    finally:
        lock.release()


@contextmanager
def unharmed() -> Iterator[None]:
    """Inside a ``with`` block files that cannot be written and samples that are no numbers do not end the training."""
    try:
        yield
    except (OSError, ValueError) as e:
        tqdm.write(f"minigen: {e}; the training goes on", file=sys.stderr)


def _multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _farewell(trainer: Trainer, out: Path, snapshots: int) -> None:
    if trainer.processes.rank > 0:
        return
    if trainer.progress >= 1:
        print(f"{out / checkpoint.NAME}: {trainer.step} steps in {trainer.seconds:.0f} s")
        return
    again = f"python -m minigen train {trainer.describe()['method']} --out {shlex.quote(str(out))} --resume"
    again += f" --snapshots {snapshots}" if snapshots else ""
    print(f"minigen: stopped at step {trainer.step} and saved; continue with: {again}", file=sys.stderr)


class Report:
    """The bar, the log and the grids of a run; only the first of several processes reports."""

    def __init__(self, trainer: Trainer, out: Path) -> None:
        self.trainer, self.out, self.active = trainer, out, trainer.processes.rank == 0
        self._mark = trainer.step, trainer.seconds  # where the images per second are counted from

    def __enter__(self) -> Report:
        minutes, steps = self.trainer.config.minutes, self.trainer.config.steps
        self._by_time = minutes is not None
        total, unit = (round(60 * minutes), "s") if minutes is not None else (steps, "step")
        self._bar = tqdm(total=total, initial=self._position(), unit=unit, disable=not self.active, mininterval=0.5)
        self._log = log.Log(self.out / "log.csv", self.trainer.step) if self.active else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._log:
            self._log.close()
            if kind is None and log.read(self.out / "log.csv"):
                log.plot(self.out)

    def step(self, record: Record | None) -> None:
        """Move the bar; at a record, write the log."""
        t = self.trainer
        if not self.active:
            return
        self._bar.update(min(self._position(), self._bar.total) - self._bar.n)
        if record:
            images = (t.step - self._mark[0]) * t.points
            speed = images / max(t.seconds - self._mark[1], 1e-9)
            self._log.add(record, speed, t.seconds)
            self._bar.set_postfix_str(f"loss {record.loss:.4f}, {speed:.4g} images/s", refresh=False)
            self._mark = t.step, t.seconds

    def grid(self) -> None:
        """Draw a few samples with the averaged weights."""
        t = self.trainer
        if not self.active:
            return
        n = 16 if len(t.data.shape) == 3 else 2000
        began = time.monotonic()
        choice = {"sampler": "ddim" if hasattr(t.method, "denoiser") else "paper", "seed": t.config.seed}
        chain = getattr(t.method, "sigma", None)  # a chain of T steps has no more than T levels
        steps = min(20, len(chain) - 1) if isinstance(chain, Tensor) else 20
        x, _ = draw(t.method, t.ema.net, (n, *t.data.shape), steps=steps, device=t.device, **choice)
        picture(x, self.out / "samples" / f"step-{t.step:06d}.png")
        self._mark = self._mark[0], self._mark[1] + time.monotonic() - began

    def _position(self) -> int:
        return int(self.trainer.seconds) if self._by_time else self.trainer.step
