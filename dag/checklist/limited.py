"""A command in a process of its own that cannot outlive its time, nor the program that started it."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None
    """Its exit code, negative for a signal; None if it was over its time."""


def run_limited(command: Sequence[str], seconds: float, log: IO[str], folder: Path) -> Ended:
    """Run a command in `folder`, what it prints going to `log`.

    After so many seconds, and if this program is interrupted, the command is killed with all that it started.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=folder,
        start_new_session=True,
        preexec_fn=ends_with_parent(),
    )
    try:
        return Ended(process.wait(seconds))
    except subprocess.TimeoutExpired:
        return Ended(None)
    finally:
        # Also after a good end: what it started and left behind would hold memory that the next command wants.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ends_with_parent() -> Callable[[], None] | None:
    """For Popen's `preexec_fn`: the process is killed when its parent dies, however that dies. Linux alone has this."""
    if _LIBC is None:
        return None
    return lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
