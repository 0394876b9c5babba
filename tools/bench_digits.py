"""How good digits are after so many seconds of training:

    python tools/bench_digits.py --out book/results/digits_budget.json

Each method trains the small U-Net for a budget of time through the public `Trainer`; the learning rate rises over the
first 5 % of it and falls to 0 along a cosine. Then 1,797 samples are drawn with the averaged network in 50 steps of
DDIM or 25 of Heun, which are 49 calls (NCSN: in 98 calls of its own sampler), and compared with all 1,797 images of the
data set by the Frechet distance of 32 features. There are four kinds of them: those of the classifier that ships with
the package, and those of three plain ones (two convolutions and a hidden layer, no normalization), which are trained
here. Each kind has its own unit, so a table gives the distances as multiples of their floor, the distance of two random
halves of the data. For scale: that of noise.

On an idle machine this takes its budgets by the clock. On a busy one, measure in a quiet minute how many steps per
second each method makes (--rates FILE), then let the budgets be the steps that fit (the same command again, which then
uses one thread).
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
import torch.nn.functional as F
from torch import nn

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

SHIPPED = ROOT / "minigen" / "assets" / "classifier_digits.safetensors"
LEVELS = {"ddim": 50, "heun": 25}


def plain(data, test, seed):
    """The features of a plain classifier of digits, after 40 epochs; and the part of the test images that it knows."""
    images, labels = to_float(data.x, data.bins), data.labels.long()
    with seeded(seed):
        body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(1024, 32), nn.ReLU(),
        )  # fmt: skip
        head = nn.Linear(32, 10)
        adam = torch.optim.Adam([*body.parameters(), *head.parameters()])
        for _ in range(40):
            for index in torch.randperm(len(images)).split(64):
                adam.zero_grad()
                F.cross_entropy(head(body(images[index])), labels[index]).backward()
                adam.step()
    with torch.no_grad():
        right = head(body(to_float(test.x, test.bins))).argmax(1) == test.labels
    return body, float(right.double().mean())


def kinds(data, test):
    """The four kinds of features by name; and the test accuracies of their classifiers."""
    shipped = classifier.load(SHIPPED)[0]
    found = {"shipped": (shipped.features, classifier.accuracy(shipped, test))}
    found |= {f"plain {seed}": plain(data, test, seed) for seed in range(3)}
    return {k: f for k, (f, _) in found.items()}, {k: round(a, 4) for k, (_, a) in found.items()}


def distances(features, a, b):
    """By features, of ``a`` to ``b``, ``n 1 8 8`` in [-1, 1], after rounding to the 17 gray values."""
    with torch.no_grad():
        seen = {k: [f(to_float(to_uint8(x, 17), 17)) for x in (a, b)] for k, f in features.items()}
    return {k: frechet_distance(*pair) for k, pair in seen.items()}


def scale(features, true):
    """Distances of two random halves of the data (mean of ten), and of Gaussian noise to all of it."""
    half = len(true) // 2
    orders = [torch.randperm(len(true)) for _ in range(10)]
    halves = [distances(features, true[order[:half]], true[order[half : 2 * half]]) for order in orders]
    noise = distances(features, torch.randn_like(true), true)
    return {k: {"floor": mean(d[k] for d in halves), "noise": noise[k]} for k in features}


def trainer_of(name, data, config, stratified=False):
    """A trainer as the command line makes it."""
    method = for_data(METHODS[name](**{"stratified": True} if stratified else {}), data.shape)
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


def samples(trainer, sampler, n, seed):
    """``n`` of them, and how often the network was called."""
    sampler = sampler if hasattr(trainer.method, "denoiser") else "paper"
    shape = (n, *trainer.data.shape)
    return draw(trainer.method, trainer.ema.net, shape, sampler=sampler, steps=LEVELS.get(sampler, 0), seed=seed)


def one(job, stratified, config, rates, data, true, features, marks):
    """Train one method with one seed and one budget, then draw and measure with each sampler: a row for each."""
    (name, seed, budget), samplers = job
    mine = replace(config, seed=seed, minutes=budget / 60)
    if rates:
        steps = int(rates[name] * budget)
        mine = replace(mine, minutes=None, steps=steps, warmup=steps // 20)
    trainer = trainer_of(name, data, mine, stratified)
    for _ in trainer:
        pass
    seconds = round(trainer.seconds, 1)
    for sampler in samplers:
        x, calls = samples(trainer, sampler, len(true), seed)
        frechet = {k: round(d, 3) for k, d in distances(features, x, true).items()}
        floors = {k: round(d / marks[k]["floor"], 2) for k, d in frechet.items()}
        run = {"method": name, "budget_s": budget, "seed": seed, "stratified": stratified, "sampler": sampler}
        run |= {"steps": trainer.step, "calls": calls, "seconds": seconds}
        yield run | {"frechet": frechet, "floors": floors}


def table(runs):
    """For each method, budget and way: the number of runs, and by features the median multiple of the floor."""
    groups = {}
    for r in sorted(runs, key=lambda r: (r["budget_s"], list(METHODS).index(r["method"]))):
        name = f"{r['method']}, {r['budget_s']:g} s"
        name += ", stratified" * r["stratified"] + ", heun" * (r["sampler"] == "heun")
        groups.setdefault(name, []).append(r["floors"])
    return {
        name: {"seeds": len(rows)} | {k: round(median(row[k] for row in rows), 2) for k in rows[0]}
        for name, rows in groups.items()
    }


def options():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    ap.add_argument("--seconds", type=float, nargs="+", default=[40, 80])
    ap.add_argument("--seeds", type=int, nargs="+", default=[0])
    ap.add_argument("--samplers", nargs="+", default=["ddim"], choices=list(LEVELS))
    ap.add_argument("--stratified", action="store_true", help="steps t spread evenly over each batch (ddpm only)")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--batch", type=int, default=64)
    ap.add_argument("--lr", type=float, default=5e-3)
    ap.add_argument("--ema", type=float, default=0.99)
    ap.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    ap.add_argument("--rates", type=Path, help="JSON of steps per second; measured and written if it is not there")
    ap.add_argument("--out", type=Path, required=True, help="JSON; runs that it holds are kept, and not run again")
    return ap.parse_args()


def main():
    a = options()
    if a.stratified and a.methods != ["ddpm"]:
        sys.exit("--stratified is for ddpm alone: add --methods ddpm")
    recipe = {k: getattr(a, k) for k in ("batch", "lr", "ema", "precision")}
    config = TrainConfig(steps=None, minutes=1, decay="cosine", **recipe)
    data, test = load("digits"), load("digits", "test")
    torch.set_num_threads(a.threads)
    if a.rates and not a.rates.exists():
        measured = {m: round(rate(m, data, config), 3) for m in a.methods}
        a.rates.write_text(json.dumps({"recipe": recipe, "threads": a.threads, "steps_per_s": measured}))
        print(a.rates.read_text())
        return
    measured = json.loads(a.rates.read_text()) if a.rates else {"recipe": recipe, "steps_per_s": {}}
    rates = measured["steps_per_s"]
    if measured["recipe"] != recipe or (rates and not set(a.methods) <= set(rates)):
        sys.exit(f"{a.rates} was measured with another recipe or without some of the methods: use another --rates")
    budgets = "as many steps as fit on the idle machine, by steps_per_s" if rates else "by the clock"
    known = json.loads(a.out.read_text()) if a.out.exists() else {"recipe": recipe, "budgets": budgets, "runs": []}
    if (known["recipe"], known["budgets"]) != (recipe, budgets):
        sys.exit(f"{a.out} holds runs of another recipe or with other budgets: use another --out")
    torch.set_num_threads(1 if rates else a.threads)
    true = torch.cat([to_float(part.x, 17) for part in (data, test)])
    features, accuracy = kinds(data, test)
    with seeded(0):
        marks = scale(features, true)
    result = {
        "what": f"Frechet distance of {len(true):,} samples (50 steps of DDIM, or where said 25 of Heun, which are 49 "
        "calls) to the same number of digits, after a "
        "budget of seconds of training the small U-Net, in four kinds of 32 features; floors: the distance as a "
        "multiple of that of two random halves of the data",
        "command": "python tools/bench_digits.py --methods NAMES [--stratified] --seeds NUMBERS --samplers NAMES"
        + " --seconds "
        + " ".join(f"{s:g}" for s in a.seconds)
        + "".join(f" --{k} {v}" for k, v in recipe.items())
        + " --rates FILE" * bool(rates),
        "hardware": hardware("cpu", a.threads), "versions": versions(), "recipe": recipe,
        "budgets": budgets, "steps_per_s": rates, "accuracy": accuracy, "scale": marks,
    }  # fmt: skip
    runs = known["runs"]
    done = {(r["method"], r["seed"], r["budget_s"], r["sampler"]) for r in runs if r["stratified"] == a.stratified}
    jobs = [(m, s, b) for m in a.methods for s in a.seeds for b in a.seconds]
    jobs = [(job, todo) for job in jobs if (todo := [x for x in a.samplers if (*job, x) not in done])]
    for job in random.sample(jobs, len(jobs)):
        for run in one(job, a.stratified, config, rates, data, true, features, marks):
            runs.append(run)
            print(json.dumps(run), flush=True)
        runs.sort(key=lambda r: (r["method"], r["stratified"], r["budget_s"], r["seed"], r["sampler"]))
        a.out.write_text(json.dumps(result | {"median_floors": table(runs), "runs": runs}, indent=1) + "\n")
    print(json.dumps(table(runs), indent=1))


if __name__ == "__main__":
    main()
