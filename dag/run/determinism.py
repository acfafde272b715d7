"""The switches of `deterministic: true`, with which a GPU computes the same bits every time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# The larger of the two settings that cuBLAS calls reproducible: 24 MiB.
_REPRODUCIBLE = ":4096:8"


def reserve_workspace() -> None:
    """Make cuBLAS reproducible for the rest of the process; see `deterministic` for when to call it."""
    os.environ.setdefault(_WORKSPACE, _REPRODUCIBLE)


@contextmanager
def deterministic(is_on: bool) -> Iterator[None]:
    """A context in which, if `is_on`, PyTorch uses deterministic algorithms only, and raises where it has none.

    Enter it, or call `reserve_workspace`, before the process's first matrix product on a GPU: cuBLAS reads its setting once.

    In this mode the backward passes of flash attention and of memory-efficient attention accumulate in a fixed order. cuDNN's
    attention has no such mode and is switched off.
    """
    if not is_on:
        yield
        return
    workspace, fill = os.environ.get(_WORKSPACE), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn, has_cudnn_attention = torch.backends.cudnn.benchmark, torch.backends.cuda.cudnn_sdp_enabled()
    try:
        os.environ[_WORKSPACE] = _REPRODUCIBLE
        torch.use_deterministic_algorithms(True)
        # This mode fills new memory, in case something reads it before writing to it. Nothing here does, so skip the work.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.enable_cudnn_sdp(False)
        yield
    finally:
        os.environ.pop(_WORKSPACE)
        if workspace is not None:
            os.environ[_WORKSPACE] = workspace
        torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = cudnn
        torch.backends.cuda.enable_cudnn_sdp(has_cudnn_attention)
