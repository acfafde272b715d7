"""Memory layouts that the kernels walk: dense samples, all in one order, at any distance from each other."""

from typing import Any

import torch
from torch import Tensor


def alike(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors with each sample dense and all samples in the first one's order of elements.

    Sums over a sample do not care whether it lies as NCHW or channels-last, as long as all do alike. A tensor that
    differs is copied; None stays None.
    """
    first = tensors[0]
    assert first is not None
    strides = first.stride()[1:] if _is_dense(first) else first.contiguous().stride()[1:]
    return tuple(None if tensor is None else _in_order(tensor, strides) for tensor in tensors)


def empty_alike(tensor: Tensor) -> Tensor:
    """An uninitialised tensor of that shape and dtype, its samples in that order and next to each other."""
    strides = (tensor[0].numel(), *tensor.stride()[1:])
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)


def _in_order(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    if tensor.stride()[1:] == strides:
        return tensor
    copy = torch.empty_strided(tensor.shape, (tensor[0].numel(), *strides), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def _is_dense(tensor: Tensor) -> bool:
    """Whether a sample's elements fill its memory without gaps or overlap, in whatever order of its dims."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
