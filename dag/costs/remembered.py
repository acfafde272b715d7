"""Remembers the shapes that operators return on the meta device, where PyTorch works most of them out in slow Python."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dag.costs.live_bytes import tensors_in

# The results by operator and arguments, as tensors on the meta device that nobody else holds. They serve the whole process.
_KNOWN: dict[Any, Any] = {}
# The result of an operator in place.
_FIRST_ARGUMENT = object()


class RememberedShapes(TorchDispatchMode):
    """Answers an operator that meets its arguments' shapes again by new empty tensors; PyTorch does all else.

    A result on the meta device is remembered if all its tensors are new ones that fill their storage, or if it is the first
    argument, as after an operator in place. Views are left to PyTorch, and so is an operator with a tensor on another device,
    unless that tensor is a number. Modes that are entered after this one see every operator as they would without it.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view or torch.Tag.inplace_view in func.tags or not _are_shapes((args, kwargs)):
            return func(*args, **kwargs)
        key = (func, _described(args), _described(tuple(kwargs.items())))
        if key in _KNOWN:
            known = _KNOWN[key]
            return args[0] if known is _FIRST_ARGUMENT else _renewed(known)
        result = func(*args, **kwargs)
        if _is_new(result, (args, kwargs)):
            _KNOWN[key] = _renewed(result)
        elif args and result is args[0] and result.is_meta:
            _KNOWN[key] = _FIRST_ARGUMENT
        return result


def _are_shapes(arguments: Any) -> bool:
    """Whether there are tensors, and shapes, strides and dtypes are all that a result can depend on."""
    tensors = tensors_in(arguments)
    return bool(tensors) and all(tensor.is_meta or not tensor.dim() for tensor in tensors)


def _described(tree: Any) -> Any:
    """Arguments as a key: a tensor as its shape, strides, dtype and device, all else with its type."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.stride(), tree.dtype, tree.is_meta
    if isinstance(tree, tuple | list):
        return tuple(map(_described, tree))
    return type(tree), tree


def _is_new(result: Any, arguments: Any) -> bool:
    """Whether a result consists of None and of tensors on the meta device that share no storage and fill theirs."""
    parts = result if isinstance(result, tuple | list) else [result]
    seen = {id(tensor.untyped_storage()) for tensor in tensors_in(arguments)}
    for part in parts:
        if part is None:
            continue
        if not isinstance(part, Tensor) or not part.is_meta or id(part.untyped_storage()) in seen:
            return False
        if part.untyped_storage().nbytes() != _renewed(part).untyped_storage().nbytes():
            return False
        seen.add(id(part.untyped_storage()))
    return True


def _renewed(result: Any) -> Any:
    """New empty tensors of the same shapes, strides and dtypes."""
    if isinstance(result, tuple | list):
        return tuple(map(_renewed, result))
    if result is None:
        return None
    return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")
