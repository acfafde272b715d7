"""The algebra of detailed balance: residuals, forward-looking flows, per-step constants, baselines.

    delta_k = log F(x_k) + log P_F(x_{k+1} | x_k) - log P_B(x_k | x_{k+1}) - log F(x_{k+1})       (Zhang et al. 2025, DAG-DB)

with the forward-looking flow log F(x_k) = log F~(x_k) + beta w_k r(x0_hat(x_k)) and, in the last transition,
log F(x_T) = beta r(x_0), so that the learnt flow is not used there. Pure functions of tensors, no state.

Legend: N trajectories, T transitions; (N, T) tables hold one number per transition, column k.
"""

from dataclasses import dataclass

import torch
from dag_kernels import residual
from torch import Tensor


@dataclass(frozen=True)
class Transition:
    """A micro-batch of B transitions, all that an objective sees. Log-probs share one reduction (sum or mean)."""

    k: Tensor
    """(B,) int64, index of the transition."""
    is_terminal: Tensor
    """(B,) bool, k == T - 1."""
    log_pf: Tensor
    """(B,) with the policy's gradient."""
    log_pf_old: Tensor
    """(B,) at sampling time."""
    log_pb: Tensor
    """(B,) what log P_F is balanced against."""
    log_reward: Tensor
    """(B,) beta * reward of the trajectory's x_0."""
    log_F_tilde: Tensor | None = None
    """(B,) with the flow's gradient; None for objectives without a flow."""
    log_F_tilde_next: Tensor | None = None
    """(B,) with the flow's gradient; ignored where terminal."""
    log_looking: Tensor | None = None
    """(B,) beta * w_k * r(x0_hat(x_t)), 0 without forward-looking."""
    log_looking_next: Tensor | None = None
    """(B,) the same at x_next."""
    residual_scale: Tensor | None = None
    """(B,) what residuals are divided by; None is 1."""
    advantage: Tensor | None = None
    """(B,) for objectives that formed one from the whole update."""
    policy_weight: Tensor | None = None
    """(B,) weight of the policy's gradient; None is 1."""


def residual_table(
    log_F_tilde: Tensor, log_looking: Tensor, log_pf: Tensor, log_pb: Tensor, log_reward: Tensor
) -> Tensor:
    """(N, T) residuals of complete trajectories from their (N, T) scalars and (N,) log rewards."""
    log_F = log_F_tilde + log_looking
    log_F_next = torch.cat([log_F[:, 1:], log_reward[:, None]], dim=1)
    return residual(log_F, log_pf, log_pb, log_F_next)


def constant_shift(residuals: Tensor) -> Tensor:
    """(T,) what to add to log F~ at each step so that every column of the (N, T) residuals has mean zero.

    Adding c_k to log F~(x_k) changes delta_k by c_k - c_{k+1}, with c_T = 0 at the rewarded end: the constants
    follow backwards, c_k = -sum of the mean residuals from k on.
    """
    # On the CPU: CUDA's running sum is not deterministic.
    return -residuals.mean(0).flip(0).cpu().cumsum(0).flip(0).to(residuals.device)


def leave_one_out_mean(values: Tensor) -> Tensor:
    """For each row the mean of the others in its column, (N, ...), N >= 2: a baseline independent of the row."""
    N = values.shape[0]
    if N < 2:
        raise ValueError("a leave-one-out mean needs at least 2 trajectories")
    return (values.sum(0, keepdim=True) - values) / (N - 1)


def leave_one_out_std(values: Tensor) -> Tensor:
    """sqrt of the leave-one-out mean of squared deviations from the leave-one-out mean, (N, ...)."""
    return leave_one_out_mean((values - leave_one_out_mean(values)).square()).sqrt()
