"""Runs a command in its own process, which ends with its time limit or with the program that started it."""

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
    """The exit code, or minus the signal's number; None if the command was killed at its time limit."""


def run_limited(command: Sequence[str], seconds: float, log: IO[str], folder: Path) -> Ended:
    """Run a command in `folder`; what it prints goes to `log`.

    The command is killed with all processes that it started after `seconds`, and if this program is interrupted.
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
        # Also after a good end: processes that it left behind would hold memory that the next command needs.
        with suppress(ProcessLookupError, PermissionError):
            if sys.platform == "win32":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ends_with_parent() -> Callable[[], None] | None:
    """A `preexec_fn` for Popen: the kernel kills the process when its parent dies in any way. None except on Linux."""
    if _LIBC is None:
        return None
    return lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
