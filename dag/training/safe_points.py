"""Resting points: between two micro-batches a run can be saved, stopped, or try again with fewer rows.

All processes of a run pass them together and agree there, so that none waits for one that has gone.
"""

import time
from collections.abc import Callable
from typing import NoReturn, TypeVar, cast

import torch

from dag.errors import RunError, StoppedError
from dag.run.gpu import is_out_of_memory
from dag.run.processes import ALONE, Processes
from dag.run.signals import Interrupt

Result = TypeVar("Result")


class Rest:
    """
    Args:
        save:    writes a checkpoint of the state here and returns what to call it, or None if there is nothing to save.
        minutes: between checkpoints inside an epoch; None takes none.

    Attributes:
        passed: points of this epoch.
    """

    def __init__(
        self,
        world: Processes = ALONE,
        interrupt: Interrupt | None = None,
        minutes: float | None = None,
        save: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.world, self.interrupt, self.minutes, self.save = world, interrupt or Interrupt(), minutes, save
        self.passed = 0
        self.has_saved()

    def has_saved(self) -> None:
        """The minutes count from here."""
        self._since = time.monotonic()

    def attempt(self, work: Callable[[], Result]) -> Result:
        """What `work` returns.

        Raises:
            torch.OutOfMemoryError: a GPU ran out of memory, in whichever process and by whatever name.
            RunError:               what `work` raised, an error of the system in one line, or that another process failed.
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
        any_out, any_error = self.world.any((is_out, error is not None))
        if any_error:
            raise error or RunError("another process failed; its message tells why")
        if any_out:
            raise torch.OutOfMemoryError(why)
        return cast(Result, result)

    def point(self) -> None:
        """Save if it is time; after a signal save and raise StoppedError."""
        self.passed += 1
        is_due = self.minutes is not None and time.monotonic() - self._since > 60 * self.minutes
        is_stopping, is_due = self.world.any((self.interrupt.signal is not None, is_due))
        if not (is_stopping or is_due):
            return
        saved = self.save()
        self.has_saved()
        if is_stopping:
            self.stop(saved)

    def is_stopping(self) -> bool:
        """Whether a signal has come, to whichever process."""
        return self.world.any((self.interrupt.signal is not None,))[0]

    def stop(self, saved: str | None) -> NoReturn:
        """Raises StoppedError, which names what was saved."""
        numbers = torch.tensor([int(self.interrupt.signal or 0)])
        raise StoppedError(int(self.world.largest(numbers)[0]), saved)
