"""Our U-Net and trainer against their peers:  python tools/bench_step.py --out book/results/speed_cpu.json

All run in one process. In every round each entrant does each task once, in random order, so that whatever slows the
machine slows all alike; what counts is the median over the rounds of the ratio of two times of one round.

Tasks, all with the same network of 35.7 million weights (forward and backward: 37.32 GFLOP per image):

forward  the network in evaluation mode, without gradients
step     forward, mean squared error, backward, Adam
loop     one turn of the training loop: the batch, the noise and the clock, the loss, backward, clipping, Adam, EMA, log

Entrants: ours in float32 and in bf16, as `Trainer` runs them; torchcfm's UNetModelWrapper with the settings and loop
of its CIFAR-10 example (Adam, warmup, clipping, EMA over the state dict); diffusers' UNet2DModel with the configuration
of google/ddpm-cifar10-32, with the dropout of 0.1 that the others have (that file leaves it out, which would save it
about 5 %), and the loop of its unconditional example (AdamW, cosine, clipping, EMAModel). The peers get their batches
ready on the device: their data loaders and progress bars are not counted against them. On a card they run as PyTorch
sets itself: TensorFloat-32 in convolutions only, and no search for the fastest program. ``--favored`` gives them both,
as ours has it.

Needs the peers:  pip install diffusers torchcfm  (or, for the network alone: pip install --no-deps torchcfm pot)
"""

import argparse
import json
import platform
import random
import re
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minigen import DDPM  # noqa: E402
from minigen.data import Dataset  # noqa: E402
from minigen.log import Log  # noqa: E402
from minigen.nets import build, preset  # noqa: E402
from minigen.train import TrainConfig, Trainer  # noqa: E402

GFLOP_PER_IMAGE = 37.32
TASKS = ("forward", "step", "loop")
CIFAR_CFM = {
    "dim": (3, 32, 32), "num_res_blocks": 2, "num_channels": 128, "channel_mult": [1, 2, 2, 2], "num_heads": 4,
    "num_head_channels": 64, "attention_resolutions": "16", "dropout": 0.1,
}  # fmt: skip
DDPM_CIFAR10_32 = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2, "act_fn": "silu", "norm_eps": 1e-6, "norm_num_groups": 32, "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "attention_head_dim": None, "dropout": 0.1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


class Ours:
    """The package: every part is the `Trainer`'s own."""

    def __init__(self, device, batch, precision):
        self.name = "ours " + precision
        images = torch.randint(256, (max(2048, 2 * batch), 3, 32, 32), dtype=torch.uint8)
        config = TrainConfig(batch=batch, precision=precision, compile=device == "cuda", log_every=20)
        data = Dataset("noise", images, bins=256, flip=True)
        self.trainer = Trainer(DDPM(), build(preset((3, 32, 32), 3)), data, config, device)
        self.log = Log(Path(tempfile.mkdtemp()) / "log.csv", 0)
        self.parts = {"clip": 0.0, "adam": 0.0, "ema": 0.0, "log": 0.0}

    def forward(self, x, noise, u):
        x = x.contiguous(memory_format=torch.channels_last)
        self.trainer.net.eval()
        with torch.no_grad():
            self.trainer._call(x, u)

    def step(self, x, noise, u):
        x = x.contiguous(memory_format=torch.channels_last)
        self.trainer.net.train()
        self.trainer.optimizer.grad_scale = None  # no clipping here
        self.trainer.optimizer.zero_grad()
        (self.trainer._call(x, u) - noise).square().mean().backward()
        self.trainer.optimizer.step()

    def loop(self, x, noise, u):
        t = self.trainer
        t._update()
        if t.step % t.config.log_every == 0:
            self.log.add(t._record(), 1.0, 1.0)

    def overhead(self, sync):
        """Seconds of one turn of the loop, and of its parts that are neither loss nor gradient."""
        t, parts = self.trainer, dict.fromkeys(self.parts, 0.0)

        def timed(name, f):
            def g(*args, **kwargs):
                sync()
                began = time.perf_counter()
                out = f(*args, **kwargs)
                sync()
                parts[name] += time.perf_counter() - began
                return out

            return g

        clip, adam, ema = t._clip, t.optimizer.step, t.ema.update
        t._clip, t.optimizer.step = timed("clip", clip), timed("adam", adam)
        t.ema.update = timed("ema", ema)
        try:
            whole = clock(t._update, sync)
        finally:
            t._clip, t.optimizer.step, t.ema.update = clip, adam, ema
        parts["log"] = clock(lambda: self.log.add(t._record(), 1.0, 1.0), sync) / t.config.log_every
        return whole + parts["log"], parts


