"""Keep what a run gave:  python tools/results.py RUN NAME --hardware "..." --data "..."

Writes book/results/NAME.json (command, hardware, data, sizes, times, losses, curve) and book/results/NAME.png (64
samples). The chapters read their numbers from there.
"""
import argparse
import csv
import json
import sys
from pathlib import Path
from statistics import fmean, median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minigen import load  # noqa: E402
from minigen.generate import draw, picture  # noqa: E402

PLACE = ROOT / "book" / "results"
OPTIONS = ("steps", "minutes", "batch", "lr", "seed", "precision")


def command(config, data):
    """The command line that gives this run; the path of a folder is left to the reader."""
    train = {k: config["train"][k] for k in OPTIONS if config["train"][k] is not None}
    words = [f"--{k} {v}" for k, v in {"width": config["net"]["width"], **train}.items()]
    spec = "folder:PATH" if data["spec"].startswith("folder:") else data["spec"]
    return f"python -m minigen train {config['method']} --data {spec} --out RUN {' '.join(words)}"


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("run", type=Path)
    ap.add_argument("name")
    ap.add_argument("--hardware", required=True)
    ap.add_argument("--data", required=True, help="what the data were, in words")
    a = ap.parse_args()
    run, config = load(a.run), json.loads((a.run / "config.json").read_text())
    planned = config["train"]
    if run.step < (planned["steps"] or 0) or run.seconds < 60 * (planned["minutes"] or 0):
        sys.exit(f"{a.run} is not complete: continue it first")
    with (a.run / "log.csv").open() as f:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    samples, calls = draw(run.method, run.net, (64, *run.shape), sampler="ddim", steps=50, seed=0)
    PLACE.mkdir(exist_ok=True)
    picture(samples, PLACE / f"{a.name}.png")
    result = {
        "command": command(config, config["data"]),
        "hardware": a.hardware,
        "data": a.data,
        "images": config["data"]["n"],
        "weights": sum(p.numel() for p in run.net.parameters()),
        "steps": run.step,
        "batch": config["train"]["batch"],
        "minutes": run.seconds / 60,
        "images_per_second": median(r["images_per_s"] for r in rows),
        "loss_first": fmean(r["loss"] for r in rows if r["step"] <= 100),
        "loss_last": fmean(r["loss"] for r in rows if r["step"] > run.step - 500),
        "sampler": f"ddim, {calls:.0f} evaluations, EMA weights, seed 0",
        "curve": [[int(r["step"]), round(r["loss"], 5)] for r in rows],
    }
    (PLACE / f"{a.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "curve"}, indent=1))


if __name__ == "__main__":
    main()
