"""Every operation in plain PyTorch: the specification that a fused kernel has to match.

Owns the arithmetic only; `dag.chain.schedule` computes the coefficients of each step.

Shapes: B samples, then any latent dims (C, H, W for images).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)

# Philox4x32-10 constants (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10
_MASK_32 = 0xFFFFFFFF


def guided(output_cond: Tensor, output_uncond: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance, o_u + g (o_c - o_u).

    Args:
        output_cond, output_uncond: network outputs of equal shape. The result has their dtype: cast them to float32 first,
            else g amplifies the rounding of half precision.
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


class TransitionLogProbs(NamedTuple):
    """Log-probabilities and distances of B transitions, float32 (float64 for float64 inputs), **summed** over latent dims."""

    log_pf: Tensor
    """(B,) log P_F(x_next | x_t); its gradient flows into the network's output."""
    log_pb: Tensor
    """(B,) log P_B(x_t | x_next)."""
    kl: Tensor | None
    """(B,) KL to the policy of output_ref, with a gradient like log_pf; None without output_ref."""
    gap: Tensor | None
    """(B,) sum of (o - output_old)^2, with a gradient like log_pf; None without output_old."""


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
    """Log-probabilities of B transitions, and distances to other policies; `dag_kernels.transition` has the formulas.

    Args:
        x_t, x_next: (B, ...) stored states; treated as data, no gradient flows into them.
        output:      (2B, ...) unconditional rows, then conditional ones, combined with guidance_scale; or (B, ...).
        table:       (T, 7) float32, for every step mean_x, mean_output, sigma, noising_x, noising_std, x0_x, x0_output.
        k:           (B,) int64, the step of each row.
        output_ref:  (B, ...) combined output of another policy; treated as data.
        output_old:  (B, ...) combined output at sampling time; treated as data.
    """
    xt, xn = (at_least_float32(x.detach()) for x in (x_t, x_next))
    o = combined(output, len(x_t), guidance_scale)
    dims = (-1, *([1] * (xt.dim() - 1)))
    coefficients = table[k, :5].to(xt.dtype)
    mean_x, mean_output, sigma, noising_x, noising_std = (column.reshape(dims) for column in coefficients.unbind(1))
    kl = gap = None
    if output_ref is not None:
        kl = 0.5 * (mean_output / sigma * (o - at_least_float32(output_ref.detach()))).square().flatten(1).sum(1)
    if output_old is not None:
        gap = (o - at_least_float32(output_old.detach())).square().flatten(1).sum(1)
    return TransitionLogProbs(
        gaussian_log_prob(xn, mean_x * xt + mean_output * o, sigma),
        gaussian_log_prob(xt, noising_x * xn, noising_std),
        kl,
        gap,
    )


class GroupNormed(NamedTuple):
    """The result of `group_norm`."""

    y: Tensor
    """(B, C, H, W) of the input's dtype."""


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, has_silu: bool) -> GroupNormed:
    """Group normalisation of feature maps, then SiLU if `has_silu`; `dag_kernels.group_norm` has the formulas.

    Args:
        x:            (B, C, H, W), C a multiple of `groups`; the gradient flows into it.
        weight, bias: (C,) of any dtype, treated as data.
        eps:          is added to the variance of each group.
    """
    y = functional.group_norm(x, groups, weight.detach().to(x.dtype), bias.detach().to(x.dtype), eps)
    return GroupNormed(functional.silu(y) if has_silu else y)


class SampledStep(NamedTuple):
    """The result of one denoising step of B samples."""

    x_next: Tensor
    """(B, ...) the next state, rounded to the chain's dtype."""
    x0_hat: Tensor
    """(B, ...) float32, the clean latent predicted from x_t."""
    log_pf: Tensor
    """(B,) float32, log P_F at the rounded x_next, summed over latent dims."""
    log_pb: Tensor
    """(B,) float32, log P_B at the rounded x_next, summed over latent dims."""


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
    """Sample x_next = mu + sigma z with counter-based noise z; log-probabilities are taken at the rounded x_next.

    Args:
        x_t:         (B, ...) states.
        output:      (2B, ...) or (B, ...) as in `transition_log_probs`.
        table:       (T, 7) as in `transition_log_probs`.
        k:           the step of all rows.
        seed:        64-bit integer.
        sample_id:   (B,) int64, unique over batches, processes and restarts.
        chain_dtype: dtype of x_next.
    """
    xt, o = at_least_float32(x_t), combined(output, len(x_t), guidance_scale)
    mean_x, mean_output, sigma, noising_x, noising_std, x0_x, x0_output = table[k].unbind()
    mean = mean_x * xt + mean_output * o
    x_next = (mean + sigma * standard_normal(seed, sample_id, k, tuple(x_t.shape[1:]))).to(chain_dtype)
    rounded = at_least_float32(x_next)
    return SampledStep(
        x_next,
        x0_x * xt + x0_output * o,
        gaussian_log_prob(rounded, mean, sigma),
        gaussian_log_prob(xt, noising_x * rounded, noising_std),
    )


