"""Seconds and peak memory of an epoch, phase by phase, for metrics.jsonl."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from dag.run.gpu import GIB

PHASES = ("sample", "reward", "update", "evaluation")
# Timed intervals that are kept before the older half of them is added up.
_MOST_MARKS = 4096


class Meter(Protocol):
    """Measures peak memory since a reset."""

    def reset(self) -> None: ...

    def peak(self) -> int:
        """Largest number of bytes in use since the reset."""
        ...

    def peak_held(self) -> int:
        """Largest number of bytes since the reset, including those that the allocator reserves and does not use."""
        ...


class CudaMeter:
    """The memory of PyTorch's allocator on a GPU. It counts on the CPU, so reading it does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def peak_held(self) -> int:
        return torch.cuda.max_memory_reserved(self.device)


class ResidentMeter:
    """The resident memory of this process as Linux counts it, with Python and every library."""

    _RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def reset(self) -> None:
        self._RESET.write_text("5")

    def peak(self) -> int:
        line = next(line for line in self._STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    def peak_held(self) -> int:
        return self.peak()


def meter_of(device: torch.device) -> Meter | None:
    """The meter for a device; None where peak memory cannot be measured (a CPU without Linux's /proc)."""
    if device.type == "cuda":
        return CudaMeter(device)
    try:
        meter = ResidentMeter()
        meter.reset()
        meter.peak()
    except (OSError, StopIteration):
        return None
    return meter


class Clock(Protocol):
    """Marks moments, and measures the seconds between two of them."""

    def mark(self) -> Any: ...

    def seconds(self, start: Any, end: Any) -> float: ...


class CpuClock:
    """Moments on the CPU, where work is done when the call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """Moments in the GPU's current stream. `mark` does not wait for the GPU; `seconds` does."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000


class PhaseMeter:
    """Seconds and peak memory of each phase of an epoch; a phase may be entered many times.

    Args:
        device: the policy's device.

    Attributes:
        peaks:  peak bytes of each phase of the epoch.
        in_use: peak bytes of the epoch.
        held:   peak bytes of the run, including those that the allocator reserves and does not use.
    """

    def __init__(self, device: torch.device) -> None:
        self.meter = meter_of(device)
        self.clock: Clock = CudaClock() if device.type == "cuda" else CpuClock()
        self._marks: list[tuple[str, Any, Any]] = []
        self._seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.in_use, self.held = 0, 0
        if self.meter is not None:
            self.meter.reset()  # what ran in this process before does not count
        self.start_epoch()

    def start_epoch(self) -> None:
        """Clear the numbers of the last epoch. The run's peak, `held`, stays."""
        self.read()
        self._marks = []
        self._seconds, self.peaks, self.in_use = dict.fromkeys(PHASES, 0.0), {}, 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context whose time and peak memory count for the phase `name`."""
        with self.peak(name), self.timed(name):
            yield

    @contextmanager
    def peak(self, name: str) -> Iterator[None]:
        """A context whose peak memory counts for the phase `name`."""
        self.read()
        try:
            yield
        finally:
            self.peaks[name] = max(self.peaks.get(name, 0), self.read())

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """A context whose time counts for the phase `name`. It does not wait for a GPU."""
        start = self.clock.mark()
        try:
            yield
        finally:
            self._marks.append((name, start, self.clock.mark()))
            if len(self._marks) >= _MOST_MARKS:
                self._settle(_MOST_MARKS // 2)  # old enough that the GPU has finished them

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase of the epoch so far. Reading them waits for a GPU."""
        self._settle()
        return self._seconds

    def _settle(self, count: int | None = None) -> None:
        """Add up the first `count` marks, or all."""
        marks, self._marks = self._marks[:count], self._marks[len(self._marks) if count is None else count :]
        for name, start, end in marks:
            self._seconds[name] += self.clock.seconds(start, end)

    def read(self) -> int:
        """Peak bytes since the last call; also raises the epoch's peak."""
        if self.meter is None:
            return 0
        peak = self.meter.peak()
        self.in_use, self.held = max(self.in_use, peak), max(self.held, self.meter.peak_held())
        self.meter.reset()
        return peak

    def row(self) -> dict[str, Any]:
        """Seconds and peak GiB of each phase, and the run's peak GiB. GiB are None for a phase that did not run."""
        seconds = {f"seconds_{name}": round(seconds, 3) for name, seconds in self.seconds.items()}
        peaks = {f"memory_gib_{name}": _gib(self.peaks.get(name, 0)) for name in PHASES}
        return {**seconds, **peaks, "peak_memory_gib": _gib(self.held)}


def _gib(size: int) -> float | None:
    """Bytes in GiB; None for 0, which means that nothing was measured."""
    return round(size / GIB, 4) if size else None
