"""A GPU as the rest of the project needs it: which one, how much of its memory, and what it says when that is full."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dag.errors import RunError

_GIB = 2**30
# What is raised near the limit under another name than torch.OutOfMemoryError, in lower case. The CUDA driver, Triton's
# loader and Metal say the first; cuBLAS, cuSOLVER and cuDNN the next two; cuBLAS the fourth where it cannot make its
# workspace; the last is cuDNN after every algorithm failed, which it also says of a convolution that it has no algorithm
# for: hence callers pass the original sentence on.
_NAMES = (
    "out of memory",
    "_status_alloc_failed",
    "_allocation_failed",
    "cublas_status_not_initialized",
    "unable to find an engine",
)


def indexed(device: torch.device) -> torch.device:
    """The same device with its number.

    A single process of accelerate is on "cuda", which some functions of torch.cuda refuse.
    """
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def this_device() -> torch.device:
    """The GPU that PyTorch has chosen, or the CPU where there is none."""
    return indexed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def limit_memory(device: torch.device, gib: float) -> None:
    """Hold a GPU's allocator to so many GiB; on a CPU nothing happens."""
    if device.type == "cuda":
        device = indexed(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * _GIB / total), device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether fewer rows at a time may help: a GPU's memory is full, by whatever name the library calls it.

    Triton's OutOfResources is none: it means a multiprocessor's shared memory or registers, which a kernel needs
    whatever the number of rows.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error).lower() for name in _NAMES)


def first_line(error: BaseException) -> str:
    """The first line of what a library says; the others speak of its own settings."""
    return str(error).partition("\n")[0]


def free_memory() -> None:
    """Give back what nothing uses: first the tensors that only reference cycles hold, then the allocator's cache."""
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def out_of_memory_ends(what: str) -> Iterator[None]:
    """Raises RunError, `what` and the library's own first line, where a GPU's memory runs out inside."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"{what}: {first_line(error)}") from None
