"""One step of the sampler in one pass: noise, next state, clean prediction, both log-probs.

    z      = standard normal of (seed, sample, k), Philox4x32-10 and Box-Muller as in `dag_kernels.reference`
    x_next = round(a x_t + b o + sigma z),   x0_hat = c x_t + d o,   log P_F and log P_B at the rounded x_next

Bytes per element with a half-precision chain: 6 read (x_t, o_u, o_c), 6 written (x_next, x0_hat in float32). The noise is
made in registers: it is neither read nor written, and does not depend on the batch. Uniform numbers are float32 here and
float64 in the reference, so z differs by less than 2e-6.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dag_kernels.launching import launch
from dag_kernels.layout import alike
from dag_kernels.reference import SampledStep
from dag_kernels.transition import BLOCK, COLUMNS, NUM_WARPS, combine, log_density


@triton.jit
def minus_log(word):
    """-log u of u = (word + 1/2) 2^-32, accurate to float32 rounding for u near 0 and near 1."""
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # Near u = 1 float32 has no digits left for log u, so there a series in v = 1 - u, which is exact, replaces it.
    v = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = v * (1.0 + v * (0.5 + v * (0.3333333333 + v * (0.25 + v * 0.2))))
    return tl.where(v < 0.03, series, -tl.log(u))


@triton.jit
def box_muller(word_radius, word_angle):
    """Two standard normals from two 32-bit words."""
    radius = tl.sqrt(2.0 * minus_log(word_radius))
    angle = (word_angle.to(tl.float32) + 0.5) * 1.4629180792671596e-09  # 2 pi 2^-32
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def normals(seed, sample, k, first, BLOCK: tl.constexpr):
    """The noise (BLOCK,) of the elements first .. first + BLOCK - 1 of a sample; `first` is a multiple of 4."""
    counter = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros((BLOCK // 4,), tl.uint32)
    sample_low = zero + (sample & 0xFFFFFFFF).to(tl.uint32)
    sample_high = zero + ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    step = (zero + k).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter, step, sample_low, sample_high)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


# Triton would compile the kernel again for a seed of 1 or a step divisible by 16, which makes nothing faster.
@triton.jit(do_not_specialize=["seed", "k"])
def sampling_step_fwd_kernel(
    x_t, output, table, sample_id, x_next, x0_hat, result,
    seed, k, num_samples, D, stride_t, stride_output, guidance,
    GUIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    row = table + COLUMNS * k
    mean_x, mean_output, sigma = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    noising_x, noising_std = tl.load(row + 3), tl.load(row + 4)
    x0_x, x0_output = tl.load(row + 5), tl.load(row + 6)
    sample = tl.load(sample_id + b)
    squares_f = tl.zeros((BLOCK,), tl.float32)
    squares_b = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < D
        xt = tl.load(x_t + b * stride_t + offsets, mask=mask, other=0.0).to(tl.float32)
        o = combine(output, b, num_samples, stride_output, offsets, mask, guidance, GUIDED)
        mean = mean_x * xt + mean_output * o
        exact = mean + sigma * normals(seed, sample, k, start, BLOCK)
        # The rounded value is the next state, so the log-probabilities are taken there.
        rounded = exact.to(x_next.dtype.element_ty)
        tl.store(x_next + b * D + offsets, rounded, mask=mask)
        tl.store(x0_hat + b * D + offsets, x0_x * xt + x0_output * o, mask=mask)
        xn = rounded.to(tl.float32)
        r = tl.where(mask, (xn - mean) / sigma, 0.0)
        q = tl.where(mask, (xt - noising_x * xn) / noising_std, 0.0)
        squares_f += r * r
        squares_b += q * q
    tl.store(result + b, log_density(tl.sum(squares_f), sigma, D))
    tl.store(result + num_samples + b, log_density(tl.sum(squares_b), noising_std, D))


def sampling_step(
    x_t: Tensor,
    output: Tensor,
    table: Tensor,
    k: int,
    seed: int,
    sample_id: Tensor,
    guidance_scale: float = 1.0,
    chain_dtype: torch.dtype = torch.float32,
) -> SampledStep:
    """The Triton form of `dag_kernels.reference.sampling_step`: same arguments, same results."""
    # The noise of an element depends on its flat index over (C, H, W), so the kernel needs contiguous samples.
    x_t, output = alike(x_t.contiguous(), output)
    x_next = torch.empty(x_t.shape, dtype=chain_dtype, device=x_t.device)
    x0_hat = torch.empty(x_t.shape, dtype=torch.float32, device=x_t.device)
    result = torch.empty((2, len(x_t)), dtype=torch.float32, device=x_t.device)
    # Triton passes integers as signed ones: the same 64 bits, read as a signed integer.
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    launch(
        sampling_step_fwd_kernel, (len(x_t),), result,
        x_t, output, table, sample_id, x_next, x0_hat, result,
        signed, k, len(x_t), x_t[0].numel(), x_t.stride(0), output.stride(0), float(guidance_scale),
        GUIDED=len(output) == 2 * len(x_t), BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return SampledStep(x_next, x0_hat, result[0], result[1])
