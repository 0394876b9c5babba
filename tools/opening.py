"""Draw the moving picture of the landing page:  python tools/opening.py

A heart of points condenses by its exact denoiser, digits by the network that comes with the package.
"""
import sys
from importlib.resources import files
from pathlib import Path

import matplotlib
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
matplotlib.use("Agg")

import matplotlib.pyplot as plt

from minigen import DDPM, laws, load, samplers, seeded, viz

PAGE = ROOT / "book" / "_static" / "opening.html"
ALT = "On the left a gray cloud of points contracts into a heart; on the right static turns into handwritten digits"


def paths():
    method, run = DDPM(), load(files("minigen") / "assets" / "ddpm_digits.safetensors")
    sigmas = method.sigmas(60)
    with torch.no_grad(), seeded(4):
        x, y = method.start((1500, 2), sigmas[0]), method.start((24, 1, 8, 8), sigmas[0])
        heart = [x, *samplers.ddim(laws.heart().denoiser, x, sigmas)]
        digits = [y, *samplers.ddim(run.method.denoiser(run.net), y, sigmas)]
    scale = (1 + sigmas**2).rsqrt().float()
    return sigmas, [s * p for s, p in zip(scale, heart)], [s * p for s, p in zip(scale, digits)]


def frame(sigma, points, images):
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.5), width_ratios=[1, 1.5])
    model, noise = (torch.tensor(matplotlib.colors.to_rgb(c)) for c in (viz.MODEL, viz.NOISE))
    color = torch.lerp(model, noise, float(sigma / (1 + sigma))).tolist()
    viz.points(left, points, color, limit=3, size=3)
    viz.images(right, images, columns=6)
    return viz.fig_to_frame(fig, dpi=90, quality=70)


def main():
    viz.use_style()
    sigmas, points, images = paths()
    keep = [0, 12, 20, 26, 30, 34, 38, *range(40, 61)]
    frames = [frame(sigmas[k], points[k], images[k]) for k in keep]
    labels = [f"noise {float(sigmas[k]):.2f}" for k in keep]
    player = viz.FramePlayer(frames, labels, alt=ALT, interval=130, start=len(keep) - 1)
    PAGE.write_text(player._repr_html_() + "\n")
    print(f"wrote {PAGE.relative_to(ROOT)}, {PAGE.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
