"""How a run ends early: what the user wrote is wrong, what the run met is wrong, or it was told to stop."""

import signal
import sys

DIVERGED = 3


class UsageError(Exception):
    """The recipe, the command line or a file they name is wrong. Exit code 2."""


class RunError(Exception):
    """The run met something it cannot go on with: a model, a reward or a disk. Exit code 1."""


class DivergedError(RunError):
    """The run's numbers are no longer finite. Exit code DIVERGED."""


class StoppedError(Exception):
    """A signal ended the run after it had saved. Exit code 128 + its number.

    Args:
        saved: what to call the checkpoint; None if there was nothing to save yet.
    """

    def __init__(self, number: int, saved: str | None) -> None:
        self.number, self.saved = number, saved
        where = (
            f"saved {saved}; --resume goes on from there" if saved else "nothing was trained yet; --resume starts anew"
        )
        super().__init__(f"stopped by {signal.Signals(number).name}: {where}")


def exit_code(error: UsageError | RunError | StoppedError) -> int:
    """Tells the error in one line; returns what the command ends with."""
    if isinstance(error, StoppedError):
        print(error, file=sys.stderr)
        return 128 + error.number
    print(f"error: {error}", file=sys.stderr)
    if isinstance(error, DivergedError):
        return DIVERGED
    return 2 if isinstance(error, UsageError) else 1
