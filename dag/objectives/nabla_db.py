"""Nabla-DB: detailed balance of gradients (Liu et al. 2025, "Efficient diversity-preserving diffusion alignment via
gradient-informed GFlowNets").

    forward  e  = grad_{x_next} [log P_F(x_next | x_t) - log P_ref - log F(x_next)]
    reverse  e' = grad_{x_t}    [log F(x_t) + log P_F(x_next | x_t) - log P_ref]

with P_ref the pretrained policy (residual nabla-DB, `objective.prior: pretrained`) or P_B(x_t | x_next). The forward residual
trains the policy and the reverse one the flow, `dag.objectives.pathwise` has both. How strongly the reward of x0_hat counts at
early steps, the paper's attenuation, is `forward_looking.weight`; alpha_bar is published.
"""

from dag_kernels import PLAIN, Kernels

from dag.objectives.registry import OBJECTIVES, ObjectiveOutput, Plain, log_ratio, pathwise_loss
from dag.objectives.transition import Transition
from dag.recipe import NablaBalance as Config


@OBJECTIVES.register("nabla_db")
class NablaBalance(Plain[Config]):
    """loss = c |e|^2 + reverse c' |e'|^2, with c = sigma^2 / 2 and c' = s^2 / 2 (s^2 the variance of P_B), or c = c' = 1 / D.

    Gradients reach the policy through e and the flow through e'.
    """

    def __init__(self, config: Config, kernels: Kernels = PLAIN, per_group: int = 1) -> None:
        super().__init__(config, kernels, per_group)
        self.uses_flow = config.has_flow

    def __call__(self, transition: Transition) -> ObjectiveOutput:
        loss = pathwise_loss(transition)
        if transition.reverse is not None:
            loss = loss + self.config.reverse * transition.reverse
        return ObjectiveOutput(loss=loss, ratio=log_ratio(transition).detach().exp())
