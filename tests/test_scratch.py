"""What a chapter writes from scratch is what the package does: only the cells tagged `scratch` are run here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minigen import DDPM, PFGM, sample, samplers, seeded

jupytext = pytest.importorskip("jupytext")
CHAPTERS = Path(__file__).parent.parent / "chapters"


def scratch(chapter: str) -> tuple[dict, str]:
    """The names that the tagged cells define, and their source."""
    cells = jupytext.read(CHAPTERS / f"{chapter}.md").cells
    source = "\n".join(c.source for c in cells if "scratch" in c.metadata.get("tags", []))
    space: dict = {}
    exec(source, space)
    return space, source


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

    with seeded(1):
        ours = space["loss"](net, x_0)
    with seeded(1):
        theirs = DDPM().loss(as_package, x_0).mean()
    assert torch.allclose(ours, theirs, rtol=1e-5)
    with seeded(2):
        ours = space["generate"](net, 64)
    with seeded(2):
        theirs = sample(DDPM(), as_package, (64, 2))
    assert torch.allclose(ours, theirs, atol=2e-3)


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
