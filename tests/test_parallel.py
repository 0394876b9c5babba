"""Many processes, parts of a batch, and kills: whatever happens, the training is the same."""

import csv
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from minigen import DDPM, PFGM, checkpoint, core, nets, seeded
from minigen.__main__ import main
from minigen.data import Dataset
from minigen.processes import enough_memory
from minigen.recipe import TrainConfig
from minigen.train import Trainer

RANDOM = torch.Generator().manual_seed(0)
PICTURES = Dataset("pictures", torch.randint(0, 256, (40, 3, 8, 8), generator=RANDOM).byte(), 256, True)
CONFIG = TrainConfig(steps=6, batch=12, lr=1e-3, warmup=2, log_every=2)


def trainer(method, dropout=0.1, **changes):
    with seeded(1):
        net = nets.build(nets.preset(PICTURES.shape, method.out_channels(3), 8, dropout))
    return Trainer(method, net, PICTURES, replace(CONFIG, **changes), "cpu")


def log(run):
    with (run / "log.csv").open() as f:
        return [[float(v) for k, v in row.items() if not k.endswith("s")] for row in csv.DictReader(f)]


@pytest.mark.parametrize("method", ["ddpm", "pfgm"])  # one that cuts the batch, one that cuts the points only
def test_two_processes_train_like_one(tmp_path, method):
    words = [method, "--data", "digits", "--steps", "6", "--log-every", "2", "--width", "8", "--batch", "32"]
    words += ["--warmup", "2", "--dropout", "0.1", "--device", "cpu"]
    words += ["--small-batch", "16"] if method == "pfgm" else []
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    together = [*two, "-m", "minigen", "train", *words, "--out", str(tmp_path / "two")]
    done = subprocess.run(together, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert main(["train", *words, "--accumulate", "2", "--out", str(tmp_path / "one")]) == 0
    one, both = log(tmp_path / "one"), log(tmp_path / "two")
    assert len(one) == len(both) == 3
    for a, b in zip(one, both, strict=True):  # the same but for the order of a sum of two numbers
        assert a == pytest.approx(b, rel=2e-5)
    weights = [checkpoint.read(tmp_path / name)[0] for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for k in weights[0]:
        if k.startswith(("batches.", "random.")):  # the data go on in the same order, the noise with the same numbers
            assert torch.equal(weights[0][k], weights[1][k]), k
        elif k.startswith("ema."):
            assert torch.allclose(weights[0][k], weights[1][k], atol=1e-5), k


class Still(DDPM):
    """A loss without random numbers: what parts of a batch give can be compared with the whole."""

    def loss(self, net, x):
        return (net(x, x.new_full((len(x),), 0.5)) - x).square().flatten(1).mean(1)


def test_parts_of_a_batch_train_like_the_whole():
    runs = {parts: trainer(Still(), dropout=0.0, accumulate=parts, steps=1, log_every=1) for parts in (1, 3)}
    (a,), (b,) = (list(t) for t in runs.values())
    assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-5)
    for p, q in zip(runs[1].net.parameters(), runs[3].net.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6)
    assert runs[3].parts == 3 and runs[3].points == 12


def test_parts_have_different_noise():
    t = trainer(DDPM(T=20), accumulate=2)
    seen = []
    t.method = type(
        "Noted",
        (DDPM,),
        {"loss": lambda self, net, x: seen.append(torch.randn(3)) or net(x, x[:, 0, 0, 0]).mean((1, 2, 3))},
    )(20)
    next(t.steps())
    assert len(seen) == 2 and not torch.equal(*seen)


def test_shares_of_poisson_flow_have_all_charges_and_together_all_points():
    method, x = PFGM(small_batch=12), torch.arange(20.0)[:, None]
    shares = [method.share(x, i, 3) for i in range(3)]
    points = torch.cat([part[: m.small_batch] for m, part in shares])
    assert torch.equal(points, x[:12])
    assert all(torch.equal(part.sort(dim=0).values, x) for _, part in shares)
    assert trainer(PFGM(small_batch=6), batch=20, accumulate=2).points == 6


def test_parts_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match=r"the 12 samples of a step cannot be cut into 5 parts \(1 processes x --acc"):
        trainer(DDPM(T=20), accumulate=5)


