"""What the commands do: train a run in a folder, draw from it, measure it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import checkpoint, evaluate, generate, laws, nets
from .core import Crowd, Method, seeded
from .data import load, to_float, to_uint8
from .fit import fit, for_data
from .methods import METHODS
from .processes import pick_device
from .recipe import TrainConfig, preset
from .train import Trainer

if TYPE_CHECKING:
    from . import options


def train(o: options.Train[Method]) -> int:
    """Start a run or continue it; returns the exit code."""
    for name in ("sample_every", "save_every", "save_minutes", "snapshots"):
        if getattr(o, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(o, name)}")
    trainer = _continued(o) if o.resume else _new(o)
    if trainer.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # the shapes never change: let it find the fastest kernels once
        torch.set_float32_matmul_precision("high")
    return fit(trainer, o.out, o.sample_every, o.save_every, o.save_minutes, o.snapshots)


def _new(o: options.Train[Method]) -> Trainer:
    if (o.out / checkpoint.NAME).exists():
        raise ValueError(f"{o.out} already holds a run: add --resume to continue it, or choose another --out")
    if o.data is None:
        raise ValueError(f"--data is missing: cifar10, digits, folder:PATH, {', '.join(laws.LAWS)}")
    given, device = _given(o), pick_device(o.device).type
    replace(TrainConfig(), **given)  # what is wrong shows before the data are read
    if o.minutes and o.steps is None:
        given["steps"] = None
    data = load(o.data, offline=o.offline)
    method = for_data(o.method, data.shape)
    config = preset(data, type(method).__name__.lower(), o.recipe or "paper", device, None if o.minutes else o.steps)
    if isinstance(method, Crowd):  # the loss at a few points compares them with a crowd
        if o.recipe == "fast" and method.small_batch == for_data(type(method)(), data.shape).small_batch:
            method = replace(method, small_batch=config.batch)
        config = replace(config, batch=method.large_batch)
    config = replace(config, **given)
    net_config = nets.preset(data.shape, method.out_channels(data.shape[0]), o.width, o.dropout)
    with seeded(config.seed):
        net = nets.build(net_config)
    return Trainer(method, net, data, config, o.device)


def _continued(o: options.Train[Method]) -> Trainer:
    if not (o.out / checkpoint.NAME).exists():
        raise ValueError(f"{o.out} holds no run to continue: leave out --resume to start one")
    if o.recipe:
        raise ValueError("--recipe is for a new run: leave it out, a continued one keeps its settings")
    _, info = checkpoint.read(o.out, with_tensors=False)
    method = checkpoint.construct_method(info, METHODS, o.out)
    net_config = checkpoint.construct(nets.NetConfig, info["net"], o.out)
    config = checkpoint.construct(TrainConfig, info["train"], o.out)
    before = asdict(config) | {"width": net_config.width, "dropout": net_config.dropout}
    for name, value in (_given(o) | {"width": o.width, "dropout": o.dropout}).items():
        if name not in ("steps", "minutes", "accumulate") and value not in (None, before[name]):
            word = f"--{name.replace('_', '-')} {value}"
            raise ValueError(f"{word} is not the {before[name]} of {o.out}: leave it out, or use another --out")
    if method not in (o.method, for_data(o.method, net_config.shape)) and o.method != type(method)():
        raise ValueError(f"{o.method} is not the {method} of {o.out}: leave the options out, or use another --out")
    if o.steps is not None or o.minutes is not None:
        config = replace(config, steps=o.steps, minutes=o.minutes)
    config = replace(config, accumulate=o.accumulate or config.accumulate)
    data = load(o.data or info["data"]["spec"], offline=o.offline)
    spec = info["data"]["spec"]
    if data.name != spec and not (data.name.startswith("folder:") and spec.startswith("folder:")):  # it may have moved
        raise ValueError(f"{o.out} was trained on {spec}, not on {data.name}: use another --out")
    if data.shape != net_config.shape:
        raise ValueError(f"the data now has shape {data.shape}, but {o.out} was trained on {net_config.shape}")
    trainer = Trainer(method, nets.build(net_config), data, config, o.device)
    trainer.load(o.out)
    return trainer


def _given(o: options.Train[Method]) -> dict[str, Any]:
    """The fields of the configuration that the command line sets."""
    values = {f.name: getattr(o, f.name) for f in fields(TrainConfig)}
    return {name: value for name, value in values.items() if value is not None and value is not False}


def sample(o: options.Sample) -> int:
    """Draw samples and write them; returns the exit code."""
    device = pick_device(o.device)
    run = checkpoint.load(o.run, METHODS, device)
    began = time.monotonic()
    choice = {"sampler": o.sampler, "steps": o.steps, "seed": o.seed, "device": device, "precision": o.precision}
    x, calls = generate.draw(run.method, run.net, (o.n, *run.shape), **choice)
    generate.picture(x, o.out)
    print(f"{o.out}: {o.n} samples, {o.sampler}, {calls:g} network calls each, {time.monotonic() - began:.1f} s")
    return 0


def measure(o: options.Evaluate) -> int:
    """Compare samples with data; print the numbers, and keep them in the run's folder; returns the exit code."""
    device = pick_device(o.device)
    run = checkpoint.load(o.run, METHODS, device)
    held, train = load(run.data, o.split, offline=o.offline), load(run.data, offline=o.offline)
    began = time.monotonic()
    choice = {"sampler": o.sampler, "steps": o.steps, "seed": o.seed, "device": device}
    x, calls = generate.draw(run.method, run.net, (o.n, *run.shape), **choice)
    seconds = time.monotonic() - began
    if run.bins:
        x = to_float(to_uint8(x, run.bins), run.bins)  # what a picture of it would hold
    if o.split == "train" and o.n > len(train) // 2:
        raise ValueError(f"--n {o.n} is more than half of the {len(train)} training samples: use --split test")
    true = held.samples(o.n, o.seed)
    other = train.others(o.n, o.seed)
    result: dict[str, Any] = {
        "run": str(o.run), "data": run.data, "trained_steps": run.step, "weights": "EMA", "n": o.n, "split": o.split,
        "n_data": len(true), "sampler": o.sampler, "network_calls": calls, "seed": o.seed, "seconds": round(seconds, 2),
        "sliced_wasserstein": evaluate.sliced_wasserstein(x, true),
        "sliced_wasserstein_floor": evaluate.sliced_wasserstein(other, true),
    }  # fmt: skip
    result |= _for_points(run, x, true, other) if len(run.shape) == 1 else _for_images(run, o, true.to(device))
    for name, value in result.items():
        print(f"{name:26} {value:.4g}" if isinstance(value, float) else f"{name:26} {value}")
    if o.run.is_dir():
        (o.run / "evaluate.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _for_points(run: checkpoint.Run, x: Any, true: Any, other: Any) -> dict[str, Any]:
    result: dict[str, Any] = {
        "energy_distance": evaluate.energy_distance(x, true),
        "energy_distance_floor": evaluate.energy_distance(other, true),
    }
    law = laws.LAWS[run.data]()
    if len(law.means) <= 20:  # modes, not the blots that a curve is made of
        spread = evaluate.mode_coverage(x, law)
        result |= {"modes": len(law.means), "modes_found": spread.found}
        result["mode_shares"] = [round(float(share), 4) for share in spread.shares]
        result["mode_weights"] = [round(float(weight), 4) for weight in spread.weights]
    return result


def _for_images(run: checkpoint.Run, o: options.Evaluate, true: Any) -> dict[str, Any]:
    if not o.bits or not hasattr(run.method, "bound"):
        return {}
    with seeded(o.seed):
        bits, error = evaluate.bits_per_dim(run.method, run.net, true[: o.bits], run.bins)
    return {"bits_per_dim": bits, "bits_per_dim_error": error, "bits_per_dim_n": min(o.bits, len(true))}


def export(o: options.Export) -> int:
    """Write the averaged weights and the description of a run to one file; returns the exit code."""
    if o.file.suffix != ".safetensors":
        raise ValueError(f"{o.file} should end in .safetensors")
    if o.file.exists():
        raise ValueError(f"{o.file} exists: choose another name, or remove it")
    tensors, info = checkpoint.read(o.run)
    checkpoint.export(o.file, tensors, info, torch.float16 if o.precision == "fp16" else torch.float32)
    print(f"{o.file}: {o.file.stat().st_size / 1e6:.1f} MB, step {info['step']}; minigen.load opens it")
    return 0


def compare(o: options.Compare) -> int:
    """Print the losses beside those of the reference, and what may explain a difference; returns the exit code."""
    from . import compare as beside

    mine = beside.read(o.run)
    name, theirs = beside.reference(mine.info)
    rows = beside.compare(mine, theirs)
    print(f"reference: {name}\n{'images seen':>12} {'loss':>10} {'reference':>10} {'difference':>11} {'band':>8}")
    for r in rows:
        mark = "" if r.ok else " *"
        print(f"{r.images:12.0f} {r.mine:10.4g} {r.reference:10.4g} {r.ratio:+10.1%} {r.band:8.1%}{mark}")
    reasons = beside.causes(mine, theirs, rows)
    print(f"off track; likely: {'; '.join(reasons)}" if reasons else "on track")
    return 0


def plot(o: options.Plot) -> int:
    """Draw the log; returns the exit code."""
    from . import log

    print(log.plot(Path(o.run)))
    return 0
