"""The two ways a run can refuse: what the user wrote is wrong, or what the run met is wrong."""


class UsageError(Exception):
    """The recipe, the command line or a file they name is wrong. Exit code 2."""


class RunError(Exception):
    """The run met something it cannot go on with: a model, a reward or a disk. Exit code 1."""
