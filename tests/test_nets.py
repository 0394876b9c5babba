"""The networks: the paper's size, any small size, and the contract net(x, u)."""

from __future__ import annotations

import pytest
import torch

from minigen.nets import NetConfig, build, clock_embedding, preset


def count(net) -> int:
    return sum(p.numel() for p in net.parameters())


def test_unet_of_the_paper_has_its_number_of_parameters():
    config = preset((3, 32, 32), 3)
    assert config == NetConfig((3, 32, 32), 3, 128, (1, 2, 2, 2), 2, (16,), 0.1)
    assert count(build(config)) == 35_746_307


@pytest.mark.parametrize(
    ("shape", "width"), [((1, 8, 8), 32), ((1, 16, 16), 8), ((3, 32, 32), 12), ((3, 64, 64), 4), ((2,), 16)]
)
def test_any_size_keeps_the_contract(shape, width):
    net = build(preset(shape, shape[0], width)).eval()
    x, u = torch.randn(3, *shape), torch.rand(3)
    out = net(x, u)
    assert out.shape == x.shape
    with torch.no_grad():  # no sample sees another one
        assert torch.allclose(net(x[:1], u[:1]), net(x, u)[:1], atol=1e-5)
    if len(shape) == 1:
        assert out.abs().max() == 0  # the MLP starts from zero


def test_gradients_reach_every_parameter():
    net = build(preset((1, 8, 8), 1, 8))
    net(torch.randn(2, 1, 8, 8), torch.rand(2)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_clock_embedding_is_the_papers():
    e = clock_embedding(torch.tensor([0.5]), 128)
    t = 500.0
    freqs = 10000.0 ** (-torch.arange(64) / 63)
    assert torch.allclose(e[0, :64], (t * freqs).sin(), atol=1e-4)
    assert torch.allclose(e[0, 64:], (t * freqs).cos(), atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "width", "word"), [((3, 32, 32), 0, "width"), ((3, 32, 16), 8, "square"), ((3, 36, 36), 8, "halved")]
)
def test_bad_shapes_say_what_to_do(shape, width, word):
    with pytest.raises(ValueError, match=word):
        preset(shape, 3, width)
