"""What DDPM's network knows of the mean color of a picture, with many and with few groups in its normalization:

  python tools/colors.py RUN [RUN ...] --data folder:PATH --hardware "..." --out book/results/colors

Each RUN is a run of DDPM, or a file of its snapshots. Writes OUT.json, with the share of the mean color of the noise
that the network reports (the slope of a line through 0, over noisy test pictures), the same for the brightness, and
the standard deviation from sample to sample of the mean of a color, beside that of photographs. And OUT.png: 16
samples for each run.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minigen import load, seeded  # noqa: E402
from minigen.data import load as load_data  # noqa: E402
from minigen.generate import draw, picture  # noqa: E402

TIMES = (200, 500, 800, 1000)


def spread(x):
    """Root mean square over the colors of the standard deviation of their means."""
    return float(x.clamp(-1, 1).mean((2, 3)).var(0).mean().sqrt())


def shares(run, photographs):
    """By time: the share of the mean of each color of the noise, and of its brightness, in the network's guess."""
    out = {}
    with torch.no_grad(), seeded(0):
        for t in TIMES:
            time, eps = torch.full((len(photographs),), t), torch.randn_like(photographs)
            guess = run.net(run.method.perturb(photographs, time, eps), run.method.clock(time)).mean((2, 3))
            true = eps.mean((2, 3))
            slope = lambda a, b: float((a * b).sum() / (b * b).sum())
            out[str(t)] = {"color": slope(guess, true), "brightness": slope(guess.mean(1), true.mean(1))}
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("runs", nargs="+", type=Path)
    ap.add_argument("--data", required=True)
    ap.add_argument("--hardware", required=True)
    ap.add_argument("--out", required=True, type=Path)
    ap.add_argument("--n", type=int, default=256)
    ap.add_argument("--steps", type=int, default=20, help="of ddim")
    a = ap.parse_args()
    torch.set_num_threads(1)
    photographs = load_data(a.data, "test").samples(5000)
    result = {
        "what": "share of the mean color of the noise that a network reports, by time t, and spread (deviation "
        "from picture to picture) of the mean of a color, in samples and in photographs; pictures in [-1, 1]",
        "command": f"python tools/colors.py RUN [RUN ...] --data folder:PATH --n {a.n} --steps {a.steps}",
        "hardware": a.hardware,
        "photographs": {"n": len(photographs), "spread": spread(photographs)},
        "rows": [],
    }
    pictures = []
    for path in a.runs:
        run = load(path)
        x, calls = draw(run.method, run.net, (a.n, *run.shape), steps=a.steps, seed=0, precision="bf16")
        row = {"method": "DDPM", "width": run.net.config.width, "groups": run.net.config.groups}
        row |= {"trained_steps": run.step, "sampler": f"ddim, {calls:g} evaluations, EMA weights, seed 0", "n": a.n}
        result["rows"].append(row | {"spread": spread(x), "reported": shares(run, photographs[: a.n])})
        pictures.append(x[:16])
        print(json.dumps(result["rows"][-1]), flush=True)
    picture(torch.cat(pictures), a.out.with_suffix(".png"))
    a.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
