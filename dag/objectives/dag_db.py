"""DAG-DB: the squared detailed-balance residual (Zhang et al. 2025, Sec. 3.2)."""

from dag_kernels import PLAIN, Kernels

from dag.objectives.registry import OBJECTIVES, BatchFree, ObjectiveOutput, balance_loss, log_ratio
from dag.objectives.transition import Transition
from dag.recipe import DetailedBalance as Config


@OBJECTIVES.register("dag_db")
class DetailedBalance(BatchFree):
    """loss = g((log F + log P_F - log P_B - log F') / s), with g the square or Huber's loss and s the residual scale.

    Gradients reach the policy through log P_F, and the flow through log F and, unless `detach_next`, log F'. None reach the
    rewards, log P_B or the states.
    """

    uses_flow = True

    def __init__(self, config: Config, kernels: Kernels = PLAIN) -> None:
        self.config, self.kernels = config, kernels

    def __call__(self, transition: Transition) -> ObjectiveOutput:
        balance = balance_loss(transition, transition.log_pf, self.config, self.kernels, transition.policy_weight)
        ratio = log_ratio(transition).detach().exp()
        return ObjectiveOutput(loss=balance.loss, residual=balance.residual, ratio=ratio)
