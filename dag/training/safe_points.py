"""Safe points: between two micro-batches a run can be saved, stopped, or tried again with fewer rows.

Every process reaches the same safe points and exchanges its status there; otherwise one could block in a collective that a
failed one never joins.
"""

import time
from collections.abc import Callable, Generator
from typing import NoReturn, TypeVar, cast

import torch

from dag.errors import RunError, StoppedError
from dag.run.gpu import is_out_of_memory
from dag.run.processes import ALONE, Processes
from dag.run.signals import Interrupt

Result = TypeVar("Result")
Steps = Generator[None, None, None]
"""Work in steps. Each ends at a safe point, and none is under way there."""


class TooManyRowsError(torch.OutOfMemoryError):
    """A GPU ran out of memory in work that can be done again with fewer rows at a time."""


def agreed(processes: Processes, work: Callable[[], Result]) -> Result:
    """What `work` returns, once it has ended well in every process. No collective may stand inside `work`.

    Raises:
        TooManyRowsError: a GPU ran out of memory, in whichever process and by whatever name.
        RunError: what `work` raised, an error of the system in one line, or that another process failed.
    """
    is_out, why, error, result = False, "in another process", None, None
    try:
        result = work()
    except RuntimeError as raised:
        if not is_out_of_memory(raised):
            raise
        # Not raised on: its traceback holds the tensors that were too many.
        is_out, why = True, str(raised)
    except RunError as raised:
        error = raised
    except OSError as raised:
        error = RunError(f"{raised.filename}: {raised.strerror}" if raised.filename else str(raised))
    any_out, any_error = processes.any((is_out, error is not None))
    if any_error:
        raise error or RunError("another process failed; its message tells why")
    if any_out:
        raise TooManyRowsError(why)
    return cast(Result, result)


class SafePoints:
    """Decides at each safe point whether to save and whether to stop.

    Args:
        save:    writes a checkpoint of the state here and returns its name, or None if there is nothing to save.
        minutes: between checkpoints inside an epoch; None takes none.
    """

    def __init__(
        self,
        processes: Processes = ALONE,
        interrupt: Interrupt | None = None,
        minutes: float | None = None,
        save: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.processes, self.interrupt, self.minutes, self.save = processes, interrupt or Interrupt(), minutes, save
        self.has_saved()

    def has_saved(self) -> None:
        """The minutes count from here."""
        self._since = time.monotonic()

    def reach(self) -> None:
        """Save if it is time; after a signal save and raise StoppedError."""
        is_due = self.minutes is not None and time.monotonic() - self._since > 60 * self.minutes
        is_stopping, is_due = self.processes.any((self.interrupt.signal is not None, is_due))
        if not (is_stopping or is_due):
            return
        saved = self.save()
        self.has_saved()
        if is_stopping:
            self.stop(saved)

    def is_stopping(self) -> bool:
        """Whether a signal has come, to whichever process."""
        return self.processes.any((self.interrupt.signal is not None,))[0]

    def stop(self, saved: str | None) -> NoReturn:
        """Raises StoppedError, which names what was saved."""
        numbers = torch.tensor([int(self.interrupt.signal or 0)])
        raise StoppedError(int(self.processes.largest(numbers)[0]), saved)
