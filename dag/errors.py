"""The errors that end a program early, and the exit code of each."""

import signal
import sys

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
