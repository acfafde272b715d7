"""The GPU: which one a process uses, a limit on its memory, and recognising the errors of a full one."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dag.errors import RunError

_GIB = 2**30
# Parts of messages, in lower case, by which libraries report a full GPU in other errors than torch.OutOfMemoryError: the first
# by the CUDA driver, Triton's loader and Metal; the next two by cuBLAS, cuSOLVER and cuDNN; the fourth by cuBLAS if it cannot
# allocate its workspace; the last by cuDNN after every algorithm failed. cuDNN also says that of a convolution for which it has
# no algorithm, hence callers pass the original message on.
_MESSAGES = (
    "out of memory",
    "_status_alloc_failed",
    "_allocation_failed",
    "cublas_status_not_initialized",
    "unable to find an engine",
)


def indexed(device: torch.device) -> torch.device:
    """The device with its index: "cuda" becomes "cuda:0", or the index of the current GPU.

    accelerate gives a single process "cuda", which some functions of torch.cuda refuse.
    """
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def this_device() -> torch.device:
    """The GPU that PyTorch has chosen, or the CPU where there is none."""
    return indexed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def limit_memory(device: torch.device, gib: float) -> None:
    """Limit PyTorch's allocator on a GPU to `gib` GiB; on a CPU this does nothing."""
    if device.type == "cuda":
        device = indexed(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * _GIB / total), device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a GPU's memory is full, so that fewer rows at a time may help.

    Triton's OutOfResources does not count: it is about a multiprocessor's shared memory or registers, of which a kernel
    needs as many for fewer rows.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in _MESSAGES)


def first_line(error: BaseException) -> str:
    """The first line of a library's message; the others are about its own settings."""
    return str(error).partition("\n")[0]


def free_memory() -> None:
    """Free unused GPU memory: first tensors in unreachable reference cycles, then the allocator's cache."""
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def out_of_memory_ends(what: str) -> Iterator[None]:
    """A context in which a full GPU raises RunError, with `what` and the first line of the library's message."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"{what}: {first_line(error)}") from None
