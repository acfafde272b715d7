"""The two ways a run can refuse: what the user wrote is wrong, or what the run met is wrong."""

import sys


class UsageError(Exception):
    """The recipe, the command line or a file they name is wrong. Exit code 2."""


class RunError(Exception):
    """The run met something it cannot go on with: a model, a reward or a disk. Exit code 1."""


def exit_code(error: UsageError | RunError) -> int:
    """Tells the error in one line; returns what the command ends with."""
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1
