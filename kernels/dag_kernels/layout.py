"""Brings tensors into the memory layout that the kernels need: dense samples, all with one order of elements.

The distance from sample to sample may be any.
"""

from typing import Any

import torch
from torch import Tensor


def alike(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors (B, ...) with dense samples, whose elements are in the same order as the first tensor's.

    Sums over a sample are the same in NCHW and in channels-last, as long as all tensors have one order. A tensor with another
    order is copied; None stays None.
    """
    first = tensors[0]
    assert first is not None
    strides = first.stride()[1:] if _is_dense(first) else first.contiguous().stride()[1:]
    return tuple(None if tensor is None else _in_order(tensor, strides) for tensor in tensors)


def empty_alike(tensor: Tensor) -> Tensor:
    """An uninitialised tensor with the shape, dtype and order of elements of `tensor`, without gaps between samples."""
    strides = (tensor[0].numel(), *tensor.stride()[1:])
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)


def _in_order(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    if tensor.stride()[1:] == strides:
        return tensor
    copy = torch.empty_strided(tensor.shape, (tensor[0].numel(), *strides), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements of a sample lie in memory without gaps or overlap, in any order of dims."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
