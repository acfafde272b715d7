"""DAG-KL: the flow regresses on detailed balance, the policy follows the per-step KL's score-function gradient.

    grad KL(P_F(. | x_t) || F(x_next) P_B(x_t | x_next) / F(x_t)) = E_{P_F}[ sg(delta) grad log P_F ]

(Zhang et al. 2025, Prop. 4), where delta is the detailed-balance residual and sg stops gradients. Subtracting a baseline from
delta keeps the gradient unbiased if it does not depend on the transition itself: the mean residual of the other trajectories
at the same step, or of earlier rollouts. The advantage is -(delta - baseline).

With `policy_gradient: pathwise` the same gradient is taken through the next state, `dag.objectives.pathwise`. `control_variate`
adds the score function of what a learnt reward gradient leaves unexplained of log F(x_next).
"""

from dag_kernels import PLAIN, Kernels
from torch import Tensor

from dag.objectives.registry import (
    OBJECTIVES,
    ObjectiveOutput,
    Plain,
    UpdateScalars,
    balance_loss,
    clipped_surrogate,
    log_ratio,
    pathwise_loss,
)
from dag.objectives.transition import Transition, leave_one_out_mean, leave_one_out_std
from dag.recipe import KLDivergence as Config

_tiny = 1e-8


@OBJECTIVES.register("dag_kl")
class KLDivergence(Plain[Config]):
    """loss = g(delta / s) + weight * clipped surrogate of the advantage.

    In delta log P_F is detached, so the first term trains the flow alone and the second the policy; s is the residual scale.
    """

    def __init__(self, config: Config, kernels: Kernels = PLAIN, per_group: int = 1) -> None:
        super().__init__(config, kernels, per_group)
        self.uses_flow = config.has_flow

    def advantages(self, update: UpdateScalars) -> Tensor | None:
        """(N, T) advantages from the residuals (N, T), which are those of the sampling-time policy; None if not `score`.

        With `baseline: per_step` or `mixed` the N trajectories are all of the update's, so that advantages do not depend on
        how it is cut into micro-batches. `mixed` averages over all steps too, as the published code does within a shuffled
        micro-batch. `running` needs no other trajectory.
        """
        if self.config.policy_gradient != "score":
            return None
        residuals, scale = update.residuals, update.residual_scale
        assert residuals is not None and scale is not None
        scaled = residuals / scale
        if self.config.baseline == "running":
            assert update.running_mean is not None
            centred = scaled - update.running_mean / scale
        else:
            rows = scaled.reshape(-1, 1) if self.config.baseline == "mixed" else scaled
            centred = rows - leave_one_out_mean(rows)
            if self.config.normalise_advantage:
                centred = centred / (leave_one_out_std(rows) + _tiny)
        if self.config.advantage_clip is not None:
            centred = centred.clamp(-self.config.advantage_clip, self.config.advantage_clip)
        return -centred.reshape(residuals.shape)

    def __call__(self, transition: Transition) -> ObjectiveOutput:
        takes_score, ratio = self.config.policy_gradient == "score", log_ratio(transition).detach().exp()
        policy_loss, clipped = self._score(transition) if takes_score else self._pathwise(transition)
        policy_loss = self.config.weight * policy_loss
        if not self.uses_flow:
            return ObjectiveOutput(loss=policy_loss, ratio=ratio, clipped=clipped)
        balance = balance_loss(transition, transition.log_pf.detach(), self.config, self.kernels)
        return ObjectiveOutput(balance.loss + policy_loss, ratio, residual=balance.residual, clipped=clipped)

    def _score(self, transition: Transition) -> tuple[Tensor, Tensor]:
        """(policy loss (B,), whether the ratio was clipped (B,)) of the score function."""
        assert transition.advantage is not None
        policy_loss, clipped = clipped_surrogate(transition.advantage, log_ratio(transition), self.config.clip_range)
        if transition.policy_weight is not None:
            policy_loss = transition.policy_weight * policy_loss
        if transition.residual_scale is not None:
            # DAG-DB's gradient is divided by the scale twice: in the residual and by the chain rule. The advantage is
            # divided once, so one more division gives the steps the same weights as there.
            policy_loss = policy_loss / transition.residual_scale
        if transition.residual_weight is not None:
            policy_loss = transition.residual_weight * policy_loss
        return policy_loss, clipped

    def _pathwise(self, transition: Transition) -> tuple[Tensor, Tensor | None]:
        """(policy loss (B,), whether the ratio was clipped (B,), or None if it is not used) of the pathwise gradient."""
        policy_loss = pathwise_loss(transition)
        if transition.unexplained is None:
            return policy_loss, None
        surrogate, clipped = clipped_surrogate(transition.unexplained, log_ratio(transition), self.config.clip_range)
        weight = 1.0 if transition.policy_weight is None else transition.policy_weight.square()
        return policy_loss + self.config.correction * weight * surrogate, clipped
