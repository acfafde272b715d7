"""Sub-trajectory balance: the residuals of all pieces of a trajectory (Madan et al. 2023).

    delta_ij = log F(x_i) + sum_{i <= k < j} [log P_F - log P_B] - log F(x_j) = delta_i + ... + delta_{j-1}
    loss     = T sum_{i < j} w_ij delta_ij^2,        w_ij = lambda^(j-i) / sum of all

The pieces' residuals are sums of those of single steps, so the loss has the gradients

    d loss / d log P_F at step k = T sum_{i <= k < j} 2 w_ij delta_ij
    d loss / d log F(x_k)        = T (sum_{j > k} 2 w_kj delta_kj - sum_{i < k} 2 w_ik delta_ik)

of which `detach_next` drops the last sum. Towards lambda = 0 it is DAG-DB with a square loss, towards infinity T times trajectory
balance. All of them vanish at once on every trajectory, whatever sampled it; on replayed and given ones log P_F is the present
policy's. `flow.passes` train the flow by the residuals of single steps, whose optimum is the same.
"""

import torch
from torch import Tensor

from dag.objectives.registry import OBJECTIVES, ObjectiveOutput, Plain, UpdateScalars, surrogate_output
from dag.objectives.transition import Transition
from dag.recipe import SubTrajectoryBalance as Config


@OBJECTIVES.register("subtb")
class SubTrajectoryBalance(Plain[Config]):
    """loss = clipped surrogate of minus the derivative with respect to log P_F, plus the derivative times log F~."""

    uses_flow = True

    def advantages(self, update: UpdateScalars) -> Tensor:
        pieces = self._pieces(update)
        T = pieces.shape[1] - 1
        # Pieces that begin at or before k and end after it.
        begun = pieces.cumsum(1)
        slopes = torch.stack([begun[:, k, k + 1 :].sum(1) for k in range(T)], dim=1)
        return -slopes.float()

    def flow_slopes(self, update: UpdateScalars) -> Tensor:
        pieces = self._pieces(update)
        slopes = pieces.sum(2)
        if not self.config.detach_next:
            slopes = slopes - pieces.sum(1)
        return slopes[:, :-1].float()

    def _pieces(self, update: UpdateScalars) -> Tensor:
        """(N, T + 1, T + 1) float64 T 2 w_ij delta_ij, zero unless i < j."""
        assert update.residuals is not None
        N, T = update.residuals.shape
        sums = torch.cat([update.residuals.new_zeros(N, 1), update.residuals], 1).double().cumsum(1)
        length = torch.arange(T + 1, device=sums.device)
        length = length[None, :] - length[:, None]
        weight = torch.where(length > 0, self.config.decay ** length.clamp(min=0).double(), 0.0)
        return 2 * T * weight / weight.sum() * (sums[:, None, :] - sums[:, :, None])

    def __call__(self, transition: Transition) -> ObjectiveOutput:
        assert transition.log_F_tilde is not None and transition.flow_slope is not None
        return surrogate_output(transition, self.config.clip_range)
