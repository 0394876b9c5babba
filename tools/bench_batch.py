"""How large a batch should be on a processor, where a picture costs the same in small batches and in large ones:

  python tools/bench_batch.py --data folder:PATH --hardware "..." --out book/results/batches.json

Trains DDPM's U-Net at a quarter of its width with each batch and learning rate on the same number of pictures, from
the same weights, otherwise with the recipe `fast`. Then measures the loss of the averaged weights on 1,024 test
pictures, at 1,024 evenly spread times and the same noise for all, and the seconds of one core that the training took.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minigen import DDPM, nets, seeded  # noqa: E402
from minigen.data import load  # noqa: E402
from minigen.recipe import preset  # noqa: E402
from minigen.train import Trainer  # noqa: E402

TEST = 1024


def losses(net, method, pictures):
    """The squared error of the noise by picture; picture k has the time 1 + floor(k T / n)."""
    n = len(pictures)
    with seeded(1), torch.no_grad():
        t, eps = torch.arange(n) * method.T // n + 1, torch.randn_like(pictures)
        parts = zip(method.perturb(pictures, t, eps).split(128), t.split(128), eps.split(128))
        return torch.cat([(net(x, method.clock(s)) - e).square().mean((1, 2, 3)) for x, s, e in parts])


def row(data, test, batch, lr, images, width):
    method, steps = DDPM(), images // batch
    with seeded(0):
        net = nets.build(nets.preset(data.shape, data.shape[0], width))
    config = replace(preset(data, recipe="fast", steps=steps), batch=batch, lr=lr, precision="bf16")
    trainer = Trainer(method, net, data, config, "cpu")
    began = time.process_time()
    for _ in trainer:
        pass
    seconds = time.process_time() - began
    loss = losses(trainer.ema.net, method, test.samples(TEST))
    low, _, _, high = (float(f"{part.mean():.4g}") for part in loss.chunk(4))
    out = {"batch": batch, "steps": steps, "lr": config.lr, "cpu_seconds": round(seconds)}
    return out | {"loss": float(f"{loss.mean():.4g}"), "loss_first_quarter": low, "loss_last_quarter": high}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data", required=True)
    ap.add_argument("--hardware", required=True)
    ap.add_argument("--rows", nargs="+", default=["8:0.001", "16:0.001", "32:0.001", "32:0.0014"], help="BATCH:RATE")
    ap.add_argument("--images", type=int, default=9600)
    ap.add_argument("--width", type=int, default=32)
    ap.add_argument("--out", type=Path)
    a = ap.parse_args()
    torch.set_num_threads(1)
    data, test = load(a.data), load(a.data, "test")
    result = {
        "what": f"loss of DDPM, U-Net of width {a.width}, after {a.images:,} pictures in batches of different sizes, "
        f"on {TEST:,} test pictures at all times; its parts are the first and last quarter of the times",
        "command": f"python tools/bench_batch.py --data folder:PATH --rows {' '.join(a.rows)} "
        f"--images {a.images} --width {a.width}",
        "hardware": a.hardware,
        "images": a.images,
        "rows": [],
    }
    for word in a.rows:
        batch, _, lr = word.partition(":")
        result["rows"].append(row(data, test, int(batch), float(lr), a.images, a.width))
        print(json.dumps(result["rows"][-1]), flush=True)
        if a.out:
            a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
