"""Group normalisation with a program for each group, one launch forward and one backward; formulas in `group_norm.py`.

A program reads its group three times, after the first time from the cache.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from dag_kernels.launching import launch

# Elements of the largest group that one program normalises: 10 channels of 80 x 80 places, or 40 of 40 x 40.
LARGEST = 1 << 16
# Elements that one step of its loop reads.
STEP = 4096
NUM_WARPS = 8


@triton.jit
def slope(z, dy, w, HAS_SILU: tl.constexpr):
    """g = w dy/dz dL/dy."""
    if HAS_SILU:
        s = tl.sigmoid(z)
        dy = dy * s * (1.0 + z * (1.0 - s))
    return w * dy


@triton.jit
def step(start, num_rows, C, groups, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(offsets (ROWS, WIDTH) into the map, mask) of the rows of this program's group from `start` on."""
    b, size = (tl.program_id(0) // groups).to(tl.int64), C // groups
    rows, column = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    channels = tl.program_id(0) % groups * size + column
    offsets = (b * num_rows + rows)[:, None] * C + channels[None, :]
    return offsets, (rows < num_rows)[:, None] & (column < size)[None, :]


@triton.jit
def scale_and_shift(weight, bias, C, groups, WIDTH: tl.constexpr):
    """Weight and bias (1, WIDTH) of this program's group."""
    size, column = C // groups, tl.arange(0, WIDTH)
    channels, inside = tl.program_id(0) % groups * size + column, column < size
    w = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    return w[None, :], tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def group_norm_fwd_kernel(
    x, weight, bias, statistics, y, num_rows, C, groups, eps,
    HAS_SILU: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    count = num_rows * (C // groups)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, num_rows, ROWS):
        offsets, mask = step(start, num_rows, C, groups, ROWS, WIDTH)
        total += tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(total, 1), 0) / count
    squares = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, num_rows, ROWS):
        offsets, mask = step(start, num_rows, C, groups, ROWS, WIDTH)
        distance = tl.where(mask, tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) - mean, 0.0)
        squares += distance * distance
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(squares, 1), 0) / count + eps)
    tl.store(statistics + 2 * tl.program_id(0), mean)
    tl.store(statistics + 2 * tl.program_id(0) + 1, rstd)
    w, shift = scale_and_shift(weight, bias, C, groups, WIDTH)
    for start in range(0, num_rows, ROWS):
        offsets, mask = step(start, num_rows, C, groups, ROWS, WIDTH)
        z = w * ((tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) - mean) * rstd) + shift
        if HAS_SILU:
            z = z * tl.sigmoid(z)
        tl.store(y + offsets, z, mask=mask)


@triton.jit
def group_norm_bwd_kernel(
    x, weight, bias, statistics, dy, dx, num_rows, C, groups,
    HAS_SILU: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    count = num_rows * (C // groups)
    mean, rstd = tl.load(statistics + 2 * tl.program_id(0)), tl.load(statistics + 2 * tl.program_id(0) + 1)
    w, shift = scale_and_shift(weight, bias, C, groups, WIDTH)
    total_g, total_product = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, num_rows, ROWS):
        offsets, mask = step(start, num_rows, C, groups, ROWS, WIDTH)
        xhat = (tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        upstream = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        g = slope(w * xhat + shift, upstream, w, HAS_SILU)
        total_g += g
        total_product += g * xhat
    mean_g, mean_product = tl.sum(tl.sum(total_g, 1), 0) / count, tl.sum(tl.sum(total_product, 1), 0) / count
    for start in range(0, num_rows, ROWS):
        offsets, mask = step(start, num_rows, C, groups, ROWS, WIDTH)
        xhat = (tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        upstream = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        g = slope(w * xhat + shift, upstream, w, HAS_SILU)
        tl.store(dx + offsets, rstd * (g - mean_g - xhat * mean_product), mask=mask)


def _launch_options(x: Tensor, groups: int, has_silu: bool) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """(sizes, compile-time options) of a launch with a program for each group."""
    width = triton.next_power_of_2(x.shape[1] // groups)
    options = {"HAS_SILU": has_silu, "ROWS": max(1, STEP // width), "WIDTH": width, "num_warps": NUM_WARPS}
    return (x.shape[2] * x.shape[3], x.shape[1], groups), options


def forward(x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, y: Tensor, eps: float, has_silu: bool) -> None:
    sizes, options = _launch_options(x, statistics.shape[1], has_silu)
    grid = (statistics.shape[0] * statistics.shape[1],)
    launch(group_norm_fwd_kernel, grid, y, x, weight, bias, statistics, y, *sizes, eps, **options)


def backward(inputs: tuple[Tensor, ...], dx: Tensor, has_silu: bool) -> None:
    statistics = inputs[3]
    sizes, options = _launch_options(dx, statistics.shape[1], has_silu)
    grid = (statistics.shape[0] * statistics.shape[1],)
    launch(group_norm_bwd_kernel, grid, dx, *inputs, dx, *sizes, **options)
