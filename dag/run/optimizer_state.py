"""The state of a torch or bitsandbytes optimizer as named tensors and plain numbers, for files without pickles."""

from typing import Any

import torch
from torch import Tensor


def tensors_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of the state, as {"0/exp_avg": ...}; for 8-bit optimizers their quantised states and scales."""
    return {key: value for key, value in _flat(optimizer.state_dict()["state"]).items() if isinstance(value, Tensor)}


def numbers_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The plain numbers of the state and the groups' learning rates; everything else comes from the recipe."""
    stored = optimizer.state_dict()
    numbers = {key: value for key, value in _flat(stored["state"]).items() if isinstance(value, int | float)}
    return {"state": numbers, "groups": [{"lr": group["lr"]} for group in stored["param_groups"]]}


def restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Set the state to what `tensors_of` and `numbers_of` returned for an optimizer over the same parameters."""
    values = {**numbers["state"], **tensors}
    states = {int(index): state for index, state in _nested(values).items()}
    current = optimizer.state_dict()["param_groups"]
    groups = [{**group, **stored} for group, stored in zip(current, numbers["groups"], strict=True)]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            # Files do not store the memory layout, and fused optimizers need that of the weights.
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    if getattr(optimizer, "is_paged", False):
        _page_again(optimizer)


def _page_again(optimizer: Any) -> None:
    """Move the states of a paged optimizer back to paged memory; bitsandbytes loads them into ordinary GPU memory."""
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            if isinstance(loaded := state.get(name), Tensor) and loaded.is_cuda:
                state[name] = optimizer.get_state_buffer(parameter, dtype=loaded.dtype).copy_(loaded)


def _flat(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """{"a/b": value} of nested dicts; the state of 8-bit optimizers is nested one level deeper than that of torch's."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        leaves |= _flat(value, path) if isinstance(value, dict) else {path: value}
    return leaves


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_flat`; all keys are strings."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree
