"""A trial of `train_dag.py` as a user starts it, on few trajectories: evaluation, checkpoint, stop, resume, export.

Two runs of the same recipe: one without a stop, one that gets SIGTERM in its first epoch and is resumed. A wrong exit code, a
missing file or a wrong metric raises RunError.
"""

import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dag.checklist.limited import ends_with_parent
from dag.errors import RunError
from dag.evaluation.study import ROOT
from dag.models.source import counted_as, local_folder
from dag.recipe.load import load
from dag.recipe.reward_sections import Tower
from dag.run.folder import RunFolder
from dag.run.meter import PHASES

Row = dict[str, Any]

_SMALL = (
    *("train.epochs=2", "sampler.steps=10", "checkpoint.every=1", "checkpoint.keep=2"),
    *("evaluation.every=1", "evaluation.prompts=2", "evaluation.images_per_prompt=2"),
)
_FILES = (
    "run.json",
    "metrics.jsonl",
    "curves.png",
    "samples/epoch_0000.png",
    "samples/before_after.png",
    "checkpoints/epoch_0002/state.json",
)
_LORA = ("lora/pytorch_lora_weights.safetensors", "lora/lora_kohya.safetensors")
# Metrics that differ between any two runs: times and memory.
_MEASURED = {*(f"{kind}_{name}" for kind in ("seconds", "memory_gib") for name in PHASES), "peak_memory_gib"}
_STOPPED = 128 + signal.SIGTERM


def rows(recipe: str, given: Sequence[str], device: str) -> Iterator[Row]:
    """Yield the seconds and GiB of every epoch of both runs, then how far their metrics differ.

    Args:
        recipe: the recipe's file.
        given:  the user's overrides.
        device: "cpu" or "cuda". On a CPU, and where the recipe says `deterministic: true`, the metrics must be equal; else sums
            have no fixed order on a GPU.

    Raises:
        RunError: an exit code, a file or a metric is wrong.
    """
    overrides = [*_SMALL, *_without_download(recipe, given), *given]
    loaded = load(recipe, overrides)
    overrides = [f"train.trajectories={loaded.train.updates * loaded.train.micro_batch}", *overrides]
    command = [sys.executable, str(ROOT / "train_dag.py"), "--recipe", recipe]
    command += [word for override in overrides for word in ("--set", override)]
    files = (*_FILES, *(_LORA if loaded.adapter.kind == "lora" else ()))
    with tempfile.TemporaryDirectory() as folder:
        whole, parted = RunFolder(Path(folder) / "whole"), RunFolder(Path(folder) / "parted")
        _expect("a run in one go", _start([*command, "--out", str(whole.path)]).wait(), 0)
        yield from _shown("in one go", _checked(whole, files))
        _stop(_start([*command, "--out", str(parted.path)]), parted)
        _expect("the resumed run", _start([*command, "--resume", str(parted.path)]).wait(), 0)
        yield from _shown("stopped and resumed", _checked(parted, files))
        must_be_equal = device == "cpu" or loaded.deterministic
        yield _compared(whole.metrics.read(), parted.metrics.read(), must_be_equal)


def _without_download(recipe: str, given: Sequence[str]) -> Iterator[str]:
    """Overrides that take random weights where the recipe's weights would have to be fetched."""
    loaded = load(recipe, given)
    if local_folder(loaded.model.path) is None:
        yield from (f"model.path={counted_as(loaded.model.path)}", "model.variant=null")
    if isinstance(loaded.reward[0], Tower) and loaded.reward[0].path is None and len(loaded.reward) == 1:
        yield "reward.path=random"


def _start(command: Sequence[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, preexec_fn=ends_with_parent())


def _stop(process: "subprocess.Popen[bytes]", run: RunFolder) -> None:
    """Send SIGTERM as soon as the first evaluation is recorded: the run is then inside its first epoch."""
    while process.poll() is None and not run.metrics.read():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _expect("a run that got SIGTERM in its first epoch", process.wait(), _STOPPED)
    if not any(run.checkpoints.glob("epoch_*")):
        raise RunError("a run that got SIGTERM in its first epoch left no checkpoint")


def _expect(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise RunError(f"{what} ended with exit code {found}, expected {expected}")


def _checked(run: RunFolder, files: Sequence[str]) -> list[Row]:
    """The rows of a complete run. Raises RunError where a file or a number is missing."""
    lost = [name for name in files if not (run.path / name).is_file()]
    if lost:
        raise RunError(f"the {run.path.name} run left no {', '.join(lost)}")
    found = run.metrics.read()
    epochs = json.loads((run.path / "run.json").read_text(encoding="utf-8"))["recipe"]["train"]["epochs"]
    if [row["epoch"] for row in found] != list(range(epochs + 1)):
        raise RunError(f"the {run.path.name} run has rows of the epochs {[row['epoch'] for row in found]}")
    for name in ("reward_mean", "loss", "eval_reward_mean"):
        if not isinstance(found[-1].get(name), float):
            raise RunError(f"the {run.path.name} run's last {name} is {found[-1].get(name)!r}")
    return found


def _shown(label: str, found: Sequence[Row]) -> Iterator[Row]:
    """The chosen columns of a run's rows."""
    chosen = ("epoch", "trajectories", "micro_batch", "reward_mean", "loss", *sorted(_MEASURED))
    for row in found:
        yield {"label": label, **{name: row[name] for name in chosen if row.get(name) is not None}}


def _compared(whole: Sequence[Row], parted: Sequence[Row], must_be_equal: bool) -> Row:
    """A row with the largest relative difference between the metrics of two runs, and the name of that metric."""
    differences = {
        f"{name} of epoch {one['epoch']}": _apart(one[name], other.get(name))
        for one, other in zip(whole, parted, strict=True)
        for name in one.keys() - _MEASURED
    }
    worst = max(differences, key=lambda name: differences[name])
    if must_be_equal and differences[worst] > 0:
        raise RunError(f"the resumed run is another one: {worst} differs by {differences[worst]:.3g}")
    of = worst if differences[worst] > 0 else None
    print(f"resumed against in one go: metrics differ by {differences[worst]:.3g}{f', {of}' if of else ''}", flush=True)
    return {"label": "resumed against in one go", "largest_difference": differences[worst], "of": of}


def _apart(one: Any, other: Any) -> float:
    """The difference of two values relative to the larger; 0 if they are equal, infinite if one is no finite number."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return max((_apart(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if one == other:
        return 0.0
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (one, other)):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other))
