"""metrics.jsonl: one JSON object per epoch, of finite numbers or null, never NaN."""

import json
import math
import os
from pathlib import Path
from typing import Any

from dag.run import durable

Value = float | int | str | None | list[Any]


def finite(value: Any) -> Any:
    """The value with every non-finite float, also inside lists, replaced by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [finite(item) for item in value] if isinstance(value, list) else value


# Today's names of keys that earlier versions wrote under another name.
_RENAMED = {"fidelity_top1": "noun_top1", "fidelity_top5": "noun_top5"}


class MetricsFile:
    """Appends rows to the file `path`; each row is on disk before `write` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: dict[str, Any]) -> None:
        line = json.dumps({name: finite(value) for name, value in row.items()}, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def text(self) -> str:
        """The file's complete rows. A row without a newline is left out: a crash has cut it short."""
        if not self.path.exists():
            return ""
        complete, newline, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
        return complete + newline

    def read(self) -> list[dict[str, Any]]:
        """The rows so far, with the keys' present names."""
        rows = [json.loads(line) for line in self.text().splitlines() if line]
        return [{_RENAMED.get(key, key): value for key, value in row.items()} for row in rows]

    def restore(self, text: str) -> None:
        """Replace the file by what `text` returned earlier; a resumed run then writes the rows after it again."""
        with durable.replacing(self.path) as temporary:
            temporary.write_text(text, encoding="utf-8")
