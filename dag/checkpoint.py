"""Checkpoints that a run resumes from exactly: safetensors and JSON, never pickle.

A checkpoint is a folder written under a temporary name and renamed when complete. All randomness is counter-based,
so the counters in state.json are the state of every generator.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dag.errors import RunError
from dag.run_folder import write_json

FORMAT = 1


def save(
    folder: Path,
    epoch: int,
    tensors: dict[str, dict[str, Tensor]],
    optimizers: dict[str, torch.optim.Optimizer],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write folder/epoch_NNNN, point folder/last at it, and drop all but the newest `keep`.

    Args:
        epoch:      completed epochs.
        tensors:    named groups of weights, one safetensors file each.
        optimizers: by name; their tensors and numbers are stored apart.
        state:      JSON-able rest.
    """
    final = folder / f"epoch_{epoch:04d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    numbers = {}
    for name, optimizer in optimizers.items():
        tensors = {**tensors, f"optimizer_{name}": _optimizer_tensors(optimizer)}
        numbers[name] = _optimizer_numbers(optimizer)
    for name, group in tensors.items():
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in group.items()},
            temporary / f"{name}.safetensors",
        )
    write_json(temporary / "state.json", {"format": FORMAT, "epoch": epoch, "optimizers": numbers, **state})
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    link = folder / ".last.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, folder / "last")
    for old in sorted(folder.glob("epoch_*"))[:-keep]:
        shutil.rmtree(old)
    return final


def load_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises RunError if it is missing, unreadable or of another format."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"{folder}: not a complete checkpoint: {error}") from None
    if state.get("format") != FORMAT:
        raise RunError(f"{folder}: checkpoint format {state.get('format')}; this version reads {FORMAT}")
    return state


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """One group of weights. Raises RunError if its file is missing or corrupt."""
    path = folder / f"{name}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None


def load_optimizer(folder: Path, name: str, optimizer: torch.optim.Optimizer, numbers: dict[str, Any]) -> None:
    """Restore what `save` stored of an optimizer over the same parameters."""
    values = {**numbers["state"], **load_tensors(folder, f"optimizer_{name}")}
    states = {int(index): state for index, state in _nested(values).items()}
    current = optimizer.state_dict()["param_groups"]
    groups = [{**group, **stored} for group, stored in zip(current, numbers["groups"], strict=True)]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {key: value for key, value in _flat(optimizer.state_dict()["state"]).items() if isinstance(value, Tensor)}


def _optimizer_numbers(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The plain numbers of the state and the groups' learning rates; everything else comes from the recipe."""
    stored = optimizer.state_dict()
    numbers = {key: value for key, value in _flat(stored["state"]).items() if isinstance(value, int | float)}
    return {"state": numbers, "groups": [{"lr": group["lr"]} for group in stored["param_groups"]]}


def _flat(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """{"0/exp_avg": ...}: 8-bit optimizers nest their state one level deeper than torch's do."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        leaves |= _flat(value, path) if isinstance(value, dict) else {path: value}
    return leaves


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree
