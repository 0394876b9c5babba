"""Training: schedules, averages, and above all that stopping and continuing changes nothing."""

import json
import os
import time
from copy import deepcopy
from dataclasses import replace
from math import cos, inf, pi

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import minigen
from minigen import DDPM, checkpoint, nets, recipe, seeded
from minigen.data import Dataset, load
from minigen.generate import draw
from minigen.methods import METHODS
from minigen.processes import Stream, pick_device
from minigen.recipe import PAPER, TrainConfig, preset
from minigen.train import Ema, Trainer

RANDOM = torch.Generator().manual_seed(0)
PICTURES = Dataset("pictures", torch.randint(0, 256, (30, 3, 8, 8), generator=RANDOM).byte(), 256, True)


def trainer(data, width=8, device="cpu", **changes):
    config = replace(preset(data), **{"steps": 12, "batch": 16, "warmup": 3, "log_every": 4, **changes})
    method = DDPM(T=20)
    with seeded(config.seed):  # dropout, so that the network draws random numbers too
        net = nets.build(nets.preset(data.shape, method.out_channels(data.shape[0]), width, dropout=0.1))
    return Trainer(method, net, data, config, device)


def everything(t):
    adam = t.optimizer.state_dict()["state"]
    parts = {"net": t.net.state_dict(), "ema": t.ema.net.state_dict(), **{f"adam{i}": s for i, s in adam.items()}}
    return {f"{part}.{k}": v for part, state in parts.items() for k, v in state.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert not [k for k in a if not torch.equal(a[k], b[k])]


@pytest.mark.parametrize("data", [load("two_modes"), load("digits"), PICTURES], ids=["points", "digits", "flipped"])
@pytest.mark.parametrize("stop", [0, 6, 8])  # before the first step, between two records, at a record
def test_stopping_and_continuing_gives_the_same_bits(tmp_path, data, stop):
    whole = trainer(data)
    records = list(whole)
    assert [r.step for r in records] == [4, 8, 12]

    first, seen = trainer(data), []
    steps = first.steps()
    for _ in range(stop):
        seen.append(next(steps))
        torch.randn(3)  # what others draw in between does not matter
        draw(first.method, first.ema.net, (2, *data.shape), steps=2)
    first.save(tmp_path / "run")
    second = trainer(data, seed=7)  # another order, other weights, other noise: all replaced
    second.load(tmp_path / "run")
    seen += list(second)
    assert [r for r in seen if r] == records  # the loss log to the last digit
    assert_same(everything(second), everything(whole))


def test_training_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    list(trainer(PICTURES, steps=2))
    assert torch.equal(state, torch.get_rng_state())
    stream = Stream(4, torch.device("cpu"))
    with stream:
        a = torch.randn(3)
    torch.randn(10)
    with stream:
        b = torch.randn(3)
    with seeded(4):
        assert torch.equal(torch.cat([a, b]), torch.cat([torch.randn(3), torch.randn(3)]))


def test_the_loss_falls_and_the_record_says_so():
    records = list(trainer(load("eight_gaussians"), 64, steps=300, batch=128, warmup=20, log_every=100))
    assert [r.step for r in records] == [100, 200, 300]
    assert records[-1].loss < 0.9 * records[0].loss and records[-1].grad_norm > 0 and records[-1].lr < 1e-6


def test_the_same_seed_gives_the_same_run_and_another_does_not():
    a, b, c = (list(trainer(PICTURES, steps=4, seed=s)) for s in (1, 1, 2))
    assert a == b != c


def test_average_against_a_hand_computation():
    net = nn.BatchNorm1d(1)  # two weights and three buffers
    ema, by_hand = Ema(net, 0.5), 1.0
    for n, value in enumerate([2.0, -1.0, 5.0, 0.5, 3.0, 3.0], start=1):
        nn.init.constant_(net.weight, value)
        net.running_mean.fill_(value)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        by_hand = decay * by_hand + (1 - decay) * value
        assert float(ema.net.weight) == pytest.approx(by_hand, rel=1e-6)
        assert float(ema.net.running_mean) == value
    assert not ema.net.training and not ema.net.weight.requires_grad


def test_learning_rate_by_steps():
    constant = TrainConfig(steps=1000, lr=2.0, warmup=100)
    assert constant.rate(0) == pytest.approx(0.02) and constant.rate(49) == 1.0
    assert constant.rate(99) == constant.rate(999) == 2.0
    falling = replace(constant, decay="cosine")
    assert falling.rate(500) == pytest.approx(1.0) and falling.rate(250) == pytest.approx(1 + cos(pi / 4))
    assert falling.rate(1000) == 0
    assert replace(constant, warmup=0).rate(0) == 2.0


def test_learning_rate_by_time():
    config = TrainConfig(steps=None, minutes=10, lr=2.0, warmup=10**9)
    assert config.rate(5, 0) == 0 and config.rate(5, 15) == pytest.approx(1.0, rel=0.01)  # half of the first 5 %
    assert config.rate(5, 300) == pytest.approx(1.0) and config.rate(5, 600) == 0
    assert config.progress(10**6, 150) == 0.25
    assert replace(config, steps=100).progress(50, 150) == 0.5  # whichever is further


def test_a_time_budget_is_kept_and_continued(tmp_path):
    t = trainer(load("two_modes"), steps=None, minutes=0.02, log_every=10**6)
    t.seconds = 1.0  # as if loaded
    (record,) = list(t)
    assert 1.2 <= t.seconds < 1.5 and record.step == t.step > 2
    t.save(tmp_path / "run")
    again = trainer(load("two_modes"), steps=None, minutes=0.02)
    again.load(tmp_path / "run")
    assert not list(again)  # the budget is spent


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps must be positive, got 0"),
        ({"steps": None}, "give --steps or --minutes"),
        ({"minutes": -1.0}, "--minutes must be positive"),
        ({"batch": -3}, "--batch must be positive, got -3"),
        ({"lr": 0.0}, "--lr must be positive"),
        ({"lr": float("nan")}, "--lr must be positive"),
        ({"warmup": -1}, "--warmup must be at least 0"),
        ({"ema": 1.0}, r"--ema in \[0, 1\)"),
        ({"precision": "fp16"}, "precision fp32 or bf16"),
        ({"decay": "step"}, "decay is constant or cosine"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as e:
        TrainConfig(**change)
    assert "\n" not in str(e.value)


def test_presets():
    paper = TrainConfig()
    assert (paper.steps, paper.batch, paper.lr, paper.warmup, paper.ema) == (800_000, 128, 2e-4, 5000, 0.9999)
    assert preset(Dataset("x", torch.zeros(1, 3, 32, 32).byte(), 256)) == paper
    assert preset(load("digits")).decay == preset(load("heart")).decay == "cosine"


def test_recipes():
    images = Dataset("x", torch.zeros(1, 3, 32, 32).byte(), 256)
    assert set(PAPER) == set(METHODS)
    assert all(preset(images, name) == config for name, config in PAPER.items())
    ncsn, edm = PAPER["ncsn"], PAPER["pfgmpp"]
    assert (ncsn.lr, ncsn.steps, ncsn.warmup, ncsn.ema) == (1e-3, 200_000, 0, 0)
    assert edm.steps * edm.batch == 200_000_000 and edm.warmup == pytest.approx(10e6 / 512, abs=1)
    assert edm.ema ** (500_000 / edm.batch) == pytest.approx(0.5)
    fast = preset(images, "ncsn", "fast")
    assert (fast.steps, fast.minutes, fast.precision) == (None, 20, "fp32") and fast.rate(0, 20 * 60) == 0
    assert preset(images, recipe="fast", device="cuda").compile
    some = preset(images, recipe="fast", steps=200)
    assert (some.steps, some.minutes, some.warmup) == (200, None, 10) and some.rate(200) == 0
    assert preset(load("digits"), recipe="fast").minutes == 1
    with pytest.raises(ValueError, match="unknown recipe 'slow': use paper or fast"):
        preset(images, recipe="slow")


@pytest.mark.parametrize(
    ("has", "card", "expected"),
    [(True, (9, 0), ("bf16", 128, True)), (False, (7, 5), ("fp32", 128, True)), (False, (6, 0), ("fp32", 128, False))],
)
def test_the_quick_recipe_asks_of_a_card_what_it_can(monkeypatch, has, card, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has and not including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: card)
    monkeypatch.setattr(recipe, "find_spec", lambda name: name == "triton")
    config = preset(Dataset("x", torch.zeros(1, 3, 32, 32).byte(), 256), recipe="fast", device="cuda")
    assert (config.precision, config.batch, config.compile) == expected


def test_compiling_costs_nothing_of_a_budget_of_time(monkeypatch):
    class Late(DDPM):
        def loss(self, net, x):
            if not SEEN:
                time.sleep(1.5)  # the first call compiles
            SEEN.append(x)
            return super().loss(net, x)

    SEEN.clear()
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    t = trainer(load("two_modes"), compile=True, steps=None, minutes=0.5 / 60)
    t.method = Late(T=20)
    list(t)
    assert t.step > 3 and t.seconds < 1.5


def test_an_average_of_length_zero_is_the_network_itself():
    t = trainer(PICTURES, ema=0.0, grad_clip=inf)
    list(t)
    assert all(torch.equal(a, b) for a, b in zip(t.net.parameters(), t.ema.net.parameters(), strict=True))


@pytest.mark.parametrize("bound", [0.27, inf])
def test_clipping_inside_of_adam_is_clipping_before_it(bound):
    t = trainer(PICTURES, grad_clip=bound)
    copy, norms, clip = deepcopy(t.net), [], t._clip
    adam = torch.optim.Adam(copy.parameters())

    def clip_both():
        for p, q in zip(copy.parameters(), t.net.parameters(), strict=True):
            p.grad = q.grad.clone()
        norms.append(float(nn.utils.clip_grad_norm_(copy.parameters(), bound)))
        return clip()

    t._clip = clip_both
    for _ in t.steps():
        adam.param_groups[0]["lr"] = t._lr
        adam.step()
        assert float(t._norm) == pytest.approx(norms[-1], rel=1e-5)
    assert len(norms) == 12 and min(norms) < 0.27 < max(norms)  # some are clipped, some are not
    for p, q in zip(copy.parameters(), t.net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


class Watched(DDPM):
    """Notes what the loss gets from the network."""

    def loss(self, net, x):
        def watched(x_t, u):
            out = net(x_t, u)
            SEEN.append(("loss", out.dtype, torch.is_autocast_enabled("cpu")))
            return out

        return super().loss(watched, x)


SEEN = []


def test_mixed_precision_reaches_the_network_and_nothing_else():
    SEEN.clear()
    t = trainer(PICTURES, precision="bf16", steps=2)
    t.method = Watched(T=20)
    t.net.enter.register_forward_hook(lambda module, args, out: SEEN.append(("net", out.dtype, True)))
    list(t)
    assert [("net", torch.bfloat16, True), ("loss", torch.float32, False)] * 2 == SEEN
    assert all(p.dtype == torch.float32 for p in t.net.parameters())


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(tmp_path):
    t = trainer(load("two_modes"))
    next(t.steps())
    t.save(tmp_path / "run")
    nn.init.constant_(t.net.layers[-1].bias, float("nan"))
    with pytest.raises(FloatingPointError, match="not finite at step 4: use a smaller --lr"):
        list(t)
    with pytest.raises(FloatingPointError):
        t.save(tmp_path / "run")
    assert minigen.load(tmp_path / "run").step == 1


# Checkpoints


@pytest.fixture
def saved(tmp_path):
    t = trainer(load("two_modes"), steps=3)
    list(t)
    t.save(tmp_path / checkpoint.NAME)
    return t, tmp_path / checkpoint.NAME


def test_a_run_is_rebuilt_from_its_file_alone(saved):
    t, file = saved
    for where in (file, file.parent, str(file)):
        run = minigen.load(where)
        assert (run.method, run.shape, run.data, run.bins, run.step) == (t.method, (2,), "two_modes", 0, 3)
        assert run.net.config == t.net.config and not run.net.training
        assert_same(run.net.state_dict(), t.ema.net.state_dict())
    assert [p.name for p in file.parent.iterdir()] == [checkpoint.NAME]


def test_configurations_survive_json(saved):
    t, file = saved
    _, info = checkpoint.read(file, with_tensors=False)
    info = json.loads(json.dumps(info))
    assert checkpoint.construct(TrainConfig, info["train"], file) == t.config
    assert checkpoint.construct(nets.NetConfig, info["net"], file) == t.net.config
    assert checkpoint.construct_method(info, METHODS, file) == t.method


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of Unix")
def test_a_checkpoint_may_be_read_by_whom_the_umask_allows(saved, tmp_path):
    _, file = saved
    tensors, info = checkpoint.read(file)
    for umask in (0o022, 0o077):
        before = os.umask(umask)
        try:
            checkpoint.write(tmp_path / "shared.safetensors", tensors, info)
        finally:
            os.umask(before)
        assert (tmp_path / "shared.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("keep", [0, 4, 100, 3000, -1])
def test_a_file_cut_short_is_refused_in_one_line(saved, keep):
    _, file = saved
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(checkpoint.CheckpointError, match="damaged or not a checkpoint") as e:
        minigen.load(file)
    assert "\n" not in str(e.value)


def rewrite(file, **changes):
    tensors, info = checkpoint.read(file)
    info = {k: v for k, v in (info | changes).items() if v != "absent"}
    save_file(tensors, file, {"minigen": json.dumps(info)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.write_bytes(b"PK\x03\x04 a zip, maybe a pickle" * 100), "damaged or not a checkpoint"),
        (lambda f: save_file({"w": torch.zeros(2)}, f), "not written by minigen"),
        (lambda f: save_file({"w": torch.zeros(2)}, f, {"minigen": "{"}), "damaged or not a checkpoint"),
        (lambda f: save_file({"w": torch.zeros(2)}, f, {"minigen": '{"format": 1}'}), "lacks .*step"),
        (lambda f: rewrite(f, format=99), "format 99, this minigen reads 1"),
        (lambda f: rewrite(f, method="gan"), "trained with gan, this minigen has dpm, ncsn, ddpm"),
        (lambda f: rewrite(f, method_fields={"T": 20, "gamma": 1}), "does not fit this version of DDPM"),
        (lambda f: rewrite(f, method_fields={"T": 0}), "does not fit this version of DDPM"),
        (lambda f: rewrite(f, net={"shape": [2], "out": 3, "mults": [], "blocks": 4}), "do not fit the network"),
        (lambda f: f.unlink(), "is not a run: there is no"),
        (lambda f: (f.unlink(), f.mkdir()), "is not a run"),
    ],
)
def test_foreign_and_older_files_are_refused_in_one_line(saved, change, message):
    _, file = saved
    change(file)
    with pytest.raises(checkpoint.CheckpointError, match=message) as e:
        minigen.load(file)
    assert "\n" not in str(e.value)


def test_a_crash_while_saving_leaves_the_old_file(saved, monkeypatch):
    t, file = saved
    before = file.read_bytes()
    monkeypatch.setattr("os.fsync", lambda f: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        t.save(file)
    assert file.read_bytes() == before and minigen.load(file).step == 3


def test_continuing_with_other_data_is_refused(saved):
    _, file = saved
    with pytest.raises(checkpoint.CheckpointError, match="trained on 50000 samples, the data now has 100"):
        trainer(Dataset("two_modes", torch.randn(100, 2))).load(file)


def test_devices():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="unknown device"):
        pick_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_absent_is_said():
    with pytest.raises(ValueError, match="no CUDA device here: use --device cpu"):
        pick_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu(tmp_path):
    t = trainer(PICTURES, device="cuda", precision="bf16")
    assert list(t)[-1].step == 12
    t.save(tmp_path / "run")
    again = trainer(PICTURES)
    again.load(tmp_path / "run")
    assert again.step == 12
    mine, other = again.net.state_dict(), t.net.state_dict()
    assert not [k for k in mine if not torch.equal(mine[k], other[k].cpu())]
