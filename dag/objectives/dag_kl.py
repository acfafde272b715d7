"""DAG-KL: the flow regresses on detailed balance, the policy follows the per-step KL's score-function gradient.

    grad KL(P_F(. | x_t) || F(x_next) P_B(x_t | x_next) / F(x_t)) = E_{P_F}[ sg(delta) grad log P_F ]

(Zhang et al. 2025, Prop. 4), where delta is the detailed-balance residual and sg stops gradients. Subtracting a baseline from
delta keeps the gradient unbiased if it does not depend on the transition itself: the mean residual of the other trajectories
at the same step, or of earlier rollouts. The advantage is -(delta - baseline).
"""

from dag_kernels import PLAIN, Kernels
from torch import Tensor

from dag.objectives.registry import (
    OBJECTIVES,
    BatchFree,
    ObjectiveOutput,
    balance_loss,
    clipped_surrogate,
    log_ratio,
)
from dag.objectives.transition import Transition, leave_one_out_mean, leave_one_out_std
from dag.recipe import KLDivergence as Config

_tiny = 1e-8


@OBJECTIVES.register("dag_kl")
class KLDivergence(BatchFree):
    """loss = g(delta / s) + weight * clipped surrogate of the advantage.

    In delta log P_F is detached, so the first term trains the flow alone and the second the policy; s is the residual scale.
    """

    uses_flow = True

    def __init__(self, config: Config, kernels: Kernels = PLAIN) -> None:
        self.config, self.kernels = config, kernels

    def advantages(self, residuals: Tensor, residual_scale: Tensor, running_mean: Tensor) -> Tensor:
        """(N, T) advantages from the residuals (N, T), which are those of the sampling-time policy.

        With `baseline: per_step` or `mixed` the N trajectories are all of the update's, so that advantages do not depend on
        how it is cut into micro-batches. `mixed` averages over all steps too, as the published code does within a shuffled
        micro-batch. `running` needs no other trajectory.
        """
        scaled = residuals / residual_scale
        if self.config.baseline == "running":
            centred = scaled - running_mean / residual_scale
        else:
            rows = scaled.reshape(-1, 1) if self.config.baseline == "mixed" else scaled
            centred = rows - leave_one_out_mean(rows)
            if self.config.normalise_advantage:
                centred = centred / (leave_one_out_std(rows) + _tiny)
        if self.config.advantage_clip is not None:
            centred = centred.clamp(-self.config.advantage_clip, self.config.advantage_clip)
        return -centred.reshape(residuals.shape)

    def __call__(self, transition: Transition) -> ObjectiveOutput:
        assert transition.advantage is not None
        balance = balance_loss(transition, transition.log_pf.detach(), self.config, self.kernels)
        policy_loss, clipped = clipped_surrogate(transition.advantage, log_ratio(transition), self.config.clip_range)
        if transition.policy_weight is not None:
            policy_loss = transition.policy_weight * policy_loss
        if transition.residual_scale is not None:
            # DAG-DB's gradient is divided by the scale twice: in the residual and by the chain rule. The advantage is
            # divided once, so one more division gives the steps the same weights as there.
            policy_loss = policy_loss / transition.residual_scale
        return ObjectiveOutput(
            loss=balance.loss + self.config.weight * policy_loss,
            residual=balance.residual,
            ratio=log_ratio(transition).detach().exp(),
            clipped=clipped,
        )
