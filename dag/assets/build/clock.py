"""Time budgets for training: the same script serves a laptop and a fast machine."""

import time
from collections.abc import Iterator


class Clock:
    """Yields progress in [0, 1) until the minutes are over; `speed` > 1 shortens every budget, for trials."""

    def __init__(self, speed: float = 1.0) -> None:
        self.speed = speed

    def ticks(self, minutes: float) -> Iterator[float]:
        start, seconds = time.monotonic(), 60 * minutes / self.speed
        while (elapsed := time.monotonic() - start) < seconds:
            yield elapsed / seconds
