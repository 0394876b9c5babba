"""Networks ``net(x, u)``: an MLP for points and the U-Net of DDPM for images.

The U-Net is the one of Ho, Jain, Abbeel 2020 (appendix B): four resolutions, two residual blocks each, self-attention
at 16x16, group normalization, a sinusoidal embedding of the clock added in every block. With 128 channels and 3x32x32
images it has 35,746,307 parameters. The same class makes small networks for 8x8 and 16x16 images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import log, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Attention, Dropout, conv_of_doubled, norm

TIME_SCALE = 1000.0
"""The clock u in [0, 1] is multiplied by this before the embedding, so that DDPM's embedding sees its t."""


@dataclass(frozen=True)
class NetConfig:
    """Everything needed to build a network; stored in checkpoints as JSON.

    Attributes:
        shape: of one sample: ``(d,)`` for points, ``(c, h, w)`` for images.
        out: channels of the output (``method.out_channels(c)``).
        width: hidden units of the MLP, or channels at the finest resolution of the U-Net.
        mults: channel multipliers, one per resolution (U-Net).
        blocks: residual blocks per resolution (U-Net), or hidden layers (MLP).
        attention: resolutions at which the U-Net attends.
        dropout: probability in each residual block.
        groups: groups of channels that are normalized together (U-Net).
    """

    shape: tuple[int, ...]
    out: int
    width: int = 128
    mults: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (16,)
    dropout: float = 0.1
    groups: int = 32


def preset(
    shape: tuple[int, ...],
    out: int,
    width: int | None = None,
    dropout: float | None = None,
    groups: int | None = None,
) -> NetConfig:
    """A network that fits data of the given shape: the paper's for 32x32 images, smaller ones below, an MLP for points.

    A narrower one for images has fewer groups, of four channels at the finest resolution like the paper's: groups of
    one channel would hide the mean color from it. On 8x8 digits that makes no difference.

    Raises:
        ValueError: if the width is not positive (for images: even and at least 4), or the shape is neither
            ``(d,)`` nor a square ``(c, h, w)``.
    """
    if width is not None and width < 1:
        raise ValueError(f"the width must be at least 1, got {width}: try 32, or leave it out for the default")
    if groups is not None and groups < 1:
        raise ValueError(f"--groups must be at least 1, got {groups}: leave it out for the default")
    if len(shape) == 1:
        return NetConfig(shape, out, width or 128, mults=(), blocks=4, attention=(), dropout=dropout or 0.0)
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(f"no network for data of shape {shape}: give points (d,) or square images (c, h, h)")
    if width is not None and (width < 4 or width % 2):
        raise ValueError(f"the width for images must be even and at least 4, got {width}: try 32")
    side = shape[1]
    if side <= 8:
        default = NetConfig(shape, out, width or 32, (1, 2), 1, (4,), 0.0)
    elif side <= 16:
        default = NetConfig(shape, out, width or 64, (1, 2, 2), 2, (8,), 0.1, _groups(width or 64))
    else:
        default = NetConfig(shape, out, width or 128, (1, 2, 2, 2), 2, (16,), 0.1, _groups(width or 128))
    if side % 2 ** (len(default.mults) - 1):
        raise ValueError(f"images of {side}x{side} cannot be halved {len(default.mults) - 1} times: resize them first")
    changes = {"dropout": dropout, "groups": groups}
    return replace(default, **{k: v for k, v in changes.items() if v is not None})


