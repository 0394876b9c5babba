"""Everything that can run on a GPU runs on a device that is not the CPU, and gives what the CPU gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from elsewhere import Elsewhere, elsewhere

from minigen import classifier, commands, measure, nets, processes, seeded
from minigen.__main__ import main
from minigen.data import Dataset, load
from minigen.generate import draw
from minigen.methods import METHODS
from minigen.recipe import preset
from minigen.train import Trainer

SMALL = {"dpm": {"T": 20}, "ncsn": {"T": 2, "L": 4}, "ddpm": {"T": 20}, "pfgm": {"large_batch": 16, "small_batch": 8}}
SMALL["pfgmpp"] = {}
RANDOM = torch.Generator().manual_seed(0)
PICTURES = Dataset("pictures", torch.randint(0, 256, (30, 3, 8, 8), generator=RANDOM).byte(), 256, True)
pytestmark = pytest.mark.filterwarnings("ignore:for .* copying from a non-meta")  # here it copies all the same
DATA = pytest.mark.parametrize("data", [load("two_modes"), PICTURES], ids=["points", "pictures"])


@pytest.fixture
def there(monkeypatch):
    """Inside, the device of ``--device cuda`` is the pretended one."""
    for module in (commands, measure, processes):
        monkeypatch.setattr(module, "pick_device", lambda name: torch.device("cpu" if name == "cpu" else "meta"))
    with elsewhere():
        yield "meta"


def trainer(name, data, device):
    """Without dropout: its masks are drawn in another order elsewhere."""
    method = METHODS[name](**SMALL[name])
    with seeded(0):
        net = nets.build(nets.preset(data.shape, method.out_channels(data.shape[0]), 8, dropout=0.0))
    return Trainer(method, net, data, replace(preset(data), steps=4, batch=16, warmup=2, log_every=1), device)


REFUSED = {
    "a sum": lambda x: x + torch.ones(4),
    "a product": lambda x: torch.nn.Linear(4, 2)(x),
    "a stack": lambda x: torch.stack([x[0, 0], torch.tensor(1.0)]),
    "a lookup": lambda x: torch.ones(4)[torch.zeros(2, dtype=torch.long, device=x.device)],
    "a table left behind": lambda x: torch.gather(torch.ones(3, 4), 1, torch.zeros_like(x).long()),
    "a generator": lambda x: torch.rand(3, device=x.device, generator=torch.Generator()),
    "an array": lambda x: x.numpy(),
    "an array in passing": lambda x: np.asarray(x),
}


@pytest.mark.parametrize("mixed", REFUSED.values(), ids=REFUSED)
def test_the_other_device_refuses_what_cuda_refuses(there, mixed):
    with pytest.raises((RuntimeError, TypeError)):
        mixed(torch.ones(3, 4, device=there))


def test_the_other_device_does_what_cuda_does(there):
    x = torch.ones(3, 4, device=there)
    assert isinstance(x, Elsewhere) and x.device.type == there
    assert type(x.cpu()) is torch.Tensor and x.cpu().device.type == "cpu"
    assert (2 * x + torch.tensor(1.0)).tolist() == [[3.0] * 4] * 3  # a single number may come from the CPU
    assert x[torch.tensor([0, 1])].shape == (2, 4) and float(x.sum()) == 12  # and so may indices
    x[1] = 5
    assert x[1].cpu().tolist() == [5.0] * 4
    x.requires_grad_()
    (x**2).sum().backward()
    assert isinstance(x.grad, Elsewhere) and torch.equal(x.grad.cpu(), 2 * x.detach().cpu())


@DATA
@pytest.mark.parametrize("name", METHODS)
def test_training_there_is_training_here(there, tmp_path, name, data):
    mine, other = trainer(name, data, "cpu"), trainer(name, data, there)
    here, away = [r.loss for r in mine], [r.loss for r in other]
    assert away == pytest.approx(here, rel=1e-5)
    assert all(isinstance(p, Elsewhere) for p in other.net.parameters())
    other.save(tmp_path / "run")
    for device in ("cpu", there):  # a run goes on wherever it is wanted
        again = trainer(name, data, device)
        again.load(tmp_path / "run")
        assert {p.device.type for p in again.net.parameters()} == {device} and again.step == 4
        for a, b in zip(again.ema.net.parameters(), other.ema.net.parameters(), strict=True):
            assert torch.equal(a.detach().cpu(), b.detach().cpu())


@DATA
@pytest.mark.parametrize("name", METHODS)
def test_sampling_there_is_sampling_here(there, name, data):
    mine, other = trainer(name, data, "cpu"), trainer(name, data, there)
    for sampler in ("ddim", "heun", "rk45", "paper"):
        choice = {"sampler": sampler, "steps": 4, "seed": 1}
        away, calls = draw(other.method, other.net, (2, *data.shape), device=there, **choice)
        assert type(away) is torch.Tensor and away.shape == (2, *data.shape) and bool(away.isfinite().all())
        if sampler != "rk45" and (name, sampler) != ("pfgm", "paper"):  # a last digit changes the steps of these two
            here, calls_here = draw(mine.method, mine.net, (2, *data.shape), **choice)
            assert calls_here == calls
            torch.testing.assert_close(away, here, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["dpm", "pfgmpp"])  # bits by the bound, bits by the flow
def test_the_commands_run_there(there, tmp_path, capsys, name):
    run, fields = tmp_path / "run", {k: v for k, v in SMALL[name].items() if k != "large_batch"}
    options = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in fields.items())
    for words in (
        f"train {name} --data digits --steps 2 --batch 16 --width 8 --snapshots 2 --offline --out {run} {options}",
        f"train {name} --steps 3 --resume --offline --out {run}",
        f"sample {run} --n 4 --steps 4 --out {run}.png",
        f"evaluate {run} --n 20 --steps 3 --bits 3 --tol 0.1 --offline",
    ):
        assert main([*words.split(), "--device", "cuda"]) == 0, capsys.readouterr().err
    assert (run / "evaluate.json").exists()


def test_a_classifier_learns_there_as_here(there):
    data = load("digits")
    config, recipe = classifier.preset(data)
    recipe, losses = replace(recipe, epochs=1), {}
    for device in ("cpu", there):
        for net, said in classifier.fit(data, config, recipe, device):
            losses[device] = said["loss"]
            assert 0 <= classifier.accuracy(net, data) <= 1
    assert losses[there] == pytest.approx(losses["cpu"], rel=1e-3)
