"""Group normalisation, and the SiLU after it, of feature maps in channels-last order.

    xhat = (x - mean) rstd,   z = w xhat + b,   y = z s with s = 1 / (1 + exp(-z)), or y = z

mean and rstd = 1 / sqrt(variance + eps) are those of a group: C / G channels of a sample at all its places. Backward, to x alone:

    dz = dy s (1 + z (1 - s)) or dy,   g = w dz,   dx = rstd (g - mean(g) - xhat mean(g xhat))

PyTorch's own kernel reads NCHW alone: between two channels-last convolutions it copies the map to NCHW, and the convolution after
it copies it back. SiLU then reads, writes and keeps another one. Here only x and two numbers a group are kept.

`norm_groups.py` has a program for each group, which fits the maps of a UNet; `norm_tiles.py` cuts larger maps, as a VAE has, into
tiles. All sums have a fixed order, so a sample's numbers do not depend on its batch. Variances are sums of squared distances to a
mean: large means lose no digits. Bytes per element in half precision, if a group stays in the cache: forward 2 read and 2 written,
backward 4 read and 2 written; in tiles 4 and 2, and 8 and 2. Arithmetic and sums are float32 for all dtypes.
"""

from typing import Any

import torch
from torch import Tensor

from dag_kernels import norm_groups, norm_tiles
from dag_kernels.reference import GroupNormed


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, has_silu: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        statistics = torch.empty((len(x), groups, 2), dtype=torch.float32, device=x.device)
        y = torch.empty_like(x, memory_format=torch.channels_last)
        _module(x, groups).forward(x, weight, bias, statistics, y, eps, has_silu)
        ctx.has_silu = has_silu
        ctx.save_for_backward(x, weight, bias, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        dy = upstream[0].contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        _module(x, statistics.shape[1]).backward((x, weight, bias, statistics, dy), dx, ctx.has_silu)
        return dx, None, None, None, None, None


def _module(x: Tensor, groups: int) -> Any:
    """The module whose kernels fit the size of this map's groups."""
    return norm_groups if x[0].numel() <= groups * norm_groups.LARGEST else norm_tiles


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, has_silu: bool) -> GroupNormed:
    """The Triton form of `dag_kernels.reference.group_norm`: same arguments, same results in channels-last order.

    Raises:
        ValueError: weight or bias need a gradient, which is not computed here.
    """
    if torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad):
        raise ValueError("the fused group normalisation has no gradient to its weight and bias: freeze them")
    return GroupNormed(_GroupNorm.apply(x, weight, bias, groups, eps, has_silu))
