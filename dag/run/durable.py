"""Files that a crash cannot leave half written: they get their name when their content is on disk."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Beginning of the names of unfinished files and folders.
TEMPORARY = ".tmp-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A context that gives a temporary path beside `path`; the file written there replaces `path` if the block ends well."""
    # The name keeps its suffix, by which libraries choose a file format.
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Force a file's content, or a folder's names, to disk."""
    is_windows = sys.platform == "win32"
    if is_windows and path.is_dir():
        return  # folders cannot be opened there
    # Windows flushes what is open for writing alone.
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
