"""Direct preference optimisation along the chain, on pairs that the reward ranks (D3PO; Yang et al. 2024).

For the best and the worst picture w, l of a group, with rho = log P_F - log p_pretrained of a step,

    loss_k = -log sigmoid(strength (rho_w - rho_l))

in every step k. Its gradient is that of the policy with advantages +-strength sigmoid(-strength (rho_w - rho_l)), which are taken
at the policy that sampled: exact in the first update of a rollout, and bounded by the clipped ratio in later ones. Pictures
between best and worst, and groups in which all score alike, have no gradient. The pairs may come from anywhere, and on replayed
and given trajectories rho is the present policy's. With `form: denoise` the sign of the advantage says
which picture is preferred, and `dag.training.denoising` has the loss.
"""

import torch
from torch import Tensor

from dag.objectives.groups import grouped, ungrouped
from dag.objectives.registry import OBJECTIVES, ObjectiveOutput, Plain, UpdateScalars, surrogate_output
from dag.objectives.transition import Transition
from dag.recipe import DirectPreference as Config


@OBJECTIVES.register("dpo")
class DirectPreference(Plain[Config]):
    """loss = clipped surrogate of the advantage."""

    def advantages(self, update: UpdateScalars) -> Tensor:
        """(N, T) advantages; the loss is the mean over pictures, half of whose sum is that over pairs of a group of two."""
        assert update.log_ratio is not None and update.reward is not None
        reward, rho = grouped(update.reward, self.per_group), grouped(update.log_ratio, self.per_group)
        best, worst = reward.argmax(0), reward.argmin(0)
        columns = torch.arange(reward.shape[1], device=reward.device)
        margin = rho[best, columns] - rho[worst, columns]
        strength = self.config.strength
        pull = torch.ones_like(margin) if self.config.num_draws else strength * torch.sigmoid(-strength * margin)
        pull = pull * (reward[best, columns] > reward[worst, columns])[:, None]
        advantage = torch.zeros_like(rho)
        advantage[best, columns] += pull
        advantage[worst, columns] -= pull
        return ungrouped(advantage)

    def __call__(self, transition: Transition) -> ObjectiveOutput:
        return surrogate_output(transition, self.config.clip_range)
