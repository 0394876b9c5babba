"""Keep what a run gave.

  python tools/results.py run RUN NAME --hardware "..." --data "..." [--rows ddim:10 heun:10] [--n 1000]
  python tools/results.py large RUN NAME [--row heun:10] [--n 10000]
  python tools/results.py curve RUN NAME

``run`` measures a run and writes book/results/NAME.json (commands, hardware, data, sizes, times, losses, distances by
sampler and along the training, curve), NAME.png (64 samples) and NAME_training.png (8 samples at each snapshot); if it
is broken off, NAME.part.json has what was measured. The chapters read their numbers from there. ``large`` adds to that
file one distance with more samples. ``curve`` puts the log of a run into minigen/assets/curves.json, with which
``python -m minigen compare`` compares. All want a run that is complete.
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minigen import checkpoint, compare, load, log, measure, nets  # noqa: E402
from minigen.data import Dataset  # noqa: E402
from minigen.fit import for_data  # noqa: E402
from minigen.generate import draw, picture  # noqa: E402
from minigen.methods import METHODS  # noqa: E402
from minigen.options import Evaluate  # noqa: E402
from minigen.recipe import TrainConfig  # noqa: E402
from minigen.train import Trainer  # noqa: E402

PLACE = ROOT / "book" / "results"
DISTANCES = (
    "n",
    "split",
    "weights",
    "sampler",
    "arithmetic",
    "network_calls",
    "seconds",
    "seed",
    "features",
    "features_of",
)


def command(info):
    """The command line that gives this run; the path of a folder is left to the reader."""
    usual = {name: getattr(TrainConfig(), name) for name in ("accumulate", "grad_clip", "precision", "compile")}
    names = ("steps", "minutes", "batch", "lr", "warmup", "decay", "ema", "seed", *usual)
    train = {k: v for k in names if (v := info["train"].get(k)) is not None and v != usual.get(k, "")}
    words = [f"--{k.replace('_', '-')} {v}" if v is not True else f"--{k}" for k, v in train.items()]
    method = compare.points(info)
    if method != info["train"]["batch"]:
        words.append(f"--small-batch {method}")
    net = info["net"]
    if (groups := net.get("groups", 32)) != nets.preset(tuple(net["shape"]), net["out"], net["width"]).groups:
        words.append(f"--groups {groups}")
    spec = "folder:PATH" if info["data"]["spec"].startswith("folder:") else info["data"]["spec"]
    photographs = spec in ("folder:PATH", "cifar10")
    if (flip := info["data"].get("flip", photographs)) != photographs:
        words.append(f"--flip {'on' if flip else 'off'}")
    usual = json.loads(json.dumps(asdict(for_data(METHODS[info["method"]](), tuple(net["shape"])))))
    for k, v in info["method_fields"].items():
        if k not in ("small_batch", "large_batch") and v != usual[k]:  # the one is said above, the other is the batch
            words.append(f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}"))
    return " ".join(
        [f"python -m minigen train {info['method']} --data {spec} --out RUN --width {info['net']['width']}", *words]
    )


def complete(path):
    """The description of a run, if it came to its end."""
    _, info = checkpoint.read(path, with_tensors=False)
    if TrainConfig(**info["train"]).progress(info["step"], info["seconds"]) < 1:
        sys.exit(f"{path} is not complete: continue it first")
    return info


def distance(path, sampler, steps, a, floor=False, bits=0, **more):
    """What ``python -m minigen evaluate`` gives."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "numbers.json"
        words = {
            "n": a.n,
            "sampler": sampler,
            "steps": steps,
            "bits": bits,
            "floor": floor,
            "precision": a.precision,
            **more,
        }
        measure.measure(Evaluate(run=path, device=a.device, out=out, **words))
        return json.loads(out.read_text())


def row(numbers):
    """The part of them that belongs to one sampler."""
    parts = ("frechet_", "precision_", "recall_")
    return {k: v for k, v in numbers.items() if k in DISTANCES or (k.startswith(parts) and not k.endswith("_curve"))}


