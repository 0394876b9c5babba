"""What a chapter writes from scratch is what the package does: only the cells tagged `scratch` are run here."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from minigen import DDPM, DPM, NCSN, PFGM, nets, sample, samplers, seeded
from minigen.data import Batches, load
from minigen.evaluate import frechet_distance
from minigen.ink import Ink, mix, unmix
from minigen.laws import Mixture
from minigen.recipe import TrainConfig
from minigen.train import Trainer

jupytext = pytest.importorskip("jupytext")
CHAPTERS = Path(__file__).parent.parent / "chapters"


def scratch(chapter: str) -> tuple[dict, str]:
    """The names that the tagged cells define, and their source."""
    cells = jupytext.read(CHAPTERS / f"{chapter}.md").cells
    source = "\n".join(c.source for c in cells if "scratch" in c.metadata.get("tags", []))
    space: dict = {}
    exec(source, space)
    return space, source


def assert_same(space: dict, net, method, as_package, x, rtol: float, atol: float) -> None:
    """One loss and one set of samples, from one seed each: the chapter's own and the package's."""
    with seeded(1):
        ours = space["loss"](net, x)
    with seeded(1):
        theirs = method.loss(as_package, x).mean()
    assert torch.allclose(ours, theirs, rtol=rtol)
    with seeded(2):
        ours = space["generate"](net, len(x))
    with seeded(2):
        theirs = sample(method, as_package, x.shape)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=atol)  # an untrained network drives some of them to thousands


@pytest.mark.parametrize("chapter", sorted(p.stem for p in CHAPTERS.glob("*.md")))
def test_scratch_is_short(chapter):
    _, source = scratch(chapter)
    lines = [x for x in source.splitlines() if x.strip() and not x.strip().startswith(("#", '"""'))]
    assert 0 < len(lines) <= 40


def test_ddpm_from_scratch_equals_the_package():
    space, _ = scratch("05_ddpm")
    torch.manual_seed(0)
    net = space["EpsNet"]()
    x_0 = torch.randn(64, 2)

    def as_package(x, u):
        return net(x, u * 1000)

    assert_same(space, net, DDPM(), as_package, x_0, rtol=1e-5, atol=2e-3)


def test_ink_from_scratch_equals_the_package():
    space, source = scratch("02_ink")
    assert len([x for x in source.splitlines() if x.strip()]) <= 25, "twenty-five lines suffice"
    betas, centers, width = space["beta"], torch.randn(30, 2, dtype=torch.float64), 0.1
    cloud = torch.randn(50, 2, dtype=torch.float64)
    with seeded(1):
        ours = space["dissolve"](cloud)
    with seeded(1):
        *_, theirs = mix(cloud, betas)
    assert torch.allclose(ours, theirs, atol=1e-9)
    with seeded(2):
        ours = space["gather"](cloud, centers, width)
    with seeded(2):
        *_, theirs = unmix(Ink(Mixture.of(centers, width)).score, cloud, betas)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_ncsn_from_scratch_equals_the_package():
    space, _ = scratch("04_ncsn")
    method = NCSN(sigma_1=20.0, sigma_L=0.1, L=20, T=60, eps=2e-3, denoise=True, box=8.0, sigma_data=26**0.5)
    assert torch.allclose(space["sigmas"].double(), method.ladder, rtol=1e-6)
    torch.manual_seed(0)
    net = space["ScoreNet"]()
    x = 5 * torch.randn(64, 2)

    def as_package(y, u):
        i = (19 * (1 - u)).round().long()
        sigma = space["sigmas"][i, None]
        return sigma * net(y * (sigma**2 + 26).sqrt(), i)

    assert_same(space, net, method, as_package, x, rtol=1e-4, atol=5e-3)


def test_dpm_from_scratch_equals_the_package():
    space, _ = scratch("03_dpm")
    method = DPM(T=40, beta_1=0.01, schedule="geometric", alpha_bar_T=0.003)
    assert torch.allclose(space["beta"].double(), method.chain.beta, atol=1e-6)
    torch.manual_seed(0)
    net, x = space["Bumpy"](torch.randn(16, 2)), torch.randn(64, 2)
    torch.nn.init.normal_(net.weight, std=0.1)

    def as_package(y, u):
        return torch.cat(net(y, (u * 40).round().long()), dim=1)

    assert_same(space, net, method, as_package, x, rtol=1e-3, atol=1e-3)


def test_recipe_from_scratch_equals_the_trainer():
    space, source = scratch("09_cifar10")
    assert "minigen" not in source
    points, method = load("two_modes"), DDPM()
    net = nets.build(nets.preset((2,), 2, 16))
    config = TrainConfig(40, None, 32, lr=3e-3, warmup=8, decay="cosine", ema=0.8, seed=3)
    trainer = Trainer(method, deepcopy(net), points, config, "cpu")
    assert len(list(trainer)) == 2
    with seeded(3):
        batches = Batches(points.x, 32, seed=3)
        ours = space["train"](lambda f, x: method.loss(f, x).mean(), net, batches, 40, 3e-3, 8, 0.8)
    for mean, theirs in zip(ours.parameters(), trainer.ema.net.parameters(), strict=True):
        assert torch.allclose(mean, theirs, atol=1e-5)
    a, b = torch.randn(80, 5) @ torch.randn(5, 5), torch.randn(60, 5) + 1
    assert space["frechet"](a, b) == pytest.approx(frechet_distance(a, b), rel=1e-8)


def test_pfgm_from_scratch_equals_the_package():
    space, source = scratch("07_pfgm")
    net = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.SiLU(), torch.nn.Linear(32, 3))
    y = torch.randn(300, 2)

    def joined(out):
        return lambda x, u: net(torch.cat([x, u[:, None]], 1))[:, :out]

    method, paper = PFGM.for_data((2,)), PFGM(gamma=0.13, small_batch=50)
    with seeded(1):
        ours = space["loss"](joined(2), y)
    with seeded(1):
        assert torch.allclose(ours, method.loss(joined(2), y).mean(), rtol=1e-4)
    with seeded(2):
        ours = space["field_loss"](lambda x, z: paper.predict(joined(3), x, z), y, 50, 0.13)
    with seeded(2):
        assert torch.allclose(ours, paper.loss(joined(3), y).mean(), rtol=1e-4)
    with seeded(3):
        ours = space["generate"](joined(2), 64)
    with seeded(3), torch.no_grad():
        x = method.prior((64, 2))
        *_, x = samplers.euler(samplers.probability_flow(method.denoiser(joined(2))), x, method.sigmas(20))
    assert torch.allclose(ours, x, atol=1e-3)
    assert "minigen" not in source
