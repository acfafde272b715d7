"""The algebra of detailed balance: residuals, forward-looking flows, per-step constants, baselines.

    delta_k = log F(x_k) + log P_F(x_{k+1} | x_k) - log P_B(x_k | x_{k+1}) - log F(x_{k+1})       (Zhang et al. 2025, DAG-DB)

with the forward-looking flow log F(x_k) = log F~(x_k) + beta w_k r(x0_hat(x_k)). Here x_k is the state before transition k, so
the chain ends in x_T, the clean latent that is x_0 elsewhere: log F(x_T) = beta r(x_0), and the learnt flow is not used there.

Legend: N trajectories, T transitions; (N, T) tables hold one number per transition, column k.
"""

from dataclasses import dataclass

import torch
from dag_kernels import residual
from torch import Tensor


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
    """(B,) learnt flow at x_t, with its gradient; None for objectives without a flow."""
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
