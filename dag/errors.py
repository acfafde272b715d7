"""How a program ends early: its errors, the exit code of each, and a reader of its output that is gone."""

import os
import signal
import sys
from collections.abc import Callable

# Windows has no such signal.
_SIGPIPE = 13
# Exit code of a run whose numbers are no longer finite.
DIVERGED = 3


class UsageError(Exception):
    """The recipe, the command line or a file they name is wrong. Exit code 2."""


class RunError(Exception):
    """A model, a reward, a disk or a GPU failed, so that the run cannot continue. Exit code 1."""


class DivergedError(RunError):
    """The run's numbers are no longer finite. Exit code DIVERGED."""


class StoppedError(Exception):
    """A signal ended the run after it had saved. Exit code 128 + the signal's number.

    Args:
        number: the signal's number.
        saved:  the checkpoint's name for the message; None if there was nothing to save yet.
    """

    def __init__(self, number: int, saved: str | None) -> None:
        self.number, self.saved = number, saved
        where = (
            f"saved {saved}; --resume goes on from there" if saved else "nothing was trained yet; --resume starts anew"
        )
        super().__init__(f"stopped by {signal.Signals(number).name}: {where}")


def exit_code(error: UsageError | RunError | StoppedError) -> int:
    """Print the error in one line on stderr; returns the exit code."""
    if isinstance(error, StoppedError):
        print(error, file=sys.stderr)
        return 128 + error.number
    print(f"error: {error}", file=sys.stderr)
    if isinstance(error, DivergedError):
        return DIVERGED
    return 2 if isinstance(error, UsageError) else 1


def quiet_on_broken_pipe(main: Callable[[], int]) -> int:
    """Run a program's `main` and return its exit code, or 128 + SIGPIPE if the reader of stdout is gone, as with `| head`."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()  # here, where the error can be caught, and not when Python exits
    except BrokenPipeError:
        # What is still buffered goes nowhere; else Python would fail to write it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + _SIGPIPE