def test_a_run_continues_with_another_number_of_processes(tmp_path):
    whole = trainer(DDPM(T=20), accumulate=2)
    list(whole)
    first = trainer(DDPM(T=20), accumulate=2, steps=4)
    list(first)
    first.save(tmp_path / "run")
    second = trainer(DDPM(T=20), accumulate=2, seed=9)
    second.load(tmp_path / "run")
    list(second)
    assert all(torch.equal(a, b) for a, b in zip(whole.net.parameters(), second.net.parameters(), strict=True))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."
        ),
    ],
)
def test_lack_of_memory_names_the_options(error, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(DDPM, "loss", fail)
    words = ["train", "ddpm", "--data", "digits", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("minigen: out of memory: cut the step with a larger --accumulate")
    assert checkpoint.read(tmp_path / "run")[1]["step"] == 0  # the run can go on
    monkeypatch.undo()
    assert main([*words[:2], "--resume", "--accumulate", "4", *words[-4:]]) == 0


def test_other_errors_are_not_called_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="^shapes$"), enough_memory():
        raise RuntimeError("shapes")


def test_a_schedule_is_copied_to_a_device_once():
    schedule, learned = torch.rand(5), torch.rand(5, requires_grad=True)
    meta = torch.device("meta")  # a device that every machine has
    assert core.on_device(schedule, meta) is core.on_device(schedule, meta)
    assert core.on_device(schedule, torch.device("cpu")) is schedule
    assert core.on_device(learned, meta) is not core.on_device(learned, meta)


def test_one_step_copies_no_schedule_twice(monkeypatch):
    method, t = DDPM(T=20), torch.tensor([3, 7])
    seen = []
    monkeypatch.setattr(core, "on_device", lambda schedule, device: seen.append(id(schedule)) or schedule)
    for _ in range(2):
        method.perturb(torch.zeros(2, 2), t, torch.ones(2, 2))
        method.predict_x0(torch.zeros(2, 2), t, torch.ones(2, 2))
        method.posterior(torch.zeros(2, 2), torch.zeros(2, 2), t)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]  # the same tensors again: none is made anew at each call


KILLED = """
import os, random, signal, sys, time
sys.path.insert(0, os.getcwd())
import torch
from pathlib import Path
from minigen import checkpoint
from minigen.__main__ import main

torch.set_num_threads(1)
run, words = Path(sys.argv[1]), sys.argv[2:]
clock, reached, kills = random.Random(0), -1, 0
sys.stderr = open(os.devnull, "w")
main([*words, "--steps", "1", "--out", str(run) + "-0"])  # everything is imported before the first fork
while kills < 20:
    child = os.fork()
    if not child:
        resume = ["--resume"] if (run / checkpoint.NAME).exists() else []
        os._exit(main([*words, "--steps", "100000", "--out", str(run), *resume]))
    time.sleep(clock.uniform(0.02, 0.5))
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] == 0:
        sys.exit("a run came to its end before it was killed")
    kills += 1
    if (run / checkpoint.NAME).exists():
        step = checkpoint.read(run)[1]["step"]  # whole and readable, and nothing that was saved is lost
        assert step >= reached, (step, reached)
        reached = step
print(kills, reached)
"""


def test_twenty_kills_in_a_row_lose_no_checkpoint(tmp_path):
    words = [
        "train",
        "ddpm",
        "--data",
        "eight_gaussians",
        "--width",
        "8",
        "--batch",
        "16",
        "--warmup",
        "2",
        "--T",
        "20",
    ]
    words += ["--device", "cpu", "--log-every", "10", "--decay", "constant", "--save-every", "2", "--sample-every", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = tmp_path / "run"
    killed = [sys.executable, "-c", KILLED, str(run), *words]
    done = subprocess.run(killed, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    kills, reached = map(int, done.stdout.split()[-2:])
    assert kills == 20 and reached > 0
    end = str(reached + 20)
    assert main([*words[:2], "--out", str(run), "--resume", "--device", "cpu", "--steps", end]) == 0
    assert main([*words, "--out", str(tmp_path / "unbroken"), "--steps", end]) == 0
    (a, _), (b, _) = checkpoint.read(run), checkpoint.read(tmp_path / "unbroken")
    assert a.keys() == b.keys() and not [k for k in a if k != "loss" and not torch.equal(a[k], b[k])]
    assert log(run) == log(tmp_path / "unbroken")
