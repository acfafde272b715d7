"""The folder of one run, in which nothing is overwritten by accident.

It holds:

    run.json                            recipe, versions, counts: what ran, on what
    metrics.jsonl, curves.png           one line per epoch, and its curves
    report.html                         all of it on one page, see `dag.evaluation.page`
    samples/epoch_NNNN.png              pictures of an evaluation
    checkpoints/epoch_EEEE[_RRRRRR]/    see `dag.run.checkpoint`
    lora/                               the trained weights, at the end
    faults/                             transitions whose gradients were not finite
"""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from dag.errors import RunError, UsageError
from dag.recipe import Recipe
from dag.recipe.load import parse
from dag.run import durable, locks
from dag.run.metrics import MetricsFile

# Locked while a process trains in the folder.
_LOCK = ".lock"
_PROBE = ".writable"


class RunFolder:
    """The paths in a run's folder, and its description in run.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = MetricsFile(path / "metrics.jsonl")
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"
        self.weights = path / "lora"
        self.faults = path / "faults"
        self.page = path / "report.html"

    def sheet(self, epoch: int) -> Path:
        """The picture file of the evaluation after `epoch` epochs."""
        return self.samples / f"epoch_{epoch:04d}.png"

    def evaluations(self) -> list[Path]:
        """The folders of `dag.evaluate` in the run's folder, evaluation/, evaluation_001/, ..., the newest first."""
        numbered = [(re.fullmatch(r"evaluation(?:_(\d+))?", path.name), path) for path in self.path.glob("evaluation*")]
        return [
            path for _, path in sorted(((int(match[1] or 0), path) for match, path in numbered if match), reverse=True)
        ]

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        """A new run. Raises UsageError if the folder holds any file or cannot be written."""
        try:
            # A run that was refused before it began leaves empty folders.
            left = [inside for inside in path.rglob("*") if not inside.is_dir() and inside.name != _LOCK]
            for inside in [inside for inside in left if inside.name.startswith((durable.TEMPORARY, _PROBE))]:
                inside.unlink()  # a start that was killed has left it
                left.remove(inside)
            if left:
                raise UsageError(
                    f"--out {path}: the folder is not empty; continue that run with --resume, or choose another folder"
                )
            (path / "samples").mkdir(parents=True, exist_ok=True)
            probe = path / _PROBE
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UsageError(f"--out {path}: cannot write there: {error.strerror}") from None
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing run. Raises UsageError if there is none."""
        if not (path / "run.json").is_file():
            raise UsageError(f"{path}: no run there (run.json is missing)")
        return cls(path)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A context in which no other process trains in this folder. Raises UsageError if one does."""
        try:
            file = (self.path / _LOCK).open("w")
        except OSError as error:
            raise UsageError(f"{self.path / _LOCK}: cannot be opened: {error.strerror}") from None
        with file:
            if not _locked(file):
                raise UsageError(f"{self.path}: another process is training in this folder")
            for left in (*self.path.glob(f"{durable.TEMPORARY}*"), *self.samples.glob(f"{durable.TEMPORARY}*")):
                if left.is_file():
                    left.unlink(missing_ok=True)
            try:
                yield
            finally:
                locks.unlock(file)

    def is_held(self) -> bool:
        """Whether a process trains in this folder now."""
        try:
            with (self.path / _LOCK).open() as file:
                return locks.is_locked(file)
        except OSError:
            return False

    def write_description(self, description: dict[str, Any]) -> None:
        durable.write_json(self.path / "run.json", description)

    def read_recipe(self) -> Recipe:
        """The recipe of the run. Raises UsageError if run.json holds none that this version understands."""
        description, source = self.read_description(), str(self.path / "run.json")
        data = description.get("recipe") if isinstance(description, dict) else None
        if not isinstance(data, dict):
            raise UsageError(f"{source}: holds no recipe")
        return parse(data, source)

    def read_description(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / 'run.json'}: cannot be read: {error}") from None


def _locked(file: TextIO) -> bool:
    """Lock a file for this process alone; returns whether that worked. Tries twice, since `is_held` may have it for a moment."""
    for pause in (0.05, 0.0):
        if locks.lock(file):
            return True
        time.sleep(pause)
    return False


def default_path(recipe_name: str) -> Path:
    """runs/<recipe>-<time>, which does not exist. It waits if it does: for a second run in one second, or a clock set back."""
    while (path := Path("runs") / f"{recipe_name}-{time.strftime('%Y%m%d-%H%M%S')}").exists():
        time.sleep(0.1)
    return path


def newest_run(recipe_name: str) -> Path:
    """The newest runs/<recipe>-* that has a checkpoint. Raises UsageError if there is none."""
    name = re.compile(re.escape(recipe_name) + r"-\d{8}-\d{6}")
    found = sorted(
        path
        for path in Path("runs").glob("*")
        if name.fullmatch(path.name) and any((path / "checkpoints").glob("epoch_*"))
    )
    if not found:
        raise UsageError(
            f"--resume: no run of {recipe_name} with a checkpoint under runs/; name its folder: --resume DIR"
        )
    return found[-1]
