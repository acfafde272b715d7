"""Checkpoints: all of a run's state in safetensors and JSON files, never in a pickle.

A checkpoint is a folder. `epoch_EEEE` was taken after EEEE completed epochs, `epoch_EEEE_RRRRRR` at safe point RRRRRR of the
epoch after them. It is written under another name, forced to disk and renamed. Its manifest lists the size and the hash of
every file, by which an incomplete or damaged checkpoint is recognised. All randomness is counter-based: the counters in
state.json are the state of every generator.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dag.errors import DivergedError, RunError
from dag.run import durable

FORMAT = 2
MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"epoch_(\d{4,})(?:_(\d{6,}))?")
Groups = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, order=True)
class Position:
    """Where in a run a checkpoint was taken. A later position is the larger one."""

    epoch: int
    """Completed epochs."""
    points: int = 0
    """Safe points passed in the epoch after them; 0 for a checkpoint between two epochs."""

    @property
    def name(self) -> str:
        return f"epoch_{self.epoch:04d}" + (f"_{self.points:06d}" if self.points else "")

    @classmethod
    def of(cls, folder: Path) -> "Position | None":
        """The position that a checkpoint folder's name states; None if it is not the name of a checkpoint."""
        match = _NAME.fullmatch(folder.name)
        return match and cls(int(match[1]), int(match[2] or 0))


# -- writing ------------------------------------------------------------------------------------------------------


def save(
    folder: Path, position: Position, groups: Groups, state: dict[str, Any], keep: int, texts: Mapping[str, str]
) -> Path:
    """Write a checkpoint into `folder`, and remove all but the newest `keep`. Returns the checkpoint's folder.

    If a complete checkpoint of that position and as many processes exists already, nothing is written.

    Args:
        folder: the run's folder for checkpoints.
        groups: tensors, by the name of their safetensors file and their own.
        state:  everything else, as JSON.
        texts:  the content of further files, by their name.

    Raises:
        DivergedError: a number is not finite.
        RunError: the checkpoint cannot be written. On a full disk all checkpoints but the newest complete one are removed,
            and the checkpoint is tried once more. The newest complete one always stays.
    """
    final = folder / position.name
    if final.exists() and flaw(final) is None and load_state(final).get("processes") == state.get("processes"):
        return final
    _check_finite(groups, position)
    for is_last_try in (False, True):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            clean(folder)
            _write(final, groups, state, texts)
            _drop(folder, keep, position)
            return final
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                clean(folder)
            if is_last_try or not _is_full(error):
                raise RunError(f"{final}: cannot be written: {_reason(error)}{_still_good(folder)}") from None
            _make_room(folder)
    raise AssertionError("the second try returns or raises")


def _write(final: Path, groups: Groups, state: dict[str, Any], texts: Mapping[str, str]) -> None:
    temporary = final.with_name(f"{durable.TEMPORARY}{final.name}")
    temporary.mkdir()
    for name, group in groups.items():
        save_file(_unshared(group), temporary / f"{name}.safetensors")
    for name, text in {STATE: json.dumps(state, indent=1, allow_nan=False), **texts}.items():
        (temporary / name).write_text(text, encoding="utf-8")
    files = sorted(temporary.iterdir())
    for path in files:
        durable.sync(path)
    content = {path.name: {"bytes": path.stat().st_size, "sha256": durable.sha256(path)} for path in files}
    durable.write_json(temporary / MANIFEST, {"format": FORMAT, "files": content})
    if final.exists():  # it is damaged or from another number of processes, else `save` had returned
        _remove(final)
    os.replace(temporary, final)
    durable.sync(final.parent)


