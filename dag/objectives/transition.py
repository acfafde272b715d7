"""The algebra of detailed balance: residuals, forward-looking flows, per-step constants and slopes, baselines.

    delta_k = log F(x_k) + log P_F(x_{k+1} | x_k) - log P_B(x_k | x_{k+1}) - log F(x_{k+1})       (Zhang et al. 2025, DAG-DB)

with the forward-looking flow log F(x_k) = log F~(x_k) + beta w_k r(x0_hat(x_k)). Here x_k is the state before transition k, so
the chain ends in x_T, the clean latent that is x_0 elsewhere: log F(x_T) = beta r(x_0), and the learnt flow is not used there.

Legend: N trajectories, T transitions; (N, T) tables hold one number per transition, column k.
"""

from dataclasses import dataclass

import torch
from dag_kernels import residual
from torch import Tensor

# The search for the shrinkage of slopes ends when no tau_k^2 changes by more than this share of the largest one. It takes some
# ten or twenty sweeps; the limit bounds the time if a tau_k^2 falls to zero slowly.
_TOLERANCE, _MOST_SWEEPS = 1e-4, 100
# A slope whose q is, but for this share of its variance, a combination of the others' is not estimated.
_LEAST_PRECISION = 1e-9


@dataclass(frozen=True)
class Transition:
    """B transitions: all that an objective gets. Log-probs are in the recipe's reduction (sum or mean)."""

    k: Tensor
    """(B,) int64, index of the transition."""
    is_terminal: Tensor
    """(B,) bool, k == T - 1."""
    log_pf: Tensor
    """(B,) log P_F now, with the policy's gradient."""
    log_pf_old: Tensor
    """(B,) log P_F at sampling time."""
    log_pb: Tensor
    """(B,) log P_B, or the log-prob of the prior (`objective.prior`)."""
    log_reward: Tensor
    """(B,) beta * reward of the trajectory's x_0. Only read where terminal; it may be 0 elsewhere."""
    log_F_tilde: Tensor | None = None
    """(B,) learnt flow at x_t, or at the first noise of its trajectory where it is log Z, with its gradient; None for objectives
    without a flow."""
    log_F_tilde_next: Tensor | None = None
    """(B,) learnt flow at x_next, with its gradient; ignored where terminal."""
    log_looking: Tensor | None = None
    """(B,) beta * w_k * r(x0_hat(x_t)); 0 without forward-looking."""
    log_looking_next: Tensor | None = None
    """(B,) the forward-looking term at x_next; ignored where terminal."""
    residual_scale: Tensor | None = None
    """(B,) what residuals are divided by; None is 1."""
    advantage: Tensor | None = None
    """(B,) for an objective that forms advantages, by `observe` or `advantages`."""
    flow_slope: Tensor | None = None
    """(B,) derivative of the loss with respect to `log_F_tilde`, for an objective that forms it by `flow_slopes`."""
    policy_weight: Tensor | None = None
    """(B,) weight of the policy's gradient; None is 1."""
    residual_weight: Tensor | None = None
    """(B,) weight of losses that are formed from scaled residuals; None is 1."""
    pathwise: Tensor | None = None
    """(B,) weighted KL to the target of `dag.objectives.pathwise`, with the policy's gradient; None if only the score function
    is taken."""
    reverse: Tensor | None = None
    """(B,) weighted square of nabla-DB's reverse residual, with the flow's gradient; None if it is not taken."""
    unexplained: Tensor | None = None
    """(B,) log F(x_next) minus the function whose gradient the target has; None if it is not needed."""


def residual_table(
    log_F_tilde: Tensor, log_looking: Tensor, log_pf: Tensor, log_pb: Tensor, log_reward: Tensor
) -> Tensor:
    """(N, T) residuals of complete trajectories from their (N, T) scalars and (N,) log rewards."""
    log_F = log_F_tilde + log_looking
    log_F_next = torch.cat([log_F[:, 1:], log_reward[:, None]], dim=1)
    return residual(log_F, log_pf, log_pb, log_F_next)


def constant_shift(residuals: Tensor) -> Tensor:
    """(T,) constants c_k which, added to log F~ at each step, make the mean of every column of the (N, T) residuals zero.

    Adding c_k to log F~(x_k) changes delta_k by c_k - c_{k+1}, and c_T = 0, since the last state has the reward and no learnt
    flow. So c_k = -sum of the mean residuals of steps k, k + 1, ...
    """
    # On the CPU: CUDA's running sum is not deterministic.
    return -residuals.mean(0).flip(0).cpu().cumsum(0).flip(0).to(residuals.device)


