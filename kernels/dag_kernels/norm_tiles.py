"""Group normalisation of a large map in tiles, three launches forward and three backward; formulas in `group_norm.py`.

A tile is ROWS places by CHANNELS channels, one program each, which reads whole lines of memory. A launch writes two sums of each
channel over a tile, the next combines them for each group, the third writes the result.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dag_kernels.launching import launch
from dag_kernels.norm_groups import slope

ROWS, CHANNELS = 64, 64
# Entries of the table of tiles that one step of a group's sum reads.
BLOCK = 1024
NUM_WARPS = 8


@triton.jit
def places(num_rows, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """(sample, first row, channels, offsets (ROWS, CHANNELS) into the map, mask) of this program's tile."""
    b = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    offsets = (b * num_rows + rows)[:, None] * C + channels[None, :]
    return b, first, channels, offsets, (rows < num_rows)[:, None] & (channels < C)[None, :]


@triton.jit
def normalise(x, weight, bias, statistics, b, channels, C, groups):
    """(xhat, z, weight, rstd) of a tile; statistics holds the mean and the rstd of each group of each sample."""
    inside = channels < C
    group = statistics + 2 * (b * groups + channels // (C // groups))
    mean, rstd = tl.load(group, mask=inside, other=0.0), tl.load(group + 1, mask=inside, other=0.0)
    w = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    xhat = (x - mean[None, :]) * rstd[None, :]
    return xhat, w[None, :] * xhat + shift[None, :], w[None, :], rstd[None, :]


@triton.jit
def tile_moments_kernel(
    x, table, num_rows, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """The mean of each channel of a tile, and the sum of its squared distances to it."""
    b, first, channels, offsets, mask = places(num_rows, C, ROWS, CHANNELS)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / tl.minimum(num_rows - first, ROWS)
    distance = tl.where(mask, value - mean[None, :], 0.0)
    entry = table + 2 * (b * tl.num_programs(0) + tl.program_id(0)) * C + channels
    tl.store(entry, mean, mask=channels < C)
    tl.store(entry + C, tl.sum(distance * distance, 0), mask=channels < C)


@triton.jit
def entries(table, start, num_rows, C, groups, tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(first numbers, second numbers, places that they stand for) of BLOCK entries of this program's group, from `start` on."""
    b, g = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    size = C // groups
    index = start + tl.arange(0, BLOCK)
    inside = index < tiles * size
    tile = index // size
    entry = table + 2 * (b * tiles + tile) * C + g * size + index % size
    count = tl.where(inside, tl.minimum(num_rows - tile * ROWS, ROWS), 0).to(tl.float32)
    return tl.load(entry, mask=inside, other=0.0), tl.load(entry + C, mask=inside, other=0.0), count


@triton.jit
def tile_statistics_kernel(
    table, statistics, num_rows, C, groups, tiles, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The mean and the rstd of a group, from the means and squares of its channels in all tiles."""
    size = C // groups
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tiles * size, BLOCK):
        means, _, count = entries(table, start, num_rows, C, groups, tiles, ROWS, BLOCK)
        total += count * means
    mean = tl.sum(total) / (num_rows * size)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tiles * size, BLOCK):
        means, within, count = entries(table, start, num_rows, C, groups, tiles, ROWS, BLOCK)
        squares += within + count * (means - mean) * (means - mean)
    variance = tl.sum(squares) / (num_rows * size)
    tl.store(statistics + 2 * tl.program_id(0), mean)
    tl.store(statistics + 2 * tl.program_id(0) + 1, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def tile_fwd_kernel(
    x, weight, bias, statistics, y, num_rows, C, groups,
    HAS_SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    b, _, channels, offsets, mask = places(num_rows, C, ROWS, CHANNELS)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    _, z, _, _ = normalise(value, weight, bias, statistics, b, channels, C, groups)
    if HAS_SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + offsets, z, mask=mask)


@triton.jit
def tile_slopes_kernel(
    x, weight, bias, statistics, dy, table, num_rows, C, groups,
    HAS_SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The sums of g and of g xhat over the places of a tile, for each of its channels."""
    b, _, channels, offsets, mask = places(num_rows, C, ROWS, CHANNELS)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    upstream = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
    xhat, z, w, _ = normalise(value, weight, bias, statistics, b, channels, C, groups)
    g = tl.where(mask, slope(z, upstream, w, HAS_SILU), 0.0)
    entry = table + 2 * (b * tl.num_programs(0) + tl.program_id(0)) * C + channels
    tl.store(entry, tl.sum(g, 0), mask=channels < C)
    tl.store(entry + C, tl.sum(g * xhat, 0), mask=channels < C)


@triton.jit
def tile_means_kernel(
    table, means, num_rows, C, groups, tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """mean(g) and mean(g xhat) of a group, from the sums over its channels in all tiles."""
    size = C // groups
    total_g, total_product = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tiles * size, BLOCK):
        sum_g, sum_product, _ = entries(table, start, num_rows, C, groups, tiles, ROWS, BLOCK)
        total_g += sum_g
        total_product += sum_product
    tl.store(means + 2 * tl.program_id(0), tl.sum(total_g) / (num_rows * size))
    tl.store(means + 2 * tl.program_id(0) + 1, tl.sum(total_product) / (num_rows * size))


@triton.jit
def tile_bwd_kernel(
    x, weight, bias, statistics, dy, means, dx, num_rows, C, groups,
    HAS_SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    b, _, channels, offsets, mask = places(num_rows, C, ROWS, CHANNELS)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    upstream = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
    xhat, z, w, rstd = normalise(value, weight, bias, statistics, b, channels, C, groups)
    group = means + 2 * (b * groups + channels // (C // groups))
    mean_g = tl.load(group, mask=channels < C, other=0.0)[None, :]
    mean_product = tl.load(group + 1, mask=channels < C, other=0.0)[None, :]
    tl.store(dx + offsets, rstd * (slope(z, upstream, w, HAS_SILU) - mean_g - xhat * mean_product), mask=mask)


class _Tiles:
    """The tiles of a map (B, C, H, W): their table of two numbers a channel, the grid, and the arguments of the launches."""

    def __init__(self, x: Tensor, groups: int) -> None:
        B, C, H, W = x.shape
        self.count = triton.cdiv(H * W, ROWS)
        self.table = torch.empty((B, self.count, 2, C), dtype=torch.float32, device=x.device)
        self.grid, self.grid_of_groups = (self.count, triton.cdiv(C, CHANNELS), B), (B * groups,)
        self.sizes = (H * W, C, groups)
        self.tile: dict[str, Any] = {"ROWS": ROWS, "CHANNELS": CHANNELS, "num_warps": NUM_WARPS}
        self.sum: dict[str, Any] = {"ROWS": ROWS, "BLOCK": BLOCK, "num_warps": 4}


def forward(x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, y: Tensor, eps: float, has_silu: bool) -> None:
    tiles = _Tiles(x, statistics.shape[1])
    table, sizes = tiles.table, tiles.sizes
    launch(tile_moments_kernel, tiles.grid, table, x, table, *sizes[:2], **tiles.tile)
    launch(
        tile_statistics_kernel, tiles.grid_of_groups, statistics,
        table, statistics, *sizes, tiles.count, eps, **tiles.sum,
    )  # fmt: skip
    options = {"HAS_SILU": has_silu, **tiles.tile}
    launch(tile_fwd_kernel, tiles.grid, y, x, weight, bias, statistics, y, *sizes, **options)


def backward(inputs: tuple[Tensor, ...], dx: Tensor, has_silu: bool) -> None:
    tiles, means = _Tiles(dx, inputs[3].shape[1]), torch.empty_like(inputs[3])
    table, sizes, options = tiles.table, tiles.sizes, {"HAS_SILU": has_silu, **tiles.tile}
    launch(tile_slopes_kernel, tiles.grid, table, *inputs, table, *sizes, **options)
    launch(
        tile_means_kernel, tiles.grid_of_groups, means, table, means, *sizes, tiles.count, **tiles.sum
    )  # fmt: skip
    launch(tile_bwd_kernel, tiles.grid, dx, *inputs, means, dx, *sizes, **options)
