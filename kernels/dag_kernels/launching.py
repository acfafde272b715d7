"""Launches a kernel, or its stand-in on the meta device."""

from typing import Any

from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], result: Tensor, *arguments: Any, **options: Any) -> None:
    """Run a Triton kernel. On the meta device nothing is computed: one fill of the result stands for the launch.

    So a run on the meta device has as many operators as a run on a GPU has launches.

    Args:
        result: the tensor that the kernel writes, which is also among its arguments.
    """
    if result.is_meta:
        result.zero_()
    else:
        kernel[grid](*arguments, **options)
