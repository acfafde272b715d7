"""Starting a kernel."""

from typing import Any

from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], result: Tensor, *arguments: Any, **options: Any) -> None:
    """Run a Triton kernel; on the meta device, where nothing is computed, one fill of its result stands for it.

    So a run on the meta device has as many operators as a run on a GPU has launches.

    Args:
        result: what the kernel writes; one of its arguments.
    """
    if result.is_meta:
        result.zero_()
    else:
        kernel[grid](*arguments, **options)
