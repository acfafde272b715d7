"""Objectives that follow the reward's gradient back through the denoiser, without a flow.

    backprop   max r(x_0), through the last K steps         DRaFT (Clark et al. 2024), AlignProp (Prabhudesai et al. 2023);
                                                            through n draws of the last one: DRaFT-LV (Clark et al. 2024)
    refl       max r(x0_hat(x_k)), through one step         ReFL (Xu et al. 2023)
    adjoint    the policy of step k matches the pretrained one, shifted by sigma^2 beta d r(x_0) / d x_{k+1}, where the
               derivative goes through the pretrained policy           adjoint matching (Domingo-Enrich et al. 2025)

`backprop` and `refl` have no target distribution: they keep on maximising, unless `regulariser.pretrained_kl` holds them.
`adjoint` samples p_pretrained exp(beta r). The losses are computed along a chain, in `dag.training.ascent`.
"""

from dag.objectives.registry import OBJECTIVES, ObjectiveOutput, Plain, log_ratio, pathwise_loss
from dag.objectives.transition import Transition
from dag.recipe import AdjointMatching, Backpropagation, RewardFeedback


@OBJECTIVES.register("backprop")
@OBJECTIVES.register("refl")
@OBJECTIVES.register("adjoint")
class FirstOrder(Plain[Backpropagation | RewardFeedback | AdjointMatching]):
    """loss = what was computed along the chain, whose gradient is the objective's."""

    def __call__(self, transition: Transition) -> ObjectiveOutput:
        return ObjectiveOutput(loss=pathwise_loss(transition), ratio=log_ratio(transition).detach().exp())
