"""DAG-DB: the squared detailed-balance residual (Zhang et al. 2025, Sec. 3.2).

    grad delta^2 = 2 delta grad log P_F,    in expectation over x_next: 2 grad KL(P_F || P_B F' / F)

So its policy gradient can be taken pathwise too, as twice that of `dag.objectives.pathwise`.
"""

from dag_kernels import PLAIN, Kernels
from torch import Tensor

from dag.objectives.registry import OBJECTIVES, ObjectiveOutput, Plain, balance_loss, log_ratio, pathwise_loss
from dag.objectives.transition import Transition
from dag.recipe import DetailedBalance as Config


@OBJECTIVES.register("dag_db")
class DetailedBalance(Plain[Config]):
    """loss = g((log F + log P_F - log P_B - log F') / s), with g the square or Huber's loss and s the residual scale.

    Gradients reach the policy through log P_F, and the flow through log F and, unless `detach_next`, log F'. None reach the
    rewards, log P_B or the states. With `policy_gradient: pathwise` or `control_variate` the residual trains the flow alone.
    """

    def __init__(self, config: Config, kernels: Kernels = PLAIN, per_group: int = 1) -> None:
        super().__init__(config, kernels, per_group)
        self.uses_flow = config.has_flow

    def __call__(self, transition: Transition) -> ObjectiveOutput:
        ratio = log_ratio(transition).detach().exp()
        if self.config.policy_gradient == "score":
            balance = balance_loss(transition, transition.log_pf, self.config, self.kernels, transition.policy_weight)
            return ObjectiveOutput(loss=balance.loss, residual=balance.residual, ratio=ratio)
        loss = 2 * pathwise_loss(transition)
        if transition.unexplained is not None:
            loss = loss + 2 * self._correction(transition, transition.unexplained)
        if not self.uses_flow:
            return ObjectiveOutput(loss=loss, ratio=ratio)
        balance = balance_loss(transition, transition.log_pf.detach(), self.config, self.kernels)
        return ObjectiveOutput(loss=balance.loss + loss, residual=balance.residual, ratio=ratio)

    def _correction(self, transition: Transition, unexplained: Tensor) -> Tensor:
        """(B,) the control variate's other half: the score function of what the learnt gradient does not explain."""
        weight = 1.0 if transition.policy_weight is None else transition.policy_weight.square()
        return -self.config.correction * weight * unexplained * log_ratio(transition)