def _unshared(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous and without shared memory, as safetensors requires. The 8-bit optimizer states of all
    layers share a table."""
    unshared: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in group.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        unshared[key] = tensor
    return unshared


def clean(folder: Path) -> None:
    """Remove the files that an interrupted `save` left behind."""
    for path in folder.glob(f"{durable.TEMPORARY}*"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _drop(folder: Path, keep: int, written: Position) -> None:
    """Remove all checkpoints up to the one just written but the newest `keep` complete ones. Later ones stay: a resume has
    skipped them, and says why."""
    kept = 0
    for path in candidates(folder):
        position = Position.of(path)
        assert position is not None
        if position > written:
            continue
        if kept < keep and flaw(path, is_thorough=False) is None:
            kept += 1
        else:
            _remove(path)


def _make_room(folder: Path) -> None:
    """Remove all checkpoints but the newest one whose hashes are right."""
    good = newest_complete(folder)
    for path in candidates(folder):
        if path != good:
            with suppress(OSError):
                _remove(path)


def _remove(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first: a half removed one must never look like a checkpoint."""
    doomed = folder.with_name(f"{durable.TEMPORARY}{folder.name}-old")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _check_finite(groups: Groups, position: Position) -> None:
    """Raises DivergedError if a number is not finite. The state of an unfinished epoch (`flight_*`) is not checked: it may hold
    the numbers of a skipped update."""
    for name, group in groups.items():
        for key, value in group.items() if not name.startswith("flight") else ():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise DivergedError(
                    f"{position.name}: not saved, {name} {key} is not finite; the checkpoint before it stays"
                )


def _is_full(error: Exception) -> bool:
    """Whether the disk or the user's share of it is full. safetensors names the system's error in its text alone."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return (
        error.errno in full if isinstance(error, OSError) else any(f"code: {number}," in str(error) for number in full)
    )


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = re.search(r'message: "([^"]+)"', str(error))
    return found[1] if found else str(error)


def _still_good(folder: Path) -> str:
    good = newest_complete(folder)
    return f"; {good.name} is complete, --resume goes on from there" if good else ""


# -- reading ------------------------------------------------------------------------------------------------------


def candidates(folder: Path) -> list[Path]:
    """The folders that are named like a checkpoint, newest first."""
    found = [
        (position, path) for path in folder.glob("epoch_*") if (position := Position.of(path)) and _is_folder(path)
    ]
    return [path for _, path in sorted(found, reverse=True)]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def flaw(folder: Path, is_thorough: bool = True) -> str | None:
    """Why a checkpoint cannot be used, or None.

    Args:
        is_thorough: compare the files' hashes, not their sizes alone.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return (
                f"has format {manifest['format']!r}, and this version reads {FORMAT}: go on with the version that wrote it, whose "
                "commit is in run.json, or start anew"
            )
        files = {name: (int(known["bytes"]), str(known["sha256"])) for name, known in manifest["files"].items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return f"{MANIFEST} cannot be read"
    for name, (size, digest) in files.items():
        path = folder / name
        if path.parent != folder or path.is_symlink():
            return f"{MANIFEST} names {name!r}, which is no file of it"
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != size:
            return f"{name} has {found} bytes of {size}"
        if is_thorough and durable.sha256(path) != digest:
            return f"{name} is not what was written"
    if unknown := sorted({path.name for path in folder.iterdir()} - files.keys() - {MANIFEST}):
        return f"holds {unknown[0]!r}, which {MANIFEST} does not know"
    return None if STATE in files else f"{STATE} is missing"


def newest_complete(folder: Path) -> Path | None:
    """The newest checkpoint without a flaw, or None."""
    return next((path for path in candidates(folder) if flaw(path) is None), None)


def newest(folder: Path, objection: Callable[[dict[str, Any]], str | None]) -> tuple[Path | None, list[str]]:
    """(the newest usable checkpoint, or None if there is no checkpoint at all; one line for each newer one that is skipped).

    Args:
        objection: returns why a complete checkpoint with this state.json cannot be used, or None.

    Raises:
        RunError: there are checkpoints, and none can be used.
    """
    skipped: list[str] = []
    for path in candidates(folder):
        reason = flaw(path) or objection(load_state(path))
        if reason is None:
            return path, skipped
        skipped.append(f"{path.name}: {reason}")
    if skipped:
        raise RunError(f"{folder}: no checkpoint can be used: {'; '.join(skipped)}")
    return None, []


def chosen(folder: Path, name: str | None = None) -> Path:
    """A checkpoint by its name, or the newest complete one. Raises RunError if there is none or it is damaged."""
    if name is None:
        found, _ = newest(folder, lambda state: None)
        if found is None:
            raise RunError(f"{folder}: no checkpoint there yet")
        return found
    names = [path.name for path in candidates(folder)]
    if name not in names:
        raise RunError(f"{folder}: no checkpoint {name!r}; there are: {', '.join(names) or 'none'}")
    if (reason := flaw(folder / name)) is not None:
        raise RunError(f"{folder / name}: {reason}")
    return folder / name


def load_state(folder: Path) -> dict[str, Any]:
    """state.json of a complete checkpoint. Raises RunError if it cannot be read."""
    try:
        return json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder / STATE}: cannot be read: {error}") from None


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """One group of a checkpoint's tensors by name. Raises RunError if its file is missing or damaged."""
    path = folder / f"{name}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