class TorchCfm:
    name = "torchcfm"

    def __init__(self, device, batch):
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
        from torchcfm.models.unet.unet import UNetModelWrapper

        self.net = UNetModelWrapper(**CIFAR_CFM).to(device)
        self.flow, self.average = ConditionalFlowMatcher(sigma=0.0), deepcopy(self.net)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=2e-4)
        self.rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: min(n, 5000) / 5000)

    def forward(self, x, noise, u):
        self.net.eval()
        with torch.no_grad():
            self.net(u, x)

    def step(self, x, noise, u):
        self.net.train()
        self.optimizer.zero_grad()
        torch.mean((self.net(u, x) - noise) ** 2).backward()
        self.optimizer.step()

    def loop(self, x, noise, u):
        self.net.train()
        self.optimizer.zero_grad()
        t, xt, ut = self.flow.sample_location_and_conditional_flow(torch.randn_like(x), x)
        torch.mean((self.net(t, xt) - ut) ** 2).backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        new = self.net.state_dict()
        for key, value in self.average.state_dict().items():
            value.copy_(value * 0.9999 + new[key] * 0.0001)


class Diffusers:
    name = "diffusers"

    def __init__(self, device, batch):
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.net = UNet2DModel(**DDPM_CIFAR10_32).to(device)
        self.noise = DDPMScheduler(num_train_timesteps=1000)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self.rate = get_scheduler("cosine", self.optimizer, num_warmup_steps=500, num_training_steps=100_000)
        self.average = EMAModel(self.net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def forward(self, x, noise, u):
        self.net.eval()
        with torch.no_grad():
            self.net(x, 999 * u)

    def step(self, x, noise, u):
        self.net.train()
        self.optimizer.zero_grad()
        F.mse_loss(self.net(x, 999 * u).sample, noise).backward()
        self.optimizer.step()

    def loop(self, x, noise, u):
        self.net.train()
        noise = torch.randn(x.shape, device=x.device)
        t = torch.randint(0, 1000, (len(x),), device=x.device)
        loss = F.mse_loss(self.net(self.noise.add_noise(x, noise, t), t).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        self.average.step(self.net.parameters())
        loss.detach().item()  # its progress bar shows it at every step


def clock(f, sync, times=1):
    sync()
    began = time.perf_counter()
    for _ in range(times):
        f()
    sync()
    return (time.perf_counter() - began) / times


def spread(values):
    q1, q2, q3 = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": float(f"{q2:.4g}"), "quartiles": [float(f"{q1:.4g}"), float(f"{q3:.4g}")]}


def matrix_rate(device, dtype, sync):
    """TFLOP/s of a product of two square matrices: the best of five."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(clock(lambda: a @ b, sync) for _ in range(5)) / 1e12


def favor(device, on):
    """On a card: TensorFloat-32 in all products and a search for the fastest convolution, as `minigen train` does."""
    if device == "cuda":
        torch.backends.cudnn.benchmark = on
        torch.set_float32_matmul_precision("high" if on else "highest")


def entrants(device, batch, precisions):
    out = [Ours(device, batch, precision) for precision in precisions]
    for peer in (TorchCfm, Diffusers):
        try:
            out.append(peer(device, batch))
        except ImportError as error:
            print(f"{peer.name} is left out ({error}): pip install diffusers torchcfm pot", file=sys.stderr)
    return out


def race(device, batch, rounds, inner, sync, precisions, favored):
    """Times of every entrant at every task in every round, the parts of our loop, and the rate of matrix products."""
    runners = entrants(device, batch, precisions)
    ours = [r for r in runners if isinstance(r, Ours)]
    x, noise = torch.randn(2, batch, 3, 32, 32, device=device).unbind()
    args = x, noise, torch.rand(batch, device=device)
    jobs = [(r, task) for r in runners for task in TASKS]
    times = {(r.name, task): [] for r, task in jobs}
    shares = {r.name: [] for r in ours}
    rates = {"fp32": [], "bf16": []}
    for n in range(-1, rounds):  # the first one warms up and is forgotten
        for r, task in random.sample(jobs, len(jobs)):
            repeat = inner if n >= 0 else 2
            favor(device, favored or isinstance(r, Ours))
            times[r.name, task].append(clock(lambda r=r, task=task: getattr(r, task)(*args), sync, repeat))
        favor(device, True)
        for r in ours:
            shares[r.name].append(r.overhead(sync))
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            rates[kind].append(matrix_rate(device, dtype, sync))
        if n >= 0:
            print(f"round {n + 1} of {rounds}", file=sys.stderr, flush=True)
    times, shares = ({k: v[1:] for k, v in d.items()} for d in (times, shares))
    return times, shares, {k: float(f"{median(v[1:]):.4g}") for k, v in rates.items()}


def summary(times, shares, batch, rates):
    names, ours = list(dict.fromkeys(name for name, _ in times)), list(shares)
    out = {"matrix_tflops": rates, "seconds": {}, "images_per_s": {}, "speed": {}, "overhead_percent": {}}
    for task in TASKS:
        out["seconds"][task] = {n: spread(times[n, task]) for n in names}
        out["images_per_s"][task] = {n: float(f"{batch / median(times[n, task]):.4g}") for n in names}
        out["speed"][task] = {
            f"{a} / {b}": spread([tb / ta for ta, tb in zip(times[a, task], times[b, task])])
            for a in ours for b in names if b != a
        }  # fmt: skip
    for name, rows in shares.items():
        parts = {part: spread([100 * p[part] / whole for whole, p in rows]) for part in rows[0][1]}
        parts["together"] = spread([100 * sum(p.values()) / whole for whole, p in rows])
        out["overhead_percent"][name] = parts
    out["fraction_of_matrix_rate"] = {
        n: float(f"{batch / median(times[n, 'loop']) * GFLOP_PER_IMAGE / 1e3 / rates[n.split()[1]]:.3g}")
        for n in ours
    }
    return out


def hardware(device, threads):
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    named = {k.strip(): v.strip() for k, v in named.items()}
    flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in named.get("flags", "").split()]
    cpu = {"cpu": named.get("model name", platform.processor()), "cpu_flags": flags, "threads": threads}
    return cpu | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def versions():
    from importlib.metadata import PackageNotFoundError, version

    out = {"python": platform.python_version()}
    for name in ("torch", "diffusers", "torchcfm"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = None
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=9)
    ap.add_argument("--batch", type=int, nargs="+", help="8 on the CPU, 128 and 512 on a GPU")
    ap.add_argument("--threads", type=int, default=2, help="of the CPU")
    ap.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--inner", type=int, help="repetitions in a round: 1 on the CPU, 10 on a GPU")
    ap.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"), help="of ours")
    ap.add_argument("--favored", action="store_true", help="on a card: the peers too have what ours switches on")
    ap.add_argument("--out", type=Path)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    sync = torch.cuda.synchronize if a.device == "cuda" else lambda: None
    more = f" --inner {a.inner}" if a.inner else ""
    more += " --favored" if a.favored else ""
    more += f" --precisions {' '.join(a.precisions)}" if len(a.precisions) < 2 else ""
    batches = a.batch or ([128, 512] if a.device == "cuda" else [8])
    result = {
        "what": "Training step, training loop and forward pass of the 35.7M U-Net; speed 'a / b': how often a does "
        "its task while b does it once",
        "command": f"python tools/bench_step.py --rounds {a.rounds} --batch {' '.join(map(str, batches))} --device "
        f"{a.device} --threads {a.threads}{more}",
        "hardware": hardware(a.device, a.threads),
        "versions": versions(),
        "rounds": a.rounds,
        "batch": {},
    }
    for batch in batches:
        torch._dynamo.reset()  # else the second batch would be compiled for batches of any size, unlike in training
        inner = a.inner or (10 if a.device == "cuda" else 1)
        times, shares, rates = race(a.device, batch, a.rounds, inner, sync, a.precisions, a.favored)
        result["batch"][str(batch)] = summary(times, shares, batch, rates)
        text = re.sub(r"\[\s+(\S+)\s+(\S+)\s+\]", r"[\1 \2]", json.dumps(result, indent=1))  # quartiles on one line
        if a.out:  # after each batch, whatever comes after
            a.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
