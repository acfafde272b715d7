"""Time budgets for training: a network trains for so many minutes, on a slow machine with fewer steps."""

import time
from collections.abc import Iterator


class Clock:
    """Measures the progress of a training by time.

    Args:
        speed: divides every budget; above 1 for trials.
    """

    def __init__(self, speed: float = 1.0) -> None:
        self.speed = speed

    def ticks(self, minutes: float) -> Iterator[float]:
        """Yield the share of the budget that has passed, in [0, 1), until the budget is used up."""
        start, seconds = time.monotonic(), 60 * minutes / self.speed
        while (elapsed := time.monotonic() - start) < seconds:
            yield elapsed / seconds
