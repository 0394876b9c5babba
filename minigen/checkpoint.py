"""A run in one file: tensors in the safetensors format, everything else as JSON in its header.

The file is written under another name, flushed to the disk and renamed, so a half-written one is never read under its
own name. Nothing is unpickled: a checkpoint from a stranger is data, not code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .core import Method
from .nets import NetConfig, build

FORMAT = 1
PARTS: dict[str, type | tuple[type, ...]] = {
    "method": str, "method_fields": dict, "net": dict, "train": dict, "data": dict,
    "step": int, "seconds": (int, float), "count": int,
}  # fmt: skip
"""What the header of a checkpoint holds."""
NAME = "checkpoint.safetensors"
T = TypeVar("T")


class CheckpointError(ValueError):
    """A file that cannot be used as a checkpoint; the message is one line."""


@dataclass(frozen=True)
class Run:
    """A trained model, ready to sample from.

    Attributes:
        method: with the hyper-parameters it was trained with.
        net: with the averaged (EMA) weights, in evaluation mode.
        shape: of one sample.
        data: what it was trained on, a name for ``data.load``.
        bins: gray values of a pixel, 0 for points.
        step: updates done.
        seconds: time they took.
    """

    method: Method
    net: nn.Module
    shape: tuple[int, ...]
    data: str
    bins: int
    step: int
    seconds: float


def load(path: str | Path, methods: Mapping[str, type[Method]], device: torch.device | str = "cpu") -> Run:
    """The trained model in a run's folder or in a checkpoint file.

    Args:
        path: the folder or the file.
        methods: the classes by name, ``methods.METHODS``.
        device: where to put the network.

    Raises:
        CheckpointError: if there is none, or it cannot be used.
    """
    tensors, info = read(path)
    method = construct_method(info, methods, path)
    net = construct_net(info, path)
    restore(net, tensors, "ema.", path)
    net = net.requires_grad_(False).eval().to(device)
    data = info["data"]
    return Run(method, net, net.config.shape, data["spec"], data["bins"], info["step"], info["seconds"])


def find(path: str | Path) -> Path:
    """The checkpoint file of a run's folder; a file is taken as it is."""
    return Path(path) / NAME if Path(path).is_dir() else Path(path)


def write(path: str | Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write ``tensors`` and ``info`` (plain JSON values) so that ``path`` is always the whole old file or the new.

    Raises:
        OSError: if it cannot be written; the old file, if there is one, stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    part = path.with_name(path.name + ".part")
    text = json.dumps({"format": FORMAT, **info})
    part.unlink(missing_ok=True)
    try:
        part.touch()
        mode = part.stat().st_mode  # what the umask gives; safetensors would let nobody else read the file
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, metadata={"minigen": text})
        if part.stat().st_mode != mode:  # some file systems have one mode for all files, and refuse to change it
            part.chmod(mode)
        with part.open("rb+") as f:
            os.fsync(f.fileno())
        part.replace(path)
    except SafetensorError as e:
        raise OSError(f"cannot write {path} (what was there before stays): {e}") from e
    finally:
        part.unlink(missing_ok=True)


def export(path: str | Path, tensors: dict[str, Tensor], info: dict[str, Any], kind: torch.dtype) -> None:
    """Write the averaged weights among ``tensors``, as numbers of the given ``kind``: enough to sample from.

    Of a folder of images only the name is kept: the file is made to be shared.

    Raises:
        ValueError: if one of them does not fit.
    """
    kept = {name: tensor.to(kind) for name, tensor in tensors.items() if name.startswith("ema.")}
    if not all(tensor.isfinite().all() for tensor in kept.values()):
        raise ValueError("a weight is too large for half precision, or not a number: try --precision fp32")
    kind_of_data, colon, place = info["data"]["spec"].partition(":")
    spec = f"{kind_of_data}{colon}{Path(place).name}"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write(path, kept, info | {"data": {**info["data"], "spec": spec}})


def read(path: str | Path, with_tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU, if wanted) and the rest of a checkpoint file, or of the one in a run's folder.

    Raises:
        CheckpointError: if the file is missing, cut short, not a checkpoint, or from another version.
    """
    from safetensors import SafetensorError, safe_open

    file = find(path)
    if not file.is_file():
        raise CheckpointError(f"{path} is not a run: there is no {file}")
    if not os.access(file, os.R_OK):
        raise CheckpointError(f"{file} may not be read: ask its owner to change its permissions")
    try:
        with safe_open(file, framework="pt") as f:
            info = json.loads((f.metadata() or {}).get("minigen", "null"))
            tensors = {k: f.get_tensor(k) for k in f.keys()} if with_tensors else {}  # noqa: SIM118, not a dict
    except (SafetensorError, ValueError, OSError) as e:
        raise CheckpointError(
            f"{file} is damaged or not a checkpoint: restore it from a copy, or remove it and train again"
        ) from e
    if not isinstance(info, dict):
        raise CheckpointError(f"{file} was not written by minigen")
    if info.get("format") != FORMAT:
        raise CheckpointError(f"{file} has format {info.get('format')}, this minigen reads {FORMAT}: use that version")
    if missing := set(PARTS) - set(info):
        raise CheckpointError(f"{file} lacks {', '.join(sorted(missing))}: it is no complete checkpoint")
    if wrong := [name for name, kind in PARTS.items() if not isinstance(info[name], kind)]:
        raise CheckpointError(f"{file} is no checkpoint of minigen: its {', '.join(wrong)} is of another kind")
    if not {"spec", "n", "bins"} <= set(info["data"]):
        raise CheckpointError(f"{file} does not say what it was trained on: it is no complete checkpoint")
    return tensors, info


def construct(cls: type[T], fields: dict[str, Any], path: str | Path) -> T:
    """A dataclass from its JSON fields (lists become tuples).

    Raises:
        CheckpointError: if they do not fit.
    """
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    except (TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{path} does not fit this version of {cls.__name__}: {e}") from e


def construct_net(info: dict[str, Any], path: str | Path) -> nn.Module:
    """The network that a checkpoint describes, with weights that are still random.

    Raises:
        CheckpointError: if there is no such network.
    """
    config = construct(NetConfig, info["net"], path)
    try:
        return build(config)
    except (TypeError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"{path} describes no network that can be built: {e}") from e


def construct_method(info: dict[str, Any], methods: Mapping[str, type[Method]], path: str | Path) -> Method:
    """The method that a checkpoint names.

    Raises:
        CheckpointError: if this version does not have it.
    """
    if info["method"] not in methods:
        raise CheckpointError(f"{path} was trained with {info['method']}, this minigen has {', '.join(methods)}")
    return construct(methods[info["method"]], info["method_fields"], path)


def restore(net: nn.Module, tensors: dict[str, Tensor], prefix: str, path: str | Path) -> None:
    """Copy the tensors whose names start with ``prefix`` into ``net``.

    Raises:
        CheckpointError: if they are not those of ``net``.
    """
    try:
        net.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    except RuntimeError as e:
        raise CheckpointError(f"the weights in {path} do not fit the network it describes") from e
