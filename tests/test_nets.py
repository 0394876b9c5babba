"""The networks: the paper's size, any small size, and the contract net(x, u)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minigen import nets
from minigen.layers import Dropout, conv_of_doubled, norm
from minigen.nets import Attention, NetConfig, Upsample, build, clock_embedding, preset


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


@pytest.mark.parametrize(("side", "width"), [(32, 128), (32, 64), (32, 32), (32, 12), (32, 4), (16, 64), (16, 8)])
def test_no_group_is_so_small_that_it_loses_the_color(side, width):
    config = preset((3, side, side), 3, width)
    groups = [m for m in build(config).modules() if isinstance(m, nn.GroupNorm)]
    assert groups and all(m.num_channels >= 4 * m.num_groups for m in groups)


@pytest.mark.parametrize("groups", [8, 32])
def test_a_group_of_one_channel_hides_the_color_and_the_clock(groups):
    net = build(preset((3, 32, 32), 3, 32, groups=groups)).eval()
    means = []
    net.leave[0].register_forward_hook(lambda module, inputs, out: means.append(out.mean((2, 3))))
    with torch.no_grad():
        nn.init.xavier_uniform_(net.down[0].last.weight)  # it starts near 0
        for color in (0.0, 0.5):
            net(torch.randn(2, 3, 32, 32) + color, torch.zeros(2))
        x, (one, other) = torch.randn(1, 32, 32, 32), torch.randn(2, 1, 128)
        seen = (net.down[0](x, one) - net.down[0](x, other)).abs().max()  # the embedding of two times
    difference = (means[1] - means[0]).abs().max()
    assert difference > 0.1 if groups == 8 else difference < 1e-5
    assert seen > 1e-3 if groups == 8 else seen < 1e-6


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


def test_dropout_on_the_cpu_keeps_the_mean_and_follows_the_seed():
    net, x = Dropout(0.1).train(), torch.ones(20, 7, 30, 30).contiguous(memory_format=torch.channels_last)
    draws = []
    for _ in range(2):
        torch.manual_seed(1)
        draws.append(net(x))
    n, p = x.numel(), 26 / 256  # 0.1 rounded to 1/256
    dropped = float((draws[0] == 0).double().mean())
    assert abs(dropped - p) < 4 * (p * (1 - p) / n) ** 0.5
    assert draws[0].unique().tolist() == [0.0, pytest.approx(1 / (1 - p))]
    assert torch.equal(*draws) and not torch.equal(net(x), draws[0])
    assert torch.equal(net.eval()(x), x)
    assert torch.equal(Dropout(0.0).train()(x), x)


@pytest.mark.parametrize("channels", [32, 96, 512])  # 1, 3, 16 in a group: the last takes the usual way
def test_group_norm_in_bfloat16_is_group_norm(channels):
    torch.manual_seed(0)
    layer = norm(channels)
    layer.weight.data.uniform_(0.5, 1.5)
    layer.bias.data.normal_()
    x = torch.randn(3, channels, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    v = torch.randn(3, channels, 4, 4).contiguous(memory_format=torch.channels_last)
    exact = torch.nn.functional.group_norm(x.float(), 32, layer.weight, layer.bias, 1e-6)
    ours = layer(x)
    assert ours.dtype == torch.bfloat16 and ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(ours.float(), exact, rtol=2**-7, atol=2**-7)
    variables = [x, layer.weight, layer.bias]
    for a, b in zip(
        torch.autograd.grad(ours, variables, v.bfloat16()), torch.autograd.grad(exact, variables, v), strict=True
    ):
        assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()


def test_attention_is_the_same_with_and_without_gradients():
    torch.manual_seed(0)
    layer = Attention(32)
    x = torch.randn(2, 32, 8, 8)
    with torch.no_grad():
        fused = layer(x)
    assert torch.allclose(layer(x), fused, atol=1e-5)


@pytest.mark.parametrize(("h", "w"), [(8, 8), (3, 5), (1, 1)])
def test_doubling_and_convolution_in_one_is_the_same_with_its_gradients(h, w):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, 3, padding=1).double()
    x, v = torch.randn(2, 6, h, w).double().requires_grad_(), torch.randn(2, 4, 2 * h, 2 * w).double()
    both = [conv(nn.functional.interpolate(x, scale_factor=2.0)), conv_of_doubled(x, conv)]
    variables = [x, *conv.parameters()]
    for a, b in zip(*[[y, *torch.autograd.grad(y, variables, v)] for y in both], strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("b", "side", "in_one"), [(1, 8, False), (8, 8, True), (32, 4, True), (7, 8, False)])
def test_upsampling_in_mixed_precision_doubles_and_convolves(b, side, in_one, monkeypatch):
    torch.manual_seed(0)
    calls = []
    monkeypatch.setattr(nets, "conv_of_doubled", lambda *a: calls.append(1) or conv_of_doubled(*a))
    layer = Upsample(16).to(memory_format=torch.channels_last)
    x = torch.randn(b, 16, side, side).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x, torch.zeros(b, 1))
        usual = layer.conv(nn.functional.interpolate(x, scale_factor=2.0))
    exact = layer.conv(nn.functional.interpolate(x.float(), scale_factor=2.0))
    assert bool(calls) == in_one
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    assert (y.float() - exact).norm() < 1.1 * (usual.float() - exact).norm()