def training(path, a):
    """Distance and samples at each snapshot of the training."""
    rows, pictures = [], []
    for file in sorted((path / "snapshots").glob("*.safetensors")):
        run = load(file, a.device)
        numbers = distance(file, *a.rows[0], a, data=a.spec, n=a.along or a.n)  # a file keeps no path
        rows.append({"step": run.step, "trained_seconds": round(run.seconds, 1), **row(numbers)})
        choice = {
            "sampler": a.rows[0][0],
            "steps": a.rows[0][1],
            "seed": 1,
            "device": a.device,
            "precision": a.precision,
        }
        pictures.append(draw(run.method, run.net, (8, *run.shape), **choice)[0])
    return rows, pictures


def memory(info, batch, device):
    """Peak memory of two training steps in GB, in a process of its own: of the card, or of the whole process."""
    words = [sys.executable, __file__, "memory", info["method"], device, str(info["net"]["width"]), str(batch)]
    words += [info["train"]["precision"], *["--compile"] * info["train"]["compile"]]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure_memory(a):
    """What ``memory`` runs."""
    method = METHODS[a.method]()
    if hasattr(method, "small_batch"):
        method = replace(method, small_batch=a.batch)
    batch = max(a.batch, getattr(method, "large_batch", 0))
    config = TrainConfig(steps=2, batch=batch, precision=a.precision, compile=a.compile)
    data = Dataset("noise", torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8), 256, True)
    net = nets.build(nets.preset(data.shape, method.out_channels(3), a.width))
    for _ in Trainer(method, net, data, config, a.device):
        pass
    peak = (
        torch.cuda.max_memory_allocated()
        if a.device == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    print(f"{peak / 1e9:.2f}")


def told_by_log(info, rows):
    """What the log of a run tells of its length, its speed and its loss."""
    step, seconds, per_step = int(rows[-1]["step"]), rows[-1]["seconds"], compare.points(info)
    return {
        "steps": step,
        "batch": info["train"]["batch"],
        "images_per_step": per_step,
        "images_seen": step * per_step,
        "minutes": seconds / 60,
        "images_per_second": median(r["images_per_s"] for r in rows),
        "loss_first": fmean([r["loss"] for r in rows if r["step"] <= 100] or [rows[0]["loss"]]),
        "loss_last": fmean(r["loss"] for r in rows if r["step"] > step - min(500, step // 5)),
        "curve": [[int(r["step"]), round(r["loss"], 5)] for r in rows],
    }


def keep_run(a):
    """Measure and write; what is measured stands in NAME.part.json at once, whatever comes after."""
    info, run = complete(a.run), load(a.run, a.device)
    a.spec = info["data"]["spec"]
    a.rows = [(name, int(steps)) for name, steps in (word.split(":") for word in a.rows)]
    result = {
        "command": command(info),
        "evaluate": "python -m minigen evaluate RUN"
        f" --n {a.n} --sampler S --steps K --precision {a.precision} --bits 0",
        "method": info["method"],
        "hardware": a.hardware,
        "data": a.data,
        "images": info["data"]["n"],
        "weights": sum(p.numel() for p in run.net.parameters()),
        "sampler": None,
        "distances": [],
        "floor_curve": {},
        "bits": {},
        "training": [],
        "memory_gb": {},
        **told_by_log(info, log.read(a.run / "log.csv")),
    }

    path, part = PLACE / f"{a.name}.json", PLACE / f"{a.name}.part.json"
    if path.exists() and (old := json.loads(path.read_text())).get("command") == result["command"] and "large" in old:
        result["large"] = old["large"]

    def keep():
        PLACE.mkdir(exist_ok=True)
        part.write_text(json.dumps(result, indent=1) + "\n")

    for i, sampler in enumerate(a.rows):
        numbers = distance(a.run, *sampler, a, floor=i == 0)
        result["distances"].append(row(numbers))
        result["floor_curve"] |= {k: v for k, v in numbers.items() if k.endswith("_floor_curve")}
        keep()
    result["sampler"] = best_samples(run, result["distances"], a)
    result["training"], pictures = training(a.run, a)
    if pictures:
        picture(torch.cat(pictures), PLACE / f"{a.name}_training.png")
    keep()
    if a.bits:
        numbers = distance(a.run, *a.rows[0], a, n=16, bits=a.bits, features="none")
        result["bits"] = {k: v for k, v in numbers.items() if k.startswith("bits_")}
    for batch in a.memory:
        keep()
        result["memory_gb"][str(batch)] = memory(info, batch, a.device)
    keep()
    part.replace(path)
    print(json.dumps({k: v for k, v in result.items() if k != "curve"}, indent=1))


def best_samples(run, distances, a):
    """A picture of samples by the sampler with the least distance; says which."""
    name = f"frechet_{distances[0]['features']}"
    sampler, steps = a.rows[min(range(len(a.rows)), key=lambda i: distances[i][name])]
    choice = {"sampler": sampler, "steps": steps, "seed": 0, "device": a.device, "precision": a.precision}
    samples, calls = draw(run.method, run.net, (64, *run.shape), **choice)
    picture(samples, PLACE / f"{a.name}.png")
    return f"{sampler}, {calls:g} evaluations, EMA weights, seed 0"


def keep_curve(a):
    """At most 100 records, each the mean of equally many neighbors."""
    info, curve = complete(a.run), compare.read(a.run)
    k = -(-len(curve.loss) // 100)
    ends = range(k - 1, len(curve.loss), k)
    kept = {
        "info": info | {"data": {**info["data"], "spec": info["data"]["spec"].partition(":")[0]}},
        "images": [curve.images[i] for i in ends],
        "loss": [round(fmean(curve.loss[i - k + 1 : i + 1]), 5) for i in ends],
    }
    known = json.loads(compare.CURVES.read_text()) if compare.CURVES.exists() else {}
    known[a.name] = kept
    lines = [f"{json.dumps(name)}: {json.dumps(known[name])}" for name in sorted(known)]
    compare.CURVES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def keep_large(a):
    """Measure a run that is kept once more, with more samples."""
    info, path, (sampler, steps) = complete(a.run), PLACE / f"{a.name}.json", a.row.split(":")
    if command(info) != json.loads(path.read_text())["command"]:
        sys.exit(f"{path} tells of another run than {a.run}")
    numbers = row(distance(a.run, sampler, int(steps), a))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"large": numbers}, indent=1) + "\n")
    print(json.dumps(numbers))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = ap.add_subparsers(required=True)
    subs = {}
    for name, do in (("run", keep_run), ("large", keep_large), ("curve", keep_curve)):
        subs[name] = sub = words.add_parser(name)
        sub.add_argument("run", type=Path)
        sub.add_argument("name")
        sub.set_defaults(do=do)
    subs["run"].add_argument("--rows", nargs="+", default=["ddim:10", "ddim:20", "heun:10"], help="SAMPLER:STEPS")
    subs["large"].add_argument("--row", default="heun:10", help="SAMPLER:STEPS")
    for name, n in (("run", 1000), ("large", 10_000)):
        subs[name].add_argument("--n", type=int, default=n)
        subs[name].add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="while sampling")
        subs[name].add_argument("--device", default="cpu")
    sub = subs["run"]
    sub.add_argument("--hardware", required=True)
    sub.add_argument("--data", required=True, help="what the data were, in words")
    sub.add_argument("--bits", type=int, default=0)
    sub.add_argument("--along", type=int, help="samples at each snapshot, if not as many as at the end")
    sub.add_argument("--memory", nargs="*", type=int, default=[], help="batch sizes of which to measure the memory")
    sub = words.add_parser("memory")
    for name, kind in (("method", str), ("device", str), ("width", int), ("batch", int), ("precision", str)):
        sub.add_argument(name, type=kind)
    sub.add_argument("--compile", action="store_true")
    sub.set_defaults(do=measure_memory)
    a = ap.parse_args()
    a.do(a)


if __name__ == "__main__":
    measure.load = functools.cache(measure.load)  # a folder of images is read once, not for each row
    main()
