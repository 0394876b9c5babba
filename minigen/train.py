"""Training: one loop for every method, on one processor or many, that can stop and continue exactly.

::

    trainer = Trainer(method, net, data, preset(data))
    for record in trainer:                # a generator: plot, save, sample or stop between two steps
        print(record)

The trainer has random numbers of its own, so that nothing done between two steps changes the training. On the CPU,
stopping and continuing from a checkpoint gives the same bits as never stopping.

The batch of a step is cut into ``parts``: one for each process, or ``accumulate`` of them, done one after the other.
Each part has its own random numbers, so two processes with one part each and one process with two train the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .core import Crowd, Method, Record
from .data import Batches, Dataset
from .processes import Processes, Stream, enough_memory
from .recipe import TrainConfig, preset

__all__ = ["Ema", "TrainConfig", "Trainer", "preset"]


class Ema:
    """The exponential moving average of a network's weights, with decay min(decay, (1 + n) / (10 + n)) at update n.

    Attributes:
        net: a copy of the network with the averaged weights, in evaluation mode.
        decay: the decay after the ramp.
        updates: how many there were.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.net, self.decay, self.updates = deepcopy(net).requires_grad_(False).eval(), decay, 0
        self._weights = list(self.net.parameters()), list(net.parameters())
        self._buffers = list(zip(self.net.buffers(), net.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average toward the present weights of the network; other state (buffers) is copied."""
        self.updates += 1
        torch._foreach_lerp_(*self._weights, 1 - min(self.decay, (1 + self.updates) / (10 + self.updates)))
        for mine, other in self._buffers:
            mine.copy_(other)


class Trainer:
    """Trains a network in place; iterate over it.

    Args:
        method: whose loss is minimized.
        net: what is trained, with its description in ``net.config``.
        data: what to train on; it is moved to the device as a whole.
        config: how to train.
        device: ``auto``, ``cpu`` or ``cuda``; under ``torchrun`` or ``accelerate launch`` each process takes its own.

    Attributes:
        step: updates done.
        seconds: time they took, including what the caller did between them.
        ema: the averaged weights, ``ema.net``.
        parts: into which a step is cut, over all processes.
        points: noisy samples that the network sees in a step: those of the batch, or as many as the method takes of it.

    Raises:
        ValueError: if the points of a step cannot be cut into the parts.
    """

    def __init__(
        self, method: Method, net: nn.Module, data: Dataset, config: TrainConfig, device: str = "auto"
    ) -> None:
        self.method, self.net, self.data, self.config = method, net, data, config
        self.processes = here = Processes(device)
        self.device = here.device
        self._layout = torch.channels_last if len(data.shape) == 3 else torch.contiguous_format
        net.to(self.device, memory_format=self._layout)
        self.ema = Ema(net, config.ema)
        if config.compile:
            net.compile()  # in place: the names of the weights stay as they are
        self._weights = list(net.parameters())
        self.optimizer = torch.optim.Adam(self._weights, lr=config.lr, fused=True)
        self._parallel = here.wrap(net)
        self.batches = Batches(data.x.to(self.device), config.batch, bins=data.bins, flip=data.flip, seed=config.seed)
        self.parts = here.world * config.accumulate
        self.points = min(config.batch, method.small_batch) if isinstance(method, Crowd) else config.batch
        if self.points % self.parts:
            by = f"{here.world} processes x --accumulate {config.accumulate}"
            raise ValueError(f"the {self.points} samples of a step cannot be cut into {self.parts} parts ({by})")
        mine = range(here.rank * config.accumulate, (here.rank + 1) * config.accumulate)
        self._streams = {i: Stream(config.seed + 1_000_003 * i, self.device) for i in mine}
        self.step, self.seconds, self._count = 0, 0.0, 0
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)  # the sum over _count steps
        self._norm, self._lr = torch.zeros((), device=self.device), 0.0

    @property
    def progress(self) -> float:
        """The part of the run that is done, 0 to 1."""
        return self.config.progress(self.step, self.seconds)

    def __iter__(self) -> Iterator[Record]:
        """One record every ``log_every`` steps and at the end."""
        return (record for record in self.steps() if record)

    def steps(self) -> Iterator[Record | None]:
        """One item per step: a record every ``log_every`` steps and at the end, else ``None``.

        Raises:
            FloatingPointError: if the loss or the gradient is not finite.
            RuntimeError: if the memory is too small, with the options to change.
        """
        began, compiling = time.monotonic() - self.seconds, self.config.compile
        while self.progress < 1:
            with enough_memory():
                self._update()
            if compiling:  # that is no training: it must not cost a budget of time its warmup
                began, compiling = time.monotonic() - self.seconds, False
            seconds = time.monotonic() - began
            self.seconds = self.processes.first(seconds) if self.config.minutes else seconds
            due = self.step % self.config.log_every == 0 or self.progress >= 1
            yield self._record() if due else None

    def _update(self) -> None:
        if not self.net.training:
            self.net.train()
        self.optimizer.zero_grad()  # first, in case the last step was interrupted
        x = next(self.batches)
        for i, stream in self._streams.items():
            with stream, self.processes.together(self._parallel, i == max(self._streams)):
                loss = self._loss_of_part(x, i) / len(self._streams)
                loss.backward()
            self._loss += loss.detach()
        self._norm = self._clip()
        self._lr = self.config.rate(self.step, self.seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr
        self.optimizer.step()
        self.ema.update()
        self.step, self._count = self.step + 1, self._count + 1

    def _clip(self) -> Tensor:
        """Have Adam shorten the gradient, as it reads it, to the largest norm allowed; returns the norm it had."""
        norm = _total_norm([p.grad for p in self._weights if p.grad is not None])
        self.optimizer.grad_scale = (norm / self.config.grad_clip).clamp(min=1)  # what loss scaling divides by
        return norm

    def _loss_of_part(self, x: Tensor, i: int) -> Tensor:
        """The mean loss of the ``i``-th part of the batch ``x``."""
        if isinstance(self.method, Crowd):
            method, x = self.method.share(x, i, self.parts)
            return method.loss(self._call, x).mean()
        x = x.chunk(self.parts)[i].contiguous(memory_format=self._layout)
        return self.method.loss(self._call, x).mean()

    def _call(self, x: Tensor, u: Tensor) -> Tensor:
        """The network, and only the network, in mixed precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            out = self._parallel(x, u)
        return out.float()

    def _record(self) -> Record:
        self._check()
        record = Record(self.step, float(self.processes.mean(self._loss)) / self._count, float(self._norm), self._lr)
        self._loss, self._count = torch.zeros_like(self._loss), 0
        return record

    def _check(self) -> None:
        """Wait for the device and look at the numbers: a run that has diverged must not overwrite a good checkpoint."""
        if not isfinite(self._loss) or not isfinite(self._norm):
            raise FloatingPointError(f"the loss is not finite at step {self.step}: use a smaller --lr or fp32")

    def save(self, path: str | Path) -> None:
        """Write all that sampling and continuing need into one file. With several processes, all must call it."""
        self._check()
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.net.state_dict().items()}
        for name, p in self.net.named_parameters():
            tensors |= {f"adam.{k}.{name}": v for k, v in self.optimizer.state[p].items()}
        tensors |= {f"batches.{k}": v for k, v in self.batches.state().items()}
        for streams in self.processes.gather({i: stream.state for i, stream in self._streams.items()}):
            tensors |= {f"random.{i}.{k}": v for i, state in streams.items() for k, v in state.items()}
        tensors["loss"] = self.processes.mean(self._loss)
        try:
            if self.processes.rank == 0:
                checkpoint.write(path, tensors, self.describe())
        finally:  # nobody waits for one that failed
            self.processes.wait()

    def export(self, path: Path) -> None:
        """Write the averaged weights alone, in half precision; only the first of several processes does."""
        tensors = {f"ema.{k}": v for k, v in self.ema.net.state_dict().items()}
        if self.processes.rank == 0:
            checkpoint.export(path, tensors, self.describe(), torch.float16)

    def describe(self) -> dict[str, Any]:
        """The run in plain values: method, network, configuration, data, progress."""
        return {
            "method": type(self.method).__name__.lower(),
            "method_fields": asdict(self.method),
            "net": asdict(self.net.config),
            "train": asdict(self.config),
            "data": {"spec": self.data.name, "n": len(self.data), "bins": self.data.bins, "flip": self.data.flip},
            "step": self.step,
            "seconds": self.seconds,
            "count": self._count,
        }

    def load(self, path: str | Path) -> None:
        """Continue from a file that ``save`` wrote, with the same network and data.

        The continuation is exact when the number of parts is the same, however many processes share them.

        Raises:
            checkpoint.CheckpointError: if it cannot be read or belongs to another network or other data.
        """
        tensors, info = checkpoint.read(path)
        if "loss" not in tensors:
            raise checkpoint.CheckpointError(f"{path} holds the averaged weights alone: training cannot go on from it")
        if (n := info["data"]["n"]) != len(self.data):
            raise checkpoint.CheckpointError(f"{path} was trained on {n} samples, the data now has {len(self.data)}")
        checkpoint.restore(self.net, tensors, "net.", path)
        checkpoint.restore(self.ema.net, tensors, "ema.", path)
        for name, p in self.net.named_parameters():
            self.optimizer.state[p].clear()
            for k in ("exp_avg", "exp_avg_sq", "step"):  # none of them before the first update
                if (v := tensors.get(f"adam.{k}.{name}")) is not None:  # in the memory format of p, as Adam makes them
                    self.optimizer.state[p][k] = torch.empty_like(p if v.ndim else v, device=p.device).detach().copy_(v)
        self.batches.restore({k: tensors[f"batches.{k}"] for k in ("left", "random")})
        for i, stream in self._streams.items():
            mine = f"random.{i}."
            stream.state |= {k.removeprefix(mine): v for k, v in tensors.items() if k.startswith(mine)}
        self.step, self.seconds, self._count = info["step"], info["seconds"], info["count"]
        self.ema.updates, self._loss = self.step, tensors["loss"].to(self.device)


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all of them together; on the CPU by BLAS, which shares a product among the threads, unlike torch."""
    if not all(g.is_cpu and torch.ops.aten.is_non_overlapping_and_dense(g) for g in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    flat = (g.as_strided((g.numel(),), (1,)) for g in gradients)  # in the order of the memory
    return torch.stack([g.dot(g) for g in flat]).sum().sqrt()