def slope_shift(residuals: Tensor, excess: Tensor) -> Tensor:
    """(T,) slopes a_k which, multiplied by q_k = `norm_excess` of the states and added to log F~, narrow the (N, T) residuals.

    Adding a_k q_k to log F~(x_k) changes delta_k by e_k = a_k q_k - a_{k+1} q_{k+1}, and a_T = 0, since the last state has the
    reward and no learnt flow. With s_k the standard deviation of delta_k, s its mean over the steps and all columns centred (the
    means are left to `constant_shift`), the slopes minimise

        sum over trajectories and k of (delta_k + e_k)^2 / (s_k s)  +  sum_k a_k^2 / tau_k^2

    The first sum is the loss of scaled residuals with its weight of each step. The second shrinks each slope by the noise of its
    estimate. Given the other slopes, let a^_k be the estimate of slope k and v_k its variance, if the columns have noise of
    variance s_k s: that of the residuals before the fit, so that what it leaves is found in the next rollout. Then
    tau_k^2 = max(0, a^_k^2 - v_k), which maximises the likelihood of the residuals (Tipping and Faul, 2003). A slope that noise
    explains is hence exactly 0, as those of the last, nearly deterministic steps should be.

    Args:
        excess: (N, T) q_k of the states before each transition.
    """
    A, b = (values.cpu() for values in _normal_equations(residuals.double(), excess.double()))
    prior = (torch.linalg.pinv(A) @ b).square()  # tau_k^2, which begins with slopes that are hardly shrunk
    for _ in range(_MOST_SWEEPS):
        before = prior.clone()
        for k in range(len(b)):
            others = torch.where(torch.arange(len(b)) == k, 0.0, prior)
            explained = A[k] @ _covariance(A, others)
            precision, gain = A[k, k] - explained @ A[k], b[k] - explained @ b  # 1 / v_k, a^_k / v_k
            is_told = precision > _LEAST_PRECISION * A[k, k]
            prior[k] = ((gain**2 - precision) / precision**2).clamp(min=0) if is_told else 0.0
        if (prior - before).abs().max() <= _TOLERANCE * prior.max():
            break
    return (_covariance(A, prior) @ b).to(residuals)


def with_slopes(residuals: Tensor, excess: Tensor, slopes: Tensor) -> Tensor:
    """(N, T) residuals after adding `slopes` (T,) times q_k (N, T) to log F~."""
    tilt = slopes * excess
    return residuals + tilt - _next(tilt)


def _next(table: Tensor) -> Tensor:
    """(N, T) column k + 1 in the place of column k, and zeros in the last one."""
    return torch.cat([table[:, 1:], torch.zeros_like(table[:, :1])], dim=1)


def _normal_equations(residuals: Tensor, excess: Tensor) -> tuple[Tensor, Tensor]:
    """(A (T, T), b (T,)) of the least squares of `slope_shift`: its slopes solve A a = b without the second sum.

    Slope k stands in the residual of step k with q_k and in that of step k - 1 with -q_k, so A has three diagonals.
    """
    target, q = -(residuals - residuals.mean(0)), excess - excess.mean(0)
    spread = residuals.std(0, correction=0).clamp(min=1e-6)
    weight = 1 / (spread * spread.mean())
    own, following = weight * q, weight * _next(q)
    beside = -(own[:, :-1] * q[:, 1:]).sum(0)
    from_before = torch.cat([weight.new_zeros(1), (following * _next(q)).sum(0)[:-1]])
    A = torch.diag((own * q).sum(0) + from_before) + torch.diag(beside, 1) + torch.diag(beside, -1)
    b = (own * target).sum(0)
    b[1:] -= (following * target).sum(0)[:-1]
    return A, b


def _covariance(A: Tensor, prior: Tensor) -> Tensor:
    """(T, T) (A + diag(1 / prior))^-1, also where entries of the prior (T,) are 0."""
    root = prior.sqrt()
    inner = torch.eye(len(A), dtype=A.dtype) + root[:, None] * A * root
    return root[:, None] * torch.linalg.inv(inner) * root


def leave_one_out_mean(values: Tensor) -> Tensor:
    """(N, ...) for each entry the mean of the other N - 1 in its column, which does not depend on the entry itself.

    Raises ValueError for N < 2.
    """
    N = values.shape[0]
    if N < 2:
        raise ValueError("a leave-one-out mean needs at least 2 trajectories")
    return (values.sum(0, keepdim=True) - values) / (N - 1)


def leave_one_out_std(values: Tensor) -> Tensor:
    """(N, ...) square root of the leave-one-out mean of the squared deviations from the leave-one-out mean."""
    return leave_one_out_mean((values - leave_one_out_mean(values)).square()).sqrt()
