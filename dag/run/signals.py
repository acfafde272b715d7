"""SIGTERM and Ctrl-C. They are remembered, so that the run can end its micro-batch, save, and stop."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# The terminal sends a Ctrl-C to all processes, and a launcher may pass the same one on: within this time it is not a second.
_SAME_KEY_SECONDS = 1.0


class Interrupt:
    """Remembers the first signal that came, as `signal`; None before one came."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator["Interrupt"]:
        """A context in which signals are remembered. A second Ctrl-C ends the process at once."""
        before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), now
            # Not print: the signal may have interrupted one, and print is not reentrant. Errors are ignored, since the reader
            # of stderr may be gone: the same Ctrl-C ends a `tee`.
            with suppress(OSError):
                os.write(2, f"\n{self.signal.name}: saving after this step; Ctrl-C again ends at once\n".encode())
        elif number == signal.SIGINT and now - self._since > _SAME_KEY_SECONDS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
