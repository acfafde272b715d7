"""Trees of tensors and plain values as named tensors and JSON, for files without pickles."""

import math
from typing import Any

import torch
from torch import Tensor


def packed(tree: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """JSON for a tree of dicts, lists, tensors and plain values. Each tensor is put into `tensors`, and replaced by its name."""
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, dict):
        return {key: packed(value, tensors, f"{name}/{key}" if name else str(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [packed(value, tensors, f"{name}/{index}") for index, value in enumerate(tree)]
    if isinstance(tree, torch.dtype):
        return {"dtype": str(tree).removeprefix("torch.")}
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"float": repr(tree)}  # a skipped update may leave one, and JSON cannot express it
    return tree


def unpacked(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree from which `packed` made this JSON and these tensors; tuples become lists."""
    if isinstance(tree, dict):
        if tree.keys() == {"tensor"}:
            return tensors[tree["tensor"]]
        if tree.keys() == {"dtype"}:
            return getattr(torch, tree["dtype"])
        if tree.keys() == {"float"}:
            return float(tree["float"])
        return {key: unpacked(value, tensors) for key, value in tree.items()}
    return [unpacked(value, tensors) for value in tree] if isinstance(tree, list) else tree
