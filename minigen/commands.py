"""What the commands do: train a run in a folder, draw from it, export it, plot it; ``measure`` has its own module."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import checkpoint, classifier, generate, laws, nets
from .core import Crowd, Method, seeded
from .data import Dataset, load
from .fit import fit, for_data
from .methods import METHODS
from .processes import pick_device
from .recipe import TrainConfig, preset
from .train import Trainer

if TYPE_CHECKING:
    from . import options


WRITTEN = ("config.json", "log.csv", "samples", "snapshots")
"""What a run writes into its folder beside the checkpoint."""


def train(o: options.Train[Method]) -> int:
    """Start a run or continue it; returns the exit code."""
    for name in ("sample_every", "save_every", "save_minutes", "snapshots"):
        if getattr(o, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(o, name)}")
    if o.out.exists() and not o.out.is_dir():
        raise ValueError(f"{o.out} is a file: --out names the folder of the run")
    trainer = _continued(o) if o.resume else _new(o)
    if trainer.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # the shapes never change: let it find the fastest kernels once
        torch.set_float32_matmul_precision("high")
    return fit(trainer, o.out, o.sample_every, o.save_every, o.save_minutes, o.snapshots)


def _new(o: options.Train[Method]) -> Trainer:
    if (o.out / checkpoint.NAME).exists() and checkpoint.read(o.out, with_tensors=False)[1]["step"] > 0:
        raise ValueError(f"{o.out} already holds a run: add --resume to continue it, or choose another --out")
    others = [name for name in WRITTEN if (o.out / name).exists()]
    if others and not (o.out / checkpoint.NAME).exists():
        raise ValueError(f"{o.out} holds {', '.join(others)} and no run: choose another --out, nothing is overwritten")
    if o.data is None:
        raise ValueError(f"--data is missing: cifar10, digits, folder:PATH, {', '.join(laws.LAWS)}")
    given, device = _given(o), pick_device(o.device).type
    replace(TrainConfig(), **given)  # what is wrong shows before the data are read
    if o.minutes and o.steps is None:
        given["steps"] = None
    data = _flipped(load(o.data, offline=o.offline), o.flip)
    method = for_data(o.method, data.shape, o.given)
    config = preset(data, type(method).__name__.lower(), o.recipe or "paper", device, None if o.minutes else o.steps)
    if isinstance(method, Crowd):  # the loss at a few points compares them with a crowd
        if o.recipe == "fast" and "small_batch" not in o.given:
            method = replace(method, small_batch=config.batch)
        config = replace(config, batch=method.large_batch)
    config = replace(config, **given)
    net_config = nets.preset(data.shape, method.out_channels(data.shape[0]), **_net(o))
    with seeded(config.seed):
        net = nets.build(net_config)
    trainer = Trainer(method, net, data, config, o.device)
    if trainer.processes.rank == 0:
        _warn(method, config)
    return trainer


def _flipped(data: Dataset, flip: str) -> Dataset:
    """The data with or without their mirror images, as the command line wants it."""
    if flip == "on" and len(data.shape) != 3:
        raise ValueError(f"--flip on mirrors images, and {data.name} are points: leave it out")
    return data if flip == "auto" else replace(data, flip=flip == "on")


def _warn(method: Method, config: TrainConfig) -> None:
    """Say what will make a worse model than the method can give."""
    if config.steps and not config.minutes and config.warmup >= config.steps:
        what = f"the learning rate still rises at the end (--warmup {config.warmup}, --steps {config.steps})"
        print(f"minigen: {what}: give a smaller --warmup, or --recipe fast", file=sys.stderr)
    alpha_bar = getattr(method, "alpha_bar", None)
    if alpha_bar is not None and alpha_bar[-1] > 0.01:
        what = f"after --T {len(alpha_bar) - 1} steps {alpha_bar[-1]:.0%} of the data's variance is left"
        what += ", and sampling starts from pure noise"
        print(f"minigen: {what}: add --schedule cosine, or a larger --beta-T", file=sys.stderr)


def _continued(o: options.Train[Method]) -> Trainer:
    if not (o.out / checkpoint.NAME).exists():
        raise ValueError(f"{o.out} holds no run to continue: leave out --resume to start one")
    if o.recipe:
        raise ValueError("--recipe is for a new run: leave it out, a continued one keeps its settings")
    _, info = checkpoint.read(o.out, with_tensors=False)
    method = checkpoint.construct_method(info, METHODS, o.out)
    net = checkpoint.construct_net(info, o.out)
    net_config = net.config
    config = checkpoint.construct(TrainConfig, info["train"], o.out)
    before = asdict(net_config) | asdict(config)
    for name, value in (_given(o) | _net(o)).items():
        if name not in ("steps", "minutes", "accumulate") and value not in (None, before[name]):
            word = f"--{name.replace('_', '-')} {value}"
            raise ValueError(f"{word} is not the {before[name]} of {o.out}: leave it out, or use another --out")
    named = [f.name for f in fields(method) if f.name in o.given]
    if type(method) is not type(o.method) or any(getattr(method, k) != getattr(o.method, k) for k in named):
        raise ValueError(f"{o.method} is not the {method} of {o.out}: leave the options out, or use another --out")
    if o.steps is not None or o.minutes is not None:
        config = replace(config, steps=o.steps, minutes=o.minutes)
    config = replace(config, accumulate=o.accumulate or config.accumulate)
    data = load(o.data or info["data"]["spec"], offline=o.offline)
    spec, flip = info["data"]["spec"], info["data"].get("flip", data.flip)
    data = replace(data, flip=flip)
    if o.flip not in ("auto", "on" if flip else "off"):
        raise ValueError(f"--flip {o.flip} is not what {o.out} was begun with: leave it out, or use another --out")
    if data.name != spec and not (data.name.startswith("folder:") and spec.startswith("folder:")):  # it may have moved
        raise ValueError(f"{o.out} was trained on {spec}, not on {data.name}: use another --out")
    if data.shape != net_config.shape:
        raise ValueError(f"the data now has shape {data.shape}, but {o.out} was trained on {net_config.shape}")
    trainer = Trainer(method, net, data, config, o.device)
    trainer.load(o.out)
    return trainer


def _given(o: options.Train[Method]) -> dict[str, Any]:
    """The fields of the configuration that the command line sets."""
    values = {f.name: getattr(o, f.name) for f in fields(TrainConfig)}
    return {name: value for name, value in values.items() if value is not None and value is not False}


def _net(o: options.Train[Method]) -> dict[str, Any]:
    """What the command line says about the network; ``None`` where it is silent."""
    return {name: getattr(o, name) for name in ("width", "dropout", "groups")}


def train_classifier(o: options.Classifier) -> int:
    """Train a classifier of images and write it to one file; returns the exit code."""
    device = pick_device(o.device)
    if o.out.suffix != ".safetensors":
        raise ValueError(f"{o.out} should end in .safetensors")
    if o.out.exists():
        raise ValueError(f"{o.out} exists: choose another name, or remove it")
    generate.check_place(o.out)
    data, test = load(o.data, offline=o.offline), load(o.data, "test", offline=o.offline)
    data = _flipped(data, o.flip)
    config, recipe = classifier.preset(data)
    given = {"epochs": o.epochs, "batch": o.batch, "lr": o.lr, "seed": o.seed, "precision": o.precision}
    recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    if test.shape != data.shape or test.labels is None or int(test.labels.max()) >= config.classes:
        raise ValueError(f"the test images of {o.data} must have the size and the classes of the training images")
    for epoch, (net, seen) in enumerate(classifier.fit(data, config, recipe, device), 1):  # noqa: B007, after it
        loss, right, seconds = seen["loss"], seen["accuracy"], seen["seconds"]
        print(
            f"epoch {epoch}/{recipe.epochs}  loss {loss:.4f}  training accuracy {right:.2%}  {seconds:.0f} s",
            flush=True,
        )
    name = "folder:" + Path(o.data).name if o.data.startswith("folder:") else o.data
    about = {"data": name, "recipe": asdict(recipe), "seconds": round(seen["seconds"], 1)}
    net = net.half().float()  # the accuracy of what the file will hold
    about["accuracy"], about["n_test"] = classifier.accuracy(net, test), len(test)
    classifier.save(net, o.out, about)
    print(f"{o.out}: test accuracy {about['accuracy']:.2%} of {len(test)}, {o.out.stat().st_size / 1e6:.2f} MB")
    return 0


def sample(o: options.Sample) -> int:
    """Draw samples and write them; returns the exit code."""
    device = pick_device(o.device)
    generate.check_suffix(o.out)
    generate.check_place(o.out)
    run = checkpoint.load(o.run, METHODS, device)
    began = time.monotonic()
    choice = {"sampler": o.sampler, "steps": o.steps, "seed": o.seed, "device": device, "precision": o.precision}
    x, calls = generate.draw(run.method, run.net, (o.n, *run.shape), **choice)
    generate.picture(x, o.out)
    print(f"{o.out}: {o.n} samples, {o.sampler}, {calls:g} network calls each, {time.monotonic() - began:.1f} s")
    return 0


def export(o: options.Export) -> int:
    """Write the averaged weights and the description of a run to one file; returns the exit code."""
    if o.file.suffix != ".safetensors":
        raise ValueError(f"{o.file} should end in .safetensors")
    if o.file.exists():
        raise ValueError(f"{o.file} exists: choose another name, or remove it")
    generate.check_place(o.file)
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
