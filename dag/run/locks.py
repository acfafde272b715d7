"""Locks on open files, which end with the process that holds them: flock, or on Windows a locked byte far behind the end."""

import os
import sys
from typing import IO, Any

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

# Windows keeps other programs from reading a locked byte, so it must be none that is written.
_FAR = 2**30


def lock(file: IO[Any]) -> bool:
    """Lock an open file for this process alone, until it is closed; returns whether that worked."""
    try:
        if sys.platform == "win32":
            _windows(file, msvcrt.LK_NBLCK)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def unlock(file: IO[Any]) -> None:
    """Take the lock back. Closing the file does so too, but on Windows after a while."""
    if sys.platform == "win32":
        _windows(file, msvcrt.LK_UNLCK)
    else:
        fcntl.flock(file, fcntl.LOCK_UN)


def is_locked(file: IO[Any]) -> bool:
    """Whether another open file of the same path is locked. Where that cannot be known it counts as not locked."""
    try:
        if sys.platform == "win32":
            _windows(file, msvcrt.LK_NBLCK)
        else:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        unlock(file)
    except (BlockingIOError, PermissionError):  # flock raises the first, msvcrt the second
        return True
    except OSError:
        return False
    return False


def _windows(file: IO[Any], mode: int) -> None:
    if sys.platform == "win32":
        os.lseek(file.fileno(), _FAR, os.SEEK_SET)
        msvcrt.locking(file.fileno(), mode, 1)
