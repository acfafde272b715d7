"""Convolutions with frozen weights that do not keep their input for the backward pass, which does not need it.

PyTorch's own convolution keeps its input whether or not its weight needs a gradient. Under LoRA almost every convolution of
a UNet is frozen, and their inputs are a tenth of what a training step keeps in memory.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def freeze_convolutions(network: nn.Module) -> None:
    """Turn every plain convolution whose weights need no gradient into a `FrozenConv2d`, in place.

    Call it after the adapter is added: peft builds a convolution's LoRA factors of that convolution's own class.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d and not module.weight.requires_grad and module.padding_mode == "zeros":
            module.__class__ = FrozenConv2d


class FrozenConv2d(nn.Conv2d):
    """A convolution that has a gradient to its input alone and computes what `nn.Conv2d` computes."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _Convolution.apply(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class _Convolution(torch.autograd.Function):
    """y = w * x + b; the backward pass computes dx from dy and w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(weight)
        is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
        ctx.format = torch.channels_last if is_channels_last else torch.contiguous_format
        ctx.shape, ctx.geometry, ctx.has_bias = x.shape, geometry, bias is not None
        return functional.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        dy, (stride, padding, dilation, groups) = upstream[0], ctx.geometry
        # Only the shape and the memory layout of x are used. In another layout cuDNN would copy the gradient there and back.
        x = torch.empty(ctx.shape, dtype=dy.dtype, device=dy.device, memory_format=ctx.format)
        bias_sizes = [len(weight)] if ctx.has_bias else None
        transposed, output_padding, mask = False, (0, 0), (True, False, False)
        dx = torch.ops.aten.convolution_backward(
            dy, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask
        )[0]
        return dx, None, None, None, None, None, None
