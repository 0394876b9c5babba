"""The command that compares samples of a trained model with data: distances, their floors, bits per dimension.

Every distance stands beside its floor, the distance that true samples have: those of the other split, as many if there
are so many. Keys of results carry the name of the features they were measured with.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import checkpoint, evaluate, features, generate, laws, likelihood
from .core import seeded
from .data import Dataset, load, to_float, to_uint8
from .methods import METHODS
from .processes import pick_device

if TYPE_CHECKING:
    from . import options

ENOUGH = 10_000
"""Samples below which a Frechet distance comes with a warning."""
CURVE = (250, 500, 1000, 2500, 5000, 10_000)
"""The numbers of samples of the floor curve."""
REPEATS = 5
"""Pairs of sets for each point of the floor curve."""


def measure(o: options.Evaluate) -> int:
    """Compare samples with data; print the numbers, and keep them in the run's folder; returns the exit code."""
    if o.bits < 0 or not o.tol > 0:
        raise ValueError(f"--bits must be at least 0 and --tol positive, got {o.bits} and {o.tol}")
    if o.n < 2:
        raise ValueError(f"--n must be positive, and at least 2 for a distance, got {o.n}")
    out = o.out or (o.run / "evaluate.json" if o.run.is_dir() else None)
    if out:
        generate.check_place(out)
    device = pick_device(o.device)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, also in convolutions
    run = checkpoint.load(o.run, METHODS, device)
    spec = o.data or run.data
    held, train = load(spec, o.split, offline=o.offline), load(spec, offline=o.offline)
    if (held.shape, held.bins) != (run.shape, run.bins):
        raise ValueError(f"{spec} has samples of shape {held.shape}, but {o.run} was trained on {run.shape}")
    kind = features.find(o.features, run.shape, device, o.inception_weights, o.offline)
    x, how = _drawn(o, run, device)
    true, other = held.samples(len(x), o.seed), _other(o, spec, train, len(x))
    result: dict[str, Any] = {"run": str(o.run), "data": spec, "trained_steps": run.step, "weights": "EMA", "n": len(x)}
    result |= {"split": o.split, "n_data": len(true), "n_floor": len(other), **how, "seed": o.seed}
    result["sliced_wasserstein"] = evaluate.sliced_wasserstein(x, true)
    result["sliced_wasserstein_floor"] = evaluate.sliced_wasserstein(other, true)
    if len(run.shape) == 1:
        result |= _for_points(spec, x, true, other)
    if kind:
        result |= _by_features(kind, (x, true, other), run.bins, device)
        if o.floor:
            result[f"frechet_{kind.name}_floor_curve"] = _floor_curve(kind, held, train, o, device)
    if run.bins and o.bits:
        result |= _bits(run, o, true.to(device))
    _tell(result, kind)
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _drawn(o: options.Evaluate, run: checkpoint.Run, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """The samples as pictures would hold them, and how they were made."""
    if o.samples:
        x = _read(o, run)
        how = {"sampler": f"file {o.samples.name}", "network_calls": None, "seconds": None}
    else:
        began = time.monotonic()
        choice = {"sampler": o.sampler, "steps": o.steps, "seed": o.seed, "device": device, "precision": o.precision}
        x, calls = generate.draw(run.method, run.net, (o.n, *run.shape), **choice)
        how = {
            "sampler": o.sampler,
            "arithmetic": o.precision,
            "network_calls": calls,
            "seconds": round(time.monotonic() - began, 2),
        }
    return to_float(to_uint8(x, run.bins), run.bins) if run.bins else x, how


def _read(o: options.Evaluate, run: checkpoint.Run) -> Tensor:
    try:
        x = torch.from_numpy(np.load(o.samples, allow_pickle=False))
    except (ValueError, TypeError, EOFError) as e:
        raise ValueError(
            f"{o.samples} holds no samples: write them with python -m minigen sample --out FILE.npy"
        ) from e
    if x.shape[1:] != run.shape or len(x) < 2:
        raise ValueError(f"{o.samples} has the shape {[*x.shape]}, {o.run} makes samples of {[*run.shape]}")
    if not x.is_floating_point() and not (run.bins and int(x.min()) >= 0 and int(x.max()) < run.bins):
        allowed = f"whole numbers from 0 to {run.bins - 1}, or " if run.bins else ""
        raise ValueError(
            f"{o.samples} holds whole numbers from {x.min()} to {x.max()}: {o.run} makes {allowed}fractions"
        )
    return to_float(generate.finite(x[: o.n]), run.bins)


def _other(o: options.Evaluate, spec: str, train: Dataset, n: int) -> Tensor:
    """True samples to compare with true samples: of the training split, apart from those compared with if possible."""
    if o.split == "test" or n <= len(train) // 2:
        return train.others(n, o.seed)
    try:
        return load(spec, "test", offline=o.offline).others(n, o.seed)
    except ValueError as e:
        half = f"--n {n} is more than half of the {len(train)} training samples"
        raise ValueError(f"{half}, and there is no test split for the floor: use a smaller --n") from e


def _by_features(
    kind: features.Features, sets: tuple[Tensor, Tensor, Tensor], bins: int, device: torch.device
) -> dict[str, Any]:
    """Distance, precision and recall of the samples, and of true samples in their place."""
    x, true, other = (kind(to_uint8(part, bins), bins, device) for part in sets)
    result: dict[str, Any] = {"features": kind.name, "features_of": kind.about}
    result[f"frechet_{kind.name}"] = features.frechet(x, true)
    result[f"frechet_{kind.name}_floor"] = features.frechet(other, true)
    if min(len(x), len(true), len(other)) > 3:
        for who, part in (("", x), ("_of_true", other)):
            precision, recall = features.precision_recall(part, true)
            result |= {f"precision_{kind.name}{who}": precision, f"recall_{kind.name}{who}": recall}
    return result


def _floor_curve(
    kind: features.Features, held: Dataset, train: Dataset, o: options.Evaluate, device: torch.device
) -> dict[str, float]:
    """The distance of n training samples to n samples of the split, for each n of ``CURVE`` that the data allow.

    Each is the mean over ``REPEATS`` pairs of sets, or over as many as there are without a sample twice.
    """
    most = min(len(held), len(train) // (1 if o.split == "test" else 2), CURVE[-1])
    parts = held.samples(most, o.seed), train.others(most, o.seed)
    true, other = (kind(to_uint8(part, held.bins), held.bins, device) for part in parts)
    curve = {}
    for n in (n for n in CURVE if n <= most):
        pairs = [*zip(other.split(n), true.split(n), strict=True)][: min(REPEATS, most // n)]
        curve[str(n)] = sum(features.frechet(a, b) for a, b in pairs) / len(pairs)
    return curve


def _for_points(spec: str, x: Tensor, true: Tensor, other: Tensor) -> dict[str, Any]:
    result: dict[str, Any] = {
        "energy_distance": evaluate.energy_distance(x, true),
        "energy_distance_floor": evaluate.energy_distance(other, true),
    }
    law = laws.LAWS[spec]()
    if len(law.means) <= 20:  # modes, not the blots that a curve is made of
        spread = evaluate.mode_coverage(x, law)
        result |= {"modes": len(law.means), "modes_found": spread.found}
        result["mode_shares"] = [round(float(share), 4) for share in spread.shares]
        result["mode_weights"] = [round(float(weight), 4) for weight in spread.weights]
    return result


def _bits(run: checkpoint.Run, o: options.Evaluate, true: Tensor) -> dict[str, Any]:
    """Bits per dimension of the first ``--bits`` images: by the bound, by the flow, or both, as the method allows."""
    x = true[: o.bits]
    result: dict[str, Any] = {}
    if hasattr(run.method, "bound"):
        with seeded(o.seed):
            bits, error = evaluate.bits_per_dim(run.method, run.net, x, run.bins)
        result |= {"bits_bound": bits, "bits_bound_error": error if len(x) > 1 else None}
    if likelihood.span(run.method):
        found = likelihood.flow_bits(run.method, run.net, x, run.bins, tol=o.tol, seed=o.seed)
        result |= {"bits_ode": found.mean, "bits_ode_error": found.error if len(x) > 1 else None}
        result |= {"bits_ode_calls": found.calls, "bits_ode_tol": o.tol}
    return result | {"bits_n": len(x)} if result else {}


def _tell(result: dict[str, Any], kind: features.Features | None) -> None:
    for name, value in result.items():
        print(f"{name:30} {value:.4g}" if isinstance(value, float) else f"{name:30} {value}")
    if result["n_floor"] != result["n"]:
        print(f"WARNING: the floor is that of {result['n_floor']:,} samples, not {result['n']:,}: too high")
    n = min(result["n"], result["n_data"])
    if kind and n < ENOUGH:
        print(
            f"WARNING: n = {n:,} is below {ENOUGH:,}: the Frechet distance is biased upward; compare it with its floor,"
            " and with distances of equal n and equal features only"
        )