class BalanceLoss(NamedTuple):
    """The detailed-balance loss of B transitions, float32."""

    loss: Tensor
    """(B,) one loss for each transition; gradients flow into log_pf, log_F and (unless detached) log_F_next."""
    residual: Tensor
    """(B,) delta, not divided by the scale; detached."""


def detailed_balance(
    log_F: Tensor,
    log_pf: Tensor,
    log_pb: Tensor,
    log_F_next: Tensor,
    log_looking: Tensor | None = None,
    log_looking_next: Tensor | None = None,
    log_reward: Tensor | None = None,
    is_terminal: Tensor | None = None,
    scale: Tensor | None = None,
    policy_weight: Tensor | None = None,
    huber: float | None = None,
    detach_next: bool = True,
) -> BalanceLoss:
    """The loss g(delta / s) of each transition, with delta = log F + log P_F - log P_B - log F'.

    g is the square or, beyond `huber`, its tangent; see `penalty`.

    Args:
        log_F, log_F_next: (B,) the learnt flows at x_t and x_next.
        log_pf, log_pb:    (B,) log P_F and log P_B of the transitions; log_pb is treated as data.
        log_looking, log_looking_next: (B,) forward-looking terms, added to the flows; both or neither.
        log_reward:        (B,) log R(x_0); replaces log F' where `is_terminal`, since x_0 has no learnt flow.
        is_terminal:       (B,) bool, whether x_next is x_0; given if log_reward is.
        scale:             (B,) s; None is 1.
        policy_weight:     (B,) factor of log_pf's gradient; None is 1.
        huber:             |delta / s| from which the loss is linear; None for never.
        detach_next:       no gradient flows into log_F_next.
    """
    if policy_weight is not None:
        log_pf = policy_weight * log_pf + (1 - policy_weight) * log_pf.detach()
    if log_looking is not None and log_looking_next is not None:
        log_F, log_F_next = log_F + log_looking, log_F_next + log_looking_next
    if is_terminal is not None and log_reward is not None:
        log_F_next = with_rewarded_end(log_F_next, log_reward, is_terminal)
    delta = residual(log_F, log_pf, log_pb.detach(), log_F_next.detach() if detach_next else log_F_next)
    return BalanceLoss(penalty(delta if scale is None else delta / scale, huber), delta.detach())


def residual(log_F: Tensor, log_pf: Tensor, log_pb: Tensor, log_F_next: Tensor) -> Tensor:
    """delta = log F + log P_F - log P_B - log F', elementwise; 0 where detailed balance holds."""
    return log_F + log_pf - log_pb - log_F_next


def with_rewarded_end(log_F_next: Tensor, log_reward: Tensor, is_terminal: Tensor) -> Tensor:
    """log F(x_next) (B,): the log reward in the last transition of a chain, since x_0 has no learnt flow."""
    return torch.where(is_terminal, log_reward, log_F_next)


def penalty(residual: Tensor, huber: float | None) -> Tensor:
    """g(delta) elementwise: delta^2, or beyond `huber` its tangent (twice Huber's loss)."""
    if huber is None:
        return residual.square()
    return 2 * functional.huber_loss(residual, torch.zeros_like(residual), reduction="none", delta=huber)


def combined(output: Tensor, num_samples: int, guidance_scale: float) -> Tensor:
    """The guided output o (B, ...), at least float32.

    Args:
        output: (2B, ...) unconditional rows, then conditional ones; or (B, ...), which is returned without guidance.
    """
    output = at_least_float32(output)
    if len(output) == num_samples:
        return output
    uncond, cond = output.split(num_samples)
    return guided(cond, uncond, guidance_scale)


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it has that dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _multiply_32(multiplier: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of a product of 32-bit integers; computed in 16-bit halves, so that int64 never overflows."""
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