def _groups(width: int) -> int:
    return min(32, max(1, width // 4))


def build(config: NetConfig) -> nn.Module:
    """The network described by ``config``: an ``MLP`` for points, a ``UNet`` for images."""
    return MLP(config) if len(config.shape) == 1 else UNet(config)


def clock_embedding(u: Tensor, dim: int) -> Tensor:
    """Sines and cosines of ``1000 u`` at ``dim / 2`` frequencies from 1 to 1e-4, shape ``b dim`` (as DDPM's code)."""
    half = dim // 2
    freqs = torch.exp(-log(10000.0) / (half - 1) * torch.arange(half, device=u.device, dtype=torch.float32))
    angles = TIME_SCALE * u.float()[:, None] * freqs
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class MLP(nn.Module):
    """Hidden SiLU layers over the point and its clock embedding; He initialization, last layer zero.

    The zero start makes the first prediction 0; PyTorch's default initialization can leave such a network at the
    Gaussian solution on multi-modal data.
    """

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        d, self.embedding = prod(config.shape), 64
        sizes = [d + self.embedding] + [config.width] * config.blocks
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layer = nn.Linear(a, b)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.SiLU()]
        last = nn.Linear(sizes[-1], config.out)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """``x``: ``b d``, ``u``: ``b`` in [0, 1]; returns ``b out``."""
        return self.layers(torch.cat([x, clock_embedding(u, self.embedding).to(x.dtype)], dim=1))


class UNet(nn.Module):
    """The U-Net of DDPM: residual blocks down, a middle with attention, residual blocks up with skip connections."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        c, side, _ = config.shape
        ch, emb, rest = config.width, 4 * config.width, (config.dropout, config.groups)
        self.clock = nn.Sequential(nn.Linear(ch, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.enter = nn.Conv2d(c, ch, 3, padding=1)
        widths = [ch * m for m in config.mults]
        skips = [ch]
        self.down = nn.ModuleList()
        for i, w in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(Stage(ch, w, emb, side in config.attention, *rest))
                ch = w
                skips.append(ch)
            if i < len(widths) - 1:
                self.down.append(Downsample(ch))
                side //= 2
                skips.append(ch)
        self.middle = nn.ModuleList([Stage(ch, ch, emb, attend, *rest) for attend in (True, False)])
        self.up = nn.ModuleList()
        for i, w in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(Stage(ch + skips.pop(), w, emb, side in config.attention, *rest))
                ch = w
            if i > 0:
                self.up.append(Upsample(ch))
                side *= 2
        self.leave = nn.Sequential(norm(ch, config.groups), nn.SiLU(), nn.Conv2d(ch, config.out, 3, padding=1))
        self.apply(_xavier)
        for name, module in self.named_modules():
            if name.endswith(("last", "project")) or module is self.leave[2]:
                nn.init.xavier_uniform_(module.weight, gain=1e-5)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """``x``: ``b c h w``, ``u``: ``b`` in [0, 1]; returns ``b out h w``."""
        emb = self.clock(clock_embedding(u, self.config.width).to(x.dtype))
        h = self.enter(x)
        skips = [h]
        for block in self.down:
            h = block(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for block in self.up:
            h = block(h, emb) if isinstance(block, Upsample) else block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.leave(h)


class Stage(nn.Module):
    """A residual block, and attention after it where asked: ``b a h w`` to ``b c h w``."""

    def __init__(self, a: int, c: int, emb: int, attend: bool, dropout: float, groups: int) -> None:
        super().__init__()
        self.first = nn.Sequential(norm(a, groups), nn.SiLU(), nn.Conv2d(a, c, 3, padding=1))
        self.clock = nn.Sequential(nn.SiLU(), nn.Linear(emb, c))
        self.second = nn.Sequential(norm(c, groups), nn.SiLU(), Dropout(dropout))
        self.last = nn.Conv2d(c, c, 3, padding=1)
        self.skip = nn.Conv2d(a, c, 1) if a != c else nn.Identity()
        self.attention = Attention(c, groups) if attend else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """``x``: ``b a h w``, ``emb``: ``b e``."""
        h = self.first(x)
        h += self.clock(emb)[:, :, None, None]  # in place: the backward of a convolution does not need its output
        h = self.last(self.second(h))
        h += self.skip(x)
        return self.attention(h)


class Downsample(nn.Module):
    """Halve the resolution: 3x3 convolution of stride 2, padded right and below like TensorFlow's SAME."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # noqa: ARG002
        """``x``: ``b c h w``; returns ``b c h/2 w/2``."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: nearest neighbor, then a 3x3 convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # noqa: ARG002
        """``x``: ``b c h w``; returns ``b c 2h 2w``."""
        if x.is_cpu and x.numel() // x.shape[1] >= 512:  # for fewer pixels, adding the weights costs more than it saves
            return conv_of_doubled(x, self.conv)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
