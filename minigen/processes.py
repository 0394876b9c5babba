"""Where the training runs: the device, the processes that share the work, and the random numbers of this one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .core import seeded

T = TypeVar("T")


def pick_device(name: str) -> torch.device:
    """``auto`` (a CUDA device if there is one), ``cpu`` or ``cuda``.

    Raises:
        ValueError: if CUDA is asked for and absent, or the name is none of these.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here: use --device cpu")
    return torch.device(name)


@contextmanager
def enough_memory() -> Iterator[None]:
    """Inside a ``with`` block a lack of memory is said in one line that names the options to change.

    Raises:
        RuntimeError: that line.
    """
    try:
        yield
    except RuntimeError as e:  # of which torch.OutOfMemoryError is one; on the CPU only the words tell it
        if not isinstance(e, torch.OutOfMemoryError) and "can't allocate memory" not in str(e):
            raise
        how = "cut the step with a larger --accumulate (the same batch in parts), or use a smaller --batch or --width"
        raise RuntimeError(f"out of memory: {how}") from e


class Processes:
    """This process and its siblings: one alone, or as many as ``torchrun`` or ``accelerate launch`` started.

    Attributes:
        device: of this process.
        rank: number of this process.
        world: how many there are.
    """

    def __init__(self, device: str = "auto") -> None:
        from accelerate import Accelerator

        chosen, several = pick_device(device), int(os.environ.get("WORLD_SIZE", "1")) > 1
        self._accelerator = Accelerator(device_placement=False, cpu=several and chosen.type == "cpu")
        self.device = self._accelerator.device if several else chosen
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes

    def wrap(self, net: nn.Module) -> nn.Module:
        """``net`` for training: where there are several processes, its gradients become their mean."""
        return self._accelerator.prepare(net)

    def together(self, net: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around a backward pass of ``net``, as ``wrap`` gave it: gradients travel in the ``last`` one only."""
        return nullcontext() if last else self._accelerator.no_sync(net)

    def any(self, mine: bool) -> bool:
        """Whether any process says yes; all of them must ask."""
        return mine if self.world == 1 else bool(self.mean(torch.tensor(float(mine), device=self.device)) > 0)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of ``x`` over the processes."""
        return x if self.world == 1 else self._accelerator.reduce(x.clone(), "mean")

    def first(self, x: float) -> float:
        """The number that process 0 has."""
        if self.world == 1:
            return x
        from accelerate.utils import broadcast

        return float(broadcast(torch.tensor(x, dtype=torch.float64, device=self.device)))

    def gather(self, x: T) -> list[T]:
        """``x`` of every process, in the order of their numbers."""
        if self.world == 1:
            return [x]
        from accelerate.utils import gather_object

        return gather_object([x])

    def wait(self) -> None:
        """Wait until every process is here."""
        self._accelerator.wait_for_everyone()


class Stream:
    """Random numbers apart: inside a ``with`` block torch draws from this stream, outside from the usual one."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        if self._cuda:
            torch.cuda.init()  # so that ``seeded`` covers the device
        with seeded(seed):
            self.state = self._get()
        self._outside = self.state

    def __enter__(self) -> None:
        self._outside = self._get()
        self._set(self.state)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.state = self._get()
        self._set(self._outside)

    def _get(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        return state | {"cuda": torch.cuda.get_rng_state(self._cuda)} if self._cuda else state

    def _set(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self._cuda and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self._cuda)
