"""DAG-DB: the squared detailed-balance residual (Zhang et al. 2025, Sec. 3.2)."""

from dag.balance import Transition, residual
from dag.objectives.registry import (
    OBJECTIVES,
    BatchFree,
    ObjectiveOutput,
    log_ratio,
    penalty,
    with_gradient_weight,
)
from dag.recipe import DetailedBalance as Config


@OBJECTIVES.register("dag_db")
class DetailedBalance(BatchFree):
    """loss = g((log F + log P_F - log P_B - log F') / s), g the square or Huber.

    Gradients reach the policy through log P_F and the flow through log F (and log F' unless detached); none
    reaches rewards, log P_B or the states.
    """

    uses_flow = True

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, transition: Transition) -> ObjectiveOutput:
        log_F, log_F_next = transition.flows()
        if self.config.detach_next:
            log_F_next = log_F_next.detach()
        log_pf = with_gradient_weight(transition.log_pf, transition.policy_weight)
        delta = residual(log_F, log_pf, transition.log_pb, log_F_next)
        scale = 1.0 if transition.residual_scale is None else transition.residual_scale
        return ObjectiveOutput(
            loss=penalty(delta / scale, self.config.huber),
            residual=delta.detach(),
            ratio=log_ratio(transition).detach().exp(),
        )
