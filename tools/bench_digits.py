"""How good digits are after so many seconds of training:

    python tools/bench_digits.py --out book/results/digits_budget.json

Each method trains the small U-Net for a budget of time through the public `Trainer`; the learning rate rises over the
first 5 % of it and falls to 0 along a cosine. Then 1,797 samples are drawn with 50 calls of the averaged network
(DDIM) and compared with all 1,797 images of the data set by the Frechet distance of the 32 features of the classifier
that ships with the package. For scale: the distance of two random halves of the data, and of noise.

On an idle machine this takes its budgets by the clock. On a busy one, measure in a quiet minute how many steps per
second each method makes (--rates FILE), then let the budgets be the steps that fit (the same command again).
"""

import argparse
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minigen import classifier, nets  # noqa: E402
from minigen.core import Crowd, seeded  # noqa: E402
from minigen.data import load, to_float, to_uint8  # noqa: E402
from minigen.evaluate import frechet_distance  # noqa: E402
from minigen.fit import for_data  # noqa: E402
from minigen.generate import draw  # noqa: E402
from minigen.methods import METHODS  # noqa: E402
from minigen.train import TrainConfig, Trainer  # noqa: E402
from tools.bench_step import hardware, versions  # noqa: E402

FEATURES = classifier.load(ROOT / "minigen" / "assets" / "classifier_digits.safetensors")[0].features
CALLS = 50


def features(x):
    """32 numbers for each image of ``x``, ``n 1 8 8`` in [-1, 1], after rounding to the 17 gray values."""
    with torch.no_grad():
        return FEATURES(to_float(to_uint8(x, 17), 17))


def scale(true, n):
    """Distances of two random halves of the data, of n images to all (means of ten), and of Gaussian noise to all."""
    halves = [features(true[torch.randperm(len(true))]).chunk(2) for _ in range(10)]
    every = features(true)
    return {
        "two_halves": round(mean(frechet_distance(a, b[: len(a)]) for a, b in halves), 2),
        "n_images": round(
            mean(frechet_distance(features(true[torch.randperm(len(true))[:n]]), every) for _ in range(10)), 2
        ),
        "noise": round(frechet_distance(features(torch.randn_like(true)), every), 1),
    }


def trainer_of(name, data, config):
    """A trainer as the command line makes it."""
    method = for_data(METHODS[name](), data.shape)
    if isinstance(method, Crowd):  # the points of a step, among its charges
        method = replace(method, small_batch=config.batch)
        config = replace(config, batch=method.large_batch)
    with seeded(config.seed):
        net = nets.build(nets.preset(data.shape, method.out_channels(data.shape[0])))
    return Trainer(method, net, data, config, "cpu")


def rate(name, data, config):
    """Steps per second: the median of 15 after 5 of warming up."""
    times = [time.monotonic()]
    for _ in trainer_of(name, data, replace(config, steps=20, minutes=None)).steps():
        times.append(time.monotonic())
    return 1 / median(b - a for a, b in zip(times[5:], times[6:]))


def distance(trainer, true, n, seed):
    """Of samples to the data, in features; and how often the network was called."""
    sampler = "ddim" if hasattr(trainer.method, "denoiser") else "paper"
    shape = (n, *trainer.data.shape)
    x, calls = draw(trainer.method, trainer.ema.net, shape, sampler=sampler, steps=CALLS, seed=seed)
    return frechet_distance(features(x), features(true)), calls


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    ap.add_argument("--seconds", type=float, nargs="+", default=[40, 80])
    ap.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--batch", type=int, default=64)
    ap.add_argument("--lr", type=float, default=5e-3)
    ap.add_argument("--ema", type=float, default=0.98)
    ap.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    ap.add_argument("--n", type=int, default=1797, help="samples; with fewer, the distance of true ones grows")
    ap.add_argument("--rates", type=Path, help="JSON of steps per second; measured and written if it is not there")
    ap.add_argument("--out", type=Path)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    data = load("digits")
    true = torch.cat([to_float(load("digits", split).x, 17) for split in ("train", "test")])
    with seeded(0):
        marks = scale(true, a.n)
    print(f"two halves {marks['two_halves']}, noise {marks['noise']}", flush=True)
    config = TrainConfig(
        steps=None, minutes=1, batch=a.batch, lr=a.lr, ema=a.ema, precision=a.precision, decay="cosine"
    )
    if a.rates and not a.rates.exists():
        a.rates.write_text(json.dumps({m: round(rate(m, data, config), 3) for m in a.methods}))
        print(a.rates.read_text())
        return
    rates = json.loads(a.rates.read_text()) if a.rates else {}
    runs, jobs = [], [(m, s, b) for m in a.methods for s in a.seeds for b in a.seconds]
    for name, seed, budget in random.sample(jobs, len(jobs)):
        mine = replace(config, seed=seed, minutes=budget / 60)
        if rates:
            steps = int(rates[name] * budget)
            mine = replace(mine, minutes=None, steps=steps, warmup=steps // 20)
        trainer = trainer_of(name, data, mine)
        for _ in trainer:
            pass
        began = time.monotonic()
        frechet, calls = distance(trainer, true, a.n, seed)
        runs.append({"method": name, "budget_s": budget, "seed": seed, "frechet": round(frechet, 3), "calls": calls})
        runs[-1] |= {"steps": trainer.step, "seconds": round(trainer.seconds, 1)}
        print(json.dumps(runs[-1]), f"sampled in {time.monotonic() - began:.0f} s", flush=True)
    table = {
        m: {f"{b:g} s": median(r["frechet"] for r in runs if (r["method"], r["budget_s"]) == (m, b)) for b in a.seconds}
        for m in a.methods
    }
    print(json.dumps(table))
    recipe = {k: getattr(a, k) for k in ("batch", "lr", "ema", "precision")}
    result = {
        "what": f"Frechet distance of {a.n:,} samples (DDIM, 50 calls) to the 1,797 digits in the 32 features of "
        "classifier_digits.safetensors, after a budget of seconds of training the small U-Net",
        "command": f"python tools/bench_digits.py --seconds {' '.join(f'{s:g}' for s in a.seconds)} "
        f"--n {a.n} --batch {a.batch} --lr {a.lr:g} --ema {a.ema:g} --precision {a.precision}"
        + " --rates FILE" * bool(rates),
        "hardware": hardware("cpu", a.threads), "versions": versions(), "recipe": recipe,
        "steps_per_s": rates,
        "budgets": "as many steps as fit on the idle machine, by steps_per_s" if rates else "by the clock",
        "scale": marks,
        "median": table, "runs": sorted(runs, key=lambda r: (r["method"], r["budget_s"], r["seed"])),
    }  # fmt: skip
    if a.out:
        a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
