"""Regression on one's own best pictures: the likelihood of their chains, weighted by the reward.

    loss = -sum_n (w_n - 1 / n) sum_k log P_F(x_{k+1} | x_k)

with w one over the number of kept pictures for the best of each group and zero for the others (RAFT; Dong et al. 2023), or
softmax(beta r) within the group (reward-weighted regression; Lee et al. 2023). The mean weight 1 / n is subtracted: on-policy it
adds nothing to the expected gradient, and it takes away the noise of imitating an average picture. Off-policy it would push the
policy away from pictures without bound, so there it is left out: what is left is weighted maximum likelihood, and that any
pictures may have. With `form: denoise` the loss is that of predicting noise, weighted by n w_n (`dag.training.denoising`).
"""

import torch
from torch import Tensor

from dag.objectives.groups import grouped, ungrouped
from dag.objectives.registry import OBJECTIVES, ObjectiveOutput, Plain, UpdateScalars, surrogate_output
from dag.objectives.transition import Transition
from dag.recipe import Regression as Config


@OBJECTIVES.register("regression")
class Regression(Plain[Config]):
    """loss = clipped surrogate of the advantage n w - 1 (n w off-policy), n the size of a group: the mean weight is 1."""

    def advantages(self, update: UpdateScalars) -> Tensor:
        assert update.log_ratio is not None and update.reward is not None
        reward = grouped(update.reward, self.per_group)
        if self.config.weights == "top":
            rank = reward.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
            weight = (rank < self.config.keep).to(reward) / self.config.keep
        else:
            sd = update.reward.std(correction=0).clamp(min=torch.finfo(reward.dtype).tiny)
            weight = torch.softmax(self.config.beta * reward / sd, dim=0)
        # The loss of denoising adds the 1 again: it is positive, and needs no baseline.
        baseline = 0 if update.is_off_policy and self.config.form == "chain" else 1
        return ungrouped(len(reward) * weight - baseline)[:, None].expand_as(update.log_ratio)

    def __call__(self, transition: Transition) -> ObjectiveOutput:
        return surrogate_output(transition, self.config.clip_range)
