"""Finds a reward's weights (a local path or the hub), and reads them without running code from them."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dag import hub
from dag.errors import RunError, UsageError

State = dict[str, Tensor]
# The version of the conversions. Raise it whenever one of them changes: folders of older versions are then converted anew.
_FORMAT = 1
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Published:
    """The published weights of a reward."""

    repo: str
    files: tuple[str, ...]
    """The name of a single file, or the patterns of a folder's files."""

    @property
    def is_file(self) -> bool:
        return len(self.files) == 1 and "*" not in self.files[0]


def locate(key: str, path: str | None, published: Published) -> Path:
    """The local file or folder of a reward's weights.

    Args:
        key:  what errors call the weights: the recipe's key, e.g. "hpsv2.path".
        path: a local file, a folder (also one that holds the published file), or a hub id; None takes `published`.

    Raises:
        UsageError: the path is neither a file, nor a folder, nor a hub id.
        RunError:   the download failed.
    """
    if path is not None:
        local = Path(path).expanduser()
        if local.exists():
            inside = local / published.files[0]
            return inside if published.is_file and inside.is_file() else local
        if not _HUB_ID.fullmatch(path):
            raise UsageError(
                f"{key}: there is no file or folder {path}, and it does not look like a hub id (owner/name)"
            )
    repo = path or published.repo
    hint = f"or give a local file or folder as {key}"
    if published.is_file:
        return hub.file(key, repo, published.files[0], hint)
    return hub.snapshot(key, repo, published.files, hint)


def read_state(key: str, path: Path) -> State:
    """The tensors of a .safetensors or PyTorch file by name, on the CPU; an outer `state_dict` is unwrapped.

    PyTorch files are read with weights_only, which refuses anything but data. Raises RunError.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError) as error:
        raise RunError(f"{key}: cannot read {path}: {error}") from None
    except Exception as error:
        # A pickle that is more than data, a TorchScript archive, a damaged file: torch has no common class for them.
        raise RunError(
            f"{key}: {path} is not a file of plain tensors ({type(error).__name__}); give a state dict or a "
            "transformers folder"
        ) from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise RunError(f"{key}: {path} holds no dictionary of tensors")
    return dict(state)


def read_json(key: str, path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UsageError if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{key}: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{key}: {path} holds no JSON object")
    return data


def read_config(key: str, path: str | None, default: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """The object in the JSON file that a recipe's `config` names; `default`, or {}, if the recipe names none."""
    return (default or {}) if path is None else read_json(key, Path(path).expanduser())


Component = tuple[dict[str, Any], State]
"""A transformers config and the weights that belong to it."""


def converted(key: str, source: Path, convert: Callable[[], dict[str, Component]], settings: Mapping[str, Any]) -> Path:
    """The folder that holds a file's components in transformers format. It is written beside the file, once.

    If the file's folder cannot be written, a temporary folder is used. The folder appears complete or not at all.

    Args:
        source:   the file.
        convert:  makes the components by name.
        settings: what the conversion depends on besides the file. If they or the file's size or time have changed, the file
            is converted anew.
    """
    stat = source.stat()
    stamp = {"format": _FORMAT, "name": source.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, **settings}
    folder = source.with_name(f"{source.name}.transformers")
    if _stamp_of(folder) == stamp:
        return folder
    components = convert()
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=source.parent))
    except OSError:
        scratch = folder = Path(tempfile.mkdtemp(prefix="dag-reward-"))
    for name, (config, state) in components.items():
        (scratch / name).mkdir()
        (scratch / name / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        save_file(
            {key: value.contiguous() for key, value in state.items()},
            scratch / name / "model.safetensors",
            metadata={"format": "pt"},
        )
    (scratch / "source.json").write_text(json.dumps(stamp), encoding="utf-8")
    if scratch != folder:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    return folder


def _stamp_of(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "source.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
