"""SIGTERM and Ctrl-C: remembered, so that the run can finish what it is at, save, and end."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# A launcher passes on the Ctrl-C that the terminal has sent to all of its processes: that one is not a second.
_SAME_KEY_SECONDS = 1.0


class Interrupt:
    """The first signal that came, or None."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator["Interrupt"]:
        """Signals are remembered inside. A second Ctrl-C ends the process at once."""
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
            # Not print: the signal may have come in the middle of one.
            # Nor is it sure that anybody still listens: the same Ctrl-C has ended a `tee`.
            with suppress(OSError):
                os.write(2, f"\n{self.signal.name}: saving after this step; Ctrl-C again ends at once\n".encode())
        elif number == signal.SIGINT and now - self._since > _SAME_KEY_SECONDS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
