"""Layers of the U-Net that compute what PyTorch's do, around slow cases of the CPU."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def norm(c: int, groups: int = 32) -> nn.GroupNorm:
    """Group normalization with so many groups, or as many of them as divide ``c``.

    A group of one channel loses the mean of that channel, and with all of them the color of the picture.
    """
    return GroupNorm(gcd(groups, c), c, eps=1e-6)


class GroupNorm(nn.GroupNorm):
    """PyTorch's, around a slow case: few channels in a group, bfloat16, channels_last, on the CPU (half of a step)."""

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``b c h w``."""
        slow = x.is_cpu and x.dtype == torch.bfloat16 and self.num_channels < 16 * self.num_groups
        if slow and (x.requires_grad or x[0, 0].numel() < 1024):  # forward alone is fast for large images
            return NormOfPlanes.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x)


class NormOfPlanes(torch.autograd.Function):
    """Group normalization, forward and backward, over copies with the pixels of a channel side by side in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        """The arguments of ``torch.nn.functional.group_norm``."""
        b, c, h, w = x.shape
        planes, ctx.sizes = x.contiguous(), (b, c, h * w, groups)
        y, mean, rstd = torch.native_group_norm(planes, weight, bias, *ctx.sizes, eps)
        ctx.save_for_backward(planes, mean, rstd, weight)
        return y.contiguous(memory_format=torch.channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias."""
        grads = torch.ops.aten.native_group_norm_backward
        dx, dw, db = grads(dy.contiguous(), *ctx.saved_tensors, *ctx.sizes, [True, True, True])
        return dx.contiguous(memory_format=torch.channels_last), dw, db, None, None


class Dropout(nn.Dropout):
    """PyTorch's; on the CPU eight masks from one 64-bit random number, six times faster, ``p`` rounded to 1/256."""

    def forward(self, x: Tensor) -> Tensor:
        """``x``: any shape, dense in memory."""
        cut = round(256 * self.p)
        if not (self.training and x.is_cpu and 0 < cut < 256):
            return super().forward(x)
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        keep = words.view(torch.uint8)[: x.numel()].to(x.dtype).ge_(cut).mul_(256 / (256 - cut))
        return x * keep.as_strided(x.shape, x.stride())


_AXIS = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
DOUBLED = torch.kron(_AXIS, _AXIS).T.contiguous()
"""From the three by three weights of a kernel to the four by four that a pixel meets once it is doubled, ``9 16``."""


def conv_of_doubled(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """``conv``, 3x3 with a border of 1, of ``x`` doubled by nearest neighbor, in 4 of 9 products; ``b c 2h 2w``.

    A window of the doubled picture sees two by two pixels of ``x``. Adding the weights that meet the same pixel first
    leaves a transposed convolution of stride 2 with four by four weights, along each axis (w2, w1 + w2, w0 + w1, w0).
    """
    with torch.autocast(x.device.type, enabled=False):
        weight = conv.weight.transpose(0, 1).flatten(2) @ DOUBLED.to(conv.weight)
    return F.conv_transpose2d(x, weight.unflatten(2, (4, 4)), conv.bias, stride=2, padding=1)


class Attention(nn.Module):
    """Self-attention over the pixels, one head; q, k, v and the projection are 1x1 convolutions."""

    def __init__(self, c: int, groups: int = 32) -> None:
        super().__init__()
        self.norm = norm(c, groups)
        self.qkv = nn.ModuleList([nn.Conv2d(c, c, 1) for _ in range(3)])
        self.project = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``b c h w``."""
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2).contiguous() for f in self.qkv)  # b hw c
        if q.is_cpu and q.requires_grad:  # two to three times faster backward than the fused kernel of the CPU
            out = (q * q.shape[2] ** -0.5 @ k.transpose(1, 2)).softmax(2) @ v
        else:
            out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        h = self.project(out.transpose(1, 2).reshape(x.shape))
        h += x
        return h
