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
"""Work that is done in steps, each of which ends at a safe point (a `yield`)."""


class TooManyRowsError(torch.OutOfMemoryError):
    """A GPU ran out of memory in work that can be done again with fewer rows at a time."""


def agreed(processes: Processes, work: Callable[[], Result]) -> Result:
    """Run `work` in every process; returns its result if it succeeded in all of them. `work` must not contain a collective.

    Raises:
        TooManyRowsError: a GPU ran out of memory, in any process, whatever error said so.
        RunError: `work` raised a RunError or an OSError in this process, or failed in another one.
    """
    is_out, why, error, result = False, "in another process", None, None
    try:
        result = work()
    except RuntimeError as raised:
        if not is_out_of_memory(raised):
            raise
        # The error itself is dropped: its traceback would keep the tensors that filled the memory.
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
        minutes: minutes between checkpoints inside an epoch; None takes none there.
        save:    writes a checkpoint and returns its name, or returns None if there is nothing to save.
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
        """Note that a checkpoint was written now; the minutes until the next one count from here."""
        self._since = time.monotonic()

    def reach(self) -> None:
        """Reach a safe point: save if it is time. If a signal has come to any process, save and raise StoppedError."""
        is_due = self.minutes is not None and time.monotonic() - self._since > 60 * self.minutes
        is_stopping, is_due = self.processes.any((self.interrupt.signal is not None, is_due))
        if not (is_stopping or is_due):
            return
        saved = self.save()
        self.has_saved()
        if is_stopping:
            self.stop(saved)

    def is_stopping(self) -> bool:
        """Whether a signal has come to any process."""
        return self.processes.any((self.interrupt.signal is not None,))[0]

    def stop(self, saved: str | None) -> NoReturn:
        """Raise StoppedError, which names the checkpoint that was saved."""
        numbers = torch.tensor([int(self.interrupt.signal or 0)])
        raise StoppedError(int(self.processes.largest(numbers)[0]), saved)
