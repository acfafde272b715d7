"""Log-probabilities and distances of Gaussian transitions, in one pass over the latents.

    o   = o_u + g (o_c - o_u)                    classifier-free guidance; without it o is the network's output
    r   = (x_next - a x_t - b o) / sigma         log P_F = -1/2 sum r^2 - D (log sigma + h),     h = log(2 pi) / 2
    q   = (x_t - rho x_next) / s                 log P_B = -1/2 sum q^2 - D (log s + h)
    kl  = 1/2 (b / sigma)^2 sum (o - o_ref)^2    KL to a policy of the same variance
    gap = sum (o - o_old)^2                      squared distance to the output at sampling time

Backward, from G_f = dL/dlog_pf, G_k = dL/dkl, G_g = dL/dgap of a sample:

    do  = G_f (b / sigma) r + G_k (b / sigma)^2 (o - o_ref) + 2 G_g (o - o_old),     do_c = g do,  do_u = (1 - g) do

Only the inputs are saved: backward reads them again and writes its gradient into one tensor with the layout of the network's
output (2B, ...). Bytes per element of a half-precision latent: forward 8 (x_t, x_next, o_u, o_c), 2 more for each of o_ref and
o_old; backward reads the same and writes 4. In forward one program sums a sample in a fixed order, so the result does not
depend on the batch. Arithmetic and sums are float32 for all dtypes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dag_kernels.launching import launch
from dag_kernels.layout import alike, empty_alike
from dag_kernels.reference import TransitionLogProbs

BLOCK = 2048
# Columns of the coefficient table: mean_x, mean_output, sigma, noising_x, noising_std, x0_x, x0_output.
COLUMNS = tl.constexpr(7)
NUM_WARPS = 8


@triton.jit
def combine(output, b, num_samples, stride, offsets, mask, guidance, GUIDED: tl.constexpr):
    """o of sample b: the guided combination of rows b (unconditional) and num_samples + b, or row b alone."""
    o = tl.load(output + b * stride + offsets, mask=mask, other=0.0).to(tl.float32)
    if GUIDED:
        conditional = tl.load(output + (num_samples + b) * stride + offsets, mask=mask, other=0.0).to(tl.float32)
        o = o + guidance * (conditional - o)
    return o


@triton.jit
def log_density(squares, std, D):
    """-1/2 sum of squares - D (log std + log(2 pi) / 2)."""
    return -0.5 * squares - D * (tl.log(std) + 0.9189385332046727)


@triton.jit
def transition_log_probs_fwd_kernel(
    x_t, x_next, output, reference, old, table, k, result,
    num_samples, D, stride_t, stride_next, stride_output, stride_reference, stride_old, guidance,
    GUIDED: tl.constexpr, HAS_REFERENCE: tl.constexpr, HAS_OLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    row = table + COLUMNS * tl.load(k + b)
    mean_x, mean_output, sigma = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    noising_x, noising_std = tl.load(row + 3), tl.load(row + 4)
    squares_f = tl.zeros((BLOCK,), tl.float32)
    squares_b = tl.zeros((BLOCK,), tl.float32)
    squares_reference = tl.zeros((BLOCK,), tl.float32)
    squares_old = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < D
        xt = tl.load(x_t + b * stride_t + offsets, mask=mask, other=0.0).to(tl.float32)
        xn = tl.load(x_next + b * stride_next + offsets, mask=mask, other=0.0).to(tl.float32)
        o = combine(output, b, num_samples, stride_output, offsets, mask, guidance, GUIDED)
        r = (xn - (mean_x * xt + mean_output * o)) / sigma
        q = (xt - noising_x * xn) / noising_std
        squares_f += r * r
        squares_b += q * q
        if HAS_REFERENCE:
            difference = o - tl.load(reference + b * stride_reference + offsets, mask=mask, other=0.0).to(tl.float32)
            squares_reference += difference * difference
        if HAS_OLD:
            difference = o - tl.load(old + b * stride_old + offsets, mask=mask, other=0.0).to(tl.float32)
            squares_old += difference * difference
    ratio = mean_output / sigma
    tl.store(result + b, log_density(tl.sum(squares_f), sigma, D))
    tl.store(result + num_samples + b, log_density(tl.sum(squares_b), noising_std, D))
    tl.store(result + 2 * num_samples + b, 0.5 * ratio * ratio * tl.sum(squares_reference))
    tl.store(result + 3 * num_samples + b, tl.sum(squares_old))


@triton.jit
def transition_log_probs_bwd_kernel(
    x_t, x_next, output, reference, old, table, k, upstream, gradient,
    num_samples, D, stride_t, stride_next, stride_output, stride_reference, stride_old, guidance,
    GUIDED: tl.constexpr, HAS_REFERENCE: tl.constexpr, HAS_OLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < D
    row = table + COLUMNS * tl.load(k + b)
    mean_x, mean_output, sigma = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    ratio = mean_output / sigma
    xt = tl.load(x_t + b * stride_t + offsets, mask=mask, other=0.0).to(tl.float32)
    xn = tl.load(x_next + b * stride_next + offsets, mask=mask, other=0.0).to(tl.float32)
    o = combine(output, b, num_samples, stride_output, offsets, mask, guidance, GUIDED)
    r = (xn - (mean_x * xt + mean_output * o)) / sigma
    do = tl.load(upstream + b) * ratio * r
    if HAS_REFERENCE:
        difference = o - tl.load(reference + b * stride_reference + offsets, mask=mask, other=0.0).to(tl.float32)
        do += tl.load(upstream + 2 * num_samples + b) * ratio * ratio * difference
    if HAS_OLD:
        difference = o - tl.load(old + b * stride_old + offsets, mask=mask, other=0.0).to(tl.float32)
        do += 2.0 * tl.load(upstream + 3 * num_samples + b) * difference
    if GUIDED:
        tl.store(gradient + b * D + offsets, (1.0 - guidance) * do, mask=mask)
        tl.store(gradient + (num_samples + b) * D + offsets, guidance * do, mask=mask)
    else:
        tl.store(gradient + b * D + offsets, do, mask=mask)


class _TransitionLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_t, x_next, output, table, k, guidance_scale, reference, old):
        tensors = (*alike(x_t, x_next, output, reference, old), table, k)
        ctx.save_for_backward(*tensors)
        ctx.guidance_scale = float(guidance_scale)
        result = torch.empty((4, len(x_t)), dtype=torch.float32, device=x_t.device)
        pointers, sizes, options = _launch(tensors, ctx.guidance_scale)
        launch(transition_log_probs_fwd_kernel, (len(x_t),), result, *pointers, result, *sizes, **options)
        return result

    @staticmethod
    def backward(ctx, upstream):
        x_t, _, output, *_ = ctx.saved_tensors
        gradient = empty_alike(output)
        pointers, sizes, options = _launch(ctx.saved_tensors, ctx.guidance_scale)
        grid = (len(x_t), triton.cdiv(x_t[0].numel(), BLOCK))
        launch(
            transition_log_probs_bwd_kernel,
            grid,
            gradient,
            *pointers,
            upstream.contiguous(),
            gradient,
            *sizes,
            **options,
        )
        return None, None, gradient, None, None, None, None, None


def _launch(
    tensors: tuple[Tensor | None, ...], guidance_scale: float
) -> tuple[list[Tensor], list[int | float], dict[str, int | bool]]:
    """The arguments that both kernels share: (pointers, sizes, compile-time options)."""
    x_t, x_next, output, reference, old, table, k = tensors
    assert x_t is not None and x_next is not None and output is not None and table is not None and k is not None
    # The kernels never read an absent tensor, so any pointer may stand for it.
    latents = [x_t if tensor is None else tensor for tensor in (x_t, x_next, output, reference, old)]
    sizes = [len(x_t), x_t[0].numel(), *(latent.stride(0) for latent in latents), guidance_scale]
    options = {
        "GUIDED": len(output) == 2 * len(x_t),
        "HAS_REFERENCE": reference is not None,
        "HAS_OLD": old is not None,
        "BLOCK": BLOCK,
        "num_warps": NUM_WARPS,
    }
    return [*latents, table, k], sizes, options


def transition_log_probs(
    x_t: Tensor,
    x_next: Tensor,
    output: Tensor,
    table: Tensor,
    k: Tensor,
    guidance_scale: float = 1.0,
    output_ref: Tensor | None = None,
    output_old: Tensor | None = None,
) -> TransitionLogProbs:
    """The Triton form of `dag_kernels.reference.transition_log_probs`: same arguments, same results."""
    result = _TransitionLogProbs.apply(x_t, x_next, output, table, k, guidance_scale, output_ref, output_old)
    log_pf, log_pb, kl, gap = result.unbind()
    return TransitionLogProbs(
        log_pf, log_pb.detach(), kl if output_ref is not None else None, gap if output_old is not None else None
    )
