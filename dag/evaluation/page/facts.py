"""What a run's folder tells, read for its page. Whatever is missing or damaged is left out and named, never raised."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dag.errors import RunError
from dag.run.folder import RunFolder

DONE, RUNNING, STOPPED = "done", "running", "stopped"


@dataclass(frozen=True)
class Judged:
    """The newest result of `dag.evaluate` in the run's folder."""

    folder: str
    """Its name in the run's folder."""
    text: str
    """evaluation.md: a Markdown table and a legend."""
    models: list[dict[str, Any]]
    """The rows of evaluation.json, one for each model; empty if it cannot be read."""


@dataclass(frozen=True)
class Facts:
    """A run as its files tell it now."""

    run: RunFolder
    description: dict[str, Any]
    """run.json, of this version or an older one."""
    rows: list[dict[str, Any]]
    """Of metrics.jsonl."""
    status: str
    judged: Judged | None
    unreadable: list[str]
    """A sentence for each file that cannot be read."""

    def asked(self, key: str) -> Any:
        """The value of a dotted key of the recipe, such as `train.epochs`; None if it is not there."""
        found: Any = self.description.get("recipe")
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    def values(self, key: str) -> list[tuple[float, float]]:
        """(epoch, value) of every row in which `key` is a number."""
        return [(row["epoch"], row[key]) for row in self.rows if isinstance(row.get(key), int | float)]


def read(run: RunFolder) -> Facts:
    """The facts of a run. Raises RunError if run.json cannot be read."""
    description, unreadable = run.read_description(), []
    if not isinstance(description, dict):
        raise RunError(f"{run.path / 'run.json'}: holds no description of a run")
    try:
        rows = [row for row in run.metrics.read() if isinstance(row.get("epoch"), int)]
    except (OSError, ValueError, AttributeError):
        rows = []
        unreadable.append("metrics.jsonl cannot be read, so there are no curves.")
    facts = Facts(run, description, rows, STOPPED, _judged(run), unreadable)
    return Facts(run, description, rows, _status(facts), facts.judged, unreadable)


def _status(facts: Facts) -> str:
    epochs = facts.asked("train.epochs")
    if isinstance(epochs, int) and facts.rows and facts.rows[-1]["epoch"] >= epochs:
        return DONE
    return RUNNING if facts.run.is_held() else STOPPED


def _judged(run: RunFolder) -> Judged | None:
    """The newest evaluation; None if there is none that can be read."""
    for path in run.evaluations():
        try:
            text = (path / "evaluation.md").read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        return Judged(path.name, text, _models(path / "evaluation.json"))
    return None


def _models(path: Path) -> list[dict[str, Any]]:
    try:
        return [row for row in json.loads(path.read_text(encoding="utf-8"))["models"] if isinstance(row, dict)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
