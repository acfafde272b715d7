"""What an epoch of a recipe's loop spends its time on: the kernels of a GPU, or the operators of a CPU."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dag.costs.kernel_names import short
from dag.costs.train_step import Row, epoch_of, timed_epoch, trainer_of
from dag.errors import RunError
from dag.recipe import Recipe

_TOP = 20


def rows(recipe: Recipe, device: torch.device) -> Iterator[Row]:
    """Yield the twenty kernels (on a CPU: operators) that took most of an epoch, then the share in which the GPU was idle.

    One epoch warms up, one is timed, one is recorded. Recording slows the CPU down, so the idle share compares the GPU's busy
    time with the epoch that was timed.

    Raises:
        RunError: the profiler recorded no kernel on a GPU.
    """
    is_gpu = device.type == "cuda"
    with trainer_of(recipe, device) as trainer:
        epoch = epoch_of("profile", recipe, trainer)
        timed_epoch(epoch, trainer)
        seconds = timed_epoch(epoch, trainer)["total"]
        with profile(activities=[ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU]) as recorded:
            timed_epoch(epoch, trainer)
    start = time.perf_counter()
    if is_gpu:
        kernels = [event for event in recorded.events() or () if _is_kernel(event)]
        if not kernels:
            raise RunError("the profiler saw no kernel: may this user read the GPU's counters?")
        yield from _shown(_top((event.name, _span(event)) for event in kernels))
        yield from _shown([_idle(busy_us([_span(event) for event in kernels]), seconds)])
    else:
        operators = recorded.key_averages()
        yield from _shown(_top_of_cpu(operators))
        yield from _shown([{"label": "GPU idle", "error": "there is no GPU"}])
    print(f"an epoch took {seconds:.2f} s, reading its profile {time.perf_counter() - start:.1f} s", flush=True)


def _shown(found: Iterable[Row]) -> Iterator[Row]:
    """Print each row and pass it on."""
    for row in found:
        if "error" in row:
            print(f"{row['label']}: not measured, {row['error']}", flush=True)
        else:
            print(f"{row['percent']:5.1f} %  {row['ms']:9.2f} ms  {row['calls']:6} x  {row['label']}", flush=True)
        yield row


def _is_kernel(event: Any) -> bool:
    """Whether an event is work of the GPU. Annotations of phases have the device type CUDA too, but are no work."""
    return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


def _span(event: Any) -> tuple[float, float]:
    """The span (start, end) of an event in microseconds."""
    return event.time_range.start, event.time_range.end


def _top(spans: Iterable[tuple[str, tuple[float, float]]]) -> list[Row]:
    """Rows of the kernels with the longest total time, from (name, (start, end)) of each call; equal short names are one row."""
    took, calls = defaultdict[str, float](float), defaultdict[str, int](int)
    for name, (start, end) in spans:
        took[short(name)] += end - start
        calls[short(name)] += 1
    return _largest([(name, calls[name], us) for name, us in took.items()])


def _top_of_cpu(operators: Iterable[Any]) -> list[Row]:
    return _largest([(operator.key, operator.count, operator.self_cpu_time_total) for operator in operators])


def _largest(found: list[tuple[str, int, float]]) -> list[Row]:
    """Rows of the largest (name, calls, microseconds); `percent` is relative to the sum over all."""
    total = sum(us for *_, us in found) or 1.0
    largest = sorted(found, key=lambda one: one[2], reverse=True)[:_TOP]
    return [
        {
            "label": name,
            "calls": calls,
            "ms": round(us / 1e3, 3),
            "percent": round(100 * us / total, 1),
        }
        for name, calls, us in largest
    ]


def busy_us(spans: list[tuple[float, float]]) -> float:
    """Microseconds in which at least one of the spans runs."""
    busy, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def _idle(busy: float, seconds: float) -> Row:
    """The row of the GPU's idle time in an epoch of so many seconds, of which it was busy for `busy` microseconds."""
    idle = max(0.0, 1e3 * seconds - busy / 1e3)
    return {"label": "GPU idle", "calls": 1, "ms": round(idle, 3), "percent": round(idle / seconds / 10, 1)}
