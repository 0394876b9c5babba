"""The words of the command line, one dataclass per command; ``python -m minigen COMMAND --help`` shows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

import tyro

M = TypeVar("M")
_preset = "(default: preset)"
Int = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_preset)]
Float = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=_preset)]
Device = Literal["auto", "cpu", "cuda"]
Sampler = Literal["ddim", "euler", "heun", "rk45", "paper"]


@dataclass(frozen=True)
class Train(Generic[M]):
    """Train a model. Options left out are taken from a preset for the kind of data."""

    method: Annotated[M, tyro.conf.arg(name="")]
    out: Path
    """folder of the run: checkpoint, log, sample grids"""
    data: Annotated[str | None, tyro.conf.arg(metavar="DATA", help_behavior_hint="")] = None
    """cifar10, digits, folder:PATH, or a law: two_modes, eight_gaussians, swiss_roll, heart"""
    flip: Literal["auto", "on", "off"] = "auto"
    """mirror images at random; auto: those of cifar10 and of folders; off for letters, maps and the like"""
    recipe: Annotated[
        Literal["paper", "fast"] | None, tyro.conf.arg(metavar="{paper,fast}", help_behavior_hint="(default: paper)")
    ] = None
    """how to train: as the paper did, or in a budget of minutes"""
    steps: Int = None
    """updates in the whole run"""
    minutes: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: none)")] = None
    """time budget of the whole run, learning-rate schedule included"""
    batch: Int = None
    """samples per step, over all processes (pfgm: the charges)"""
    accumulate: Int = None
    """parts into which a step is cut to need less memory: the same batch, other noise"""
    width: Int = None
    """hidden units, or channels at full resolution"""
    dropout: Float = None
    """probability in each residual block (images)"""
    groups: Int = None
    """groups of channels that are normalized together (images)"""
    lr: Float = None
    """learning rate of Adam"""
    warmup: Int = None
    """steps in which the learning rate rises (with --minutes: always the first 5 %)"""
    decay: Annotated[
        Literal["constant", "cosine"] | None, tyro.conf.arg(metavar="{constant,cosine}", help_behavior_hint=_preset)
    ] = None
    """what the learning rate does then (with --minutes: always cosine)"""
    ema: Float = None
    """decay of the averaged weights"""
    grad_clip: Float = None
    """largest norm of the gradient (inf: any)"""
    seed: Int = None
    """of weights, data order and noise"""
    precision: Annotated[
        Literal["fp32", "bf16"] | None, tyro.conf.arg(metavar="{fp32,bf16}", help_behavior_hint="(default: fp32)")
    ] = None
    """bf16: mixed precision in the network"""
    compile: bool = False
    """compile the network (pays on GPUs)"""
    log_every: Int = None
    """steps between two lines of the log"""
    sample_every: int = 5000
    """steps between two sample grids; there are also ten, evenly spread over the run"""
    save_every: int = 0
    """steps between two checkpoints (0: by time only)"""
    save_minutes: float = 5.0
    """minutes between two checkpoints"""
    snapshots: int = 0
    """points of the run, evenly spread, at which the averaged weights are kept in RUN/snapshots"""
    device: Device = "auto"
    """auto takes a CUDA device if there is one"""
    resume: bool = False
    """continue the run in --out; only --steps, --minutes, --accumulate, --data and --device may differ from before"""
    offline: bool = False
    """download nothing"""
    given: tyro.conf.Suppress[frozenset[str]] = frozenset()
    """the fields that the command line names"""


@dataclass(frozen=True)
class Classifier:
    """Train a small classifier, whose features measure the distance between sets of images."""

    data: str
    """labeled images: cifar10, digits, or folder:PATH with PATH/train/CLASS and PATH/test/CLASS"""
    out: Path
    """the new file, NAME.safetensors"""
    epochs: Int = None
    """passes over the data"""
    batch: Int = None
    """images per step"""
    lr: Float = None
    """largest learning rate"""
    seed: int = 0
    """same seed, same weights"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: mixed precision"""
    flip: Literal["auto", "on", "off"] = "auto"
    """mirror images at random; auto: those of cifar10 and of folders; off where left and right tell the class"""
    device: Device = "auto"
    """auto takes a CUDA device if there is one"""
    offline: bool = False
    """download nothing"""


@dataclass(frozen=True)
class Sample:
    """Draw from a trained model: a grid of images or a scatter plot, or raw numbers into a .npy file."""

    run: tyro.conf.Positional[Path]
    """folder of the run, or a checkpoint file"""
    n: int = 64
    """how many"""
    out: Path = Path("samples.png")
    """where to write"""
    steps: int = 50
    """steps of ddim, euler and heun"""
    sampler: Sampler = "ddim"
    """paper: the method's own"""
    seed: int = 0
    """same seed, same samples"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: mixed precision in the network, faster for wide networks and on GPUs"""
    device: Device = "auto"
    """auto takes a CUDA device if there is one"""


@dataclass(frozen=True)
class Evaluate:
    """Compare samples of a trained model with test data; the numbers also go to RUN/evaluate.json."""

    run: tyro.conf.Positional[Path]
    """folder of the run, or a checkpoint file"""
    n: int = 1000
    """samples to compare"""
    features: str = "auto"
    """of images: cifar or digits (they ship), inception, none, or a file of train classifier; auto takes what ships"""
    data: Annotated[str | None, tyro.conf.arg(metavar="DATA", help_behavior_hint="(default: those of the run)")] = None
    """what to compare with, for example folder:PATH after the folder has moved"""
    split: Literal["test", "train"] = "test"
    """the part of the data to compare with"""
    steps: int = 50
    """steps of ddim, euler and heun"""
    sampler: Sampler = "ddim"
    """paper: the method's own"""
    samples: Annotated[Path | None, tyro.conf.arg(metavar="FILE.npy", help_behavior_hint="(default: draw)")] = None
    """samples that were drawn before, with the command sample"""
    floor: bool = False
    """also the distances of training to test samples, for 250 to 10,000 of them"""
    bits: int = 8
    """images for bits per dimension, by the bound (as many network calls as steps) and by the flow; 0: none"""
    tol: float = 1e-3
    """tolerance of the flow for bits per dimension"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: mixed precision in the network while sampling"""
    seed: int = 0
    """same seed, same numbers"""
    device: Device = "auto"
    """auto takes a CUDA device if there is one"""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json", help_behavior_hint="(default: in RUN)")] = None
    """where to write the numbers"""
    inception_weights: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """file of the Inception network, where it cannot be downloaded"""
    offline: bool = False
    """download nothing"""


@dataclass(frozen=True)
class Export:
    """Write a small file to share: the averaged weights and what sampling needs. Training cannot go on from it."""

    run: tyro.conf.Positional[Path]
    """folder of the run, or a checkpoint file"""
    file: tyro.conf.Positional[Path]
    """the new file, NAME.safetensors"""
    precision: Literal["fp16", "fp32"] = "fp16"
    """of the weights: half takes half of the space"""


@dataclass(frozen=True)
class Compare:
    """Compare the loss of a run with that of a run that worked, at equal numbers of images seen."""

    run: tyro.conf.Positional[Path]
    """folder of the run"""


@dataclass(frozen=True)
class Plot:
    """Draw the log of a run to RUN/loss.png."""

    run: tyro.conf.Positional[Path]
    """folder of the run"""
