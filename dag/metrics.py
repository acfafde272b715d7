"""metrics.jsonl: one JSON object per epoch, finite numbers or null, never NaN. Trackers get the same numbers."""

import json
import math
from pathlib import Path
from typing import Any

Value = float | int | str | None | list[Any]


def finite(value: Any) -> Any:
    """The value with every non-finite float, also inside lists, replaced by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [finite(item) for item in value] if isinstance(value, list) else value


class MetricsFile:
    """Appends rows to `path`; each is on disk before `write` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: dict[str, Any]) -> None:
        line = json.dumps({name: finite(value) for name, value in row.items()}, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        # What follows the last newline was cut short by a crash.
        complete, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
        return [json.loads(line) for line in complete.splitlines() if line]

    def keep_before(self, epoch: int) -> None:
        """Drop the rows of `epoch` and later, which a resumed run will write again."""
        rows = [row for row in self.read() if row["epoch"] < epoch]
        replacement = self.path.with_suffix(".tmp")
        replacement.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        replacement.replace(self.path)
