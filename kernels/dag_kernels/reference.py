"""Every operation in plain PyTorch: the specification that a fused kernel has to match.

Owns the arithmetic only; which coefficient belongs to which step is `dag.schedule`'s business.

Shapes: B samples, then any latent dims (C, H, W for images).
"""

import math

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)

# Philox4x32-10 constants (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10
_MASK_32 = 0xFFFFFFFF


def guided(output_cond: Tensor, output_uncond: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance, o_u + g (o_c - o_u).

    Args:
        output_cond, output_uncond: network outputs of equal shape. The combination is made in their dtype:
            cast to float32 first, or g amplifies the rounding of half precision.
    """
    return output_uncond + guidance_scale * (output_cond - output_uncond)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density of N(mean, std^2 I) at x, **summed** over every dim but the first.

    Args:
        x, mean: (B, ...), float32 or float64.
        std:     0-d or broadcastable (B, 1, ..., 1), > 0.

    Returns:
        (B,) of the inputs' dtype.
    """
    D = x[0].numel()
    squares = ((x - mean) / std).square().flatten(1).sum(1)
    return -0.5 * squares - D * (std.log().reshape(-1) + HALF_LOG_2PI)


def _multiply_32(multiplier: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in 16-bit halves so that int64 never overflows."""
    low, high = words & 0xFFFF, words >> 16
    from_low, from_high = multiplier * low, multiplier * high
    middle = (from_low >> 16) + (from_high & 0xFFFF)
    product_high = (from_high >> 16) + (middle >> 16)
    product_low = ((middle & 0xFFFF) << 16) | (from_low & 0xFFFF)
    return product_high, product_low


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four 32-bit words of randomness per counter.

    Args:
        counter: four int64 tensors of broadcastable shapes, each holding values of 32 bits.
        key:     64-bit integer.

    Returns:
        Four int64 tensors of the broadcast shape, each in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key & _MASK_32, (key >> 32) & _MASK_32
    for _ in range(_PHILOX_ROUNDS):
        high0, low0 = _multiply_32(_PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_32(_PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _MASK_32, (k1 + _PHILOX_WEYL[1]) & _MASK_32
    return c0, c1, c2, c3


def _box_muller(word_radius: Tensor, word_angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals from two 32-bit words; u = (w + 1/2) 2^-32 is never 0, so the log is finite."""
    radius = torch.sqrt(-2.0 * torch.log((word_radius.double() + 0.5) * 2.0**-32))
    angle = (2.0 * math.pi * 2.0**-32) * (word_angle.double() + 0.5)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def standard_normal(seed: int, sample_id: Tensor, k: int, shape: tuple[int, ...]) -> Tensor:
    """Counter-based Gaussian noise: a pure function of (seed, sample, k), whatever the batch it is drawn in.

    Element i of a sample (flat index over `shape`) is lane i % 4 of Philox at counter
    (i // 4, k, sample_id low word, sample_id high word) under the 64-bit key `seed`.

    Args:
        seed:      64-bit integer.
        sample_id: (B,) int64, global over batches, processes and restarts.
        k:         0 <= k < 2^32; which draw of this sample.
        shape:     latent shape of one sample.

    Returns:
        (B, *shape) float32 on the device of `sample_id`.
    """
    D = math.prod(shape)
    block = torch.arange((D + 3) // 4, device=sample_id.device)[None, :]
    sample = sample_id[:, None]
    step = torch.full_like(block, k)
    words = philox_4x32((block, step, sample & _MASK_32, (sample >> 32) & _MASK_32), seed)
    lanes = (*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3]))
    return torch.stack(lanes, dim=-1).flatten(1)[:, :D].reshape(-1, *shape).float()
