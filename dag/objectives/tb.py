"""Trajectory balance: the residual of a whole trajectory, with log Z estimated by the trajectories themselves.

    e_n = sum_k [log P_F(x_{k+1} | x_k) - log P_B(x_k | x_{k+1})] - beta r(x_0)         d_n = log Z + e_n

(Malkin et al. 2022). With -log Z the mean of e over a group it is VarGrad (Richter et al. 2020), and with the pretrained policy
in P_B's place (`prior: pretrained`) relative trajectory balance (Venkatraman et al. 2024). On-policy the gradient of d_n^2 / 2 is

    sum_k (e_n - mean e) grad log P_F(x_{k+1} | x_k)

so the advantage of every step of a trajectory is -(e_n - mean e). The mean is that of the others in its group: the gradient is
then unbiased, and N / (N - 1) times that of VarGrad.

TB's residual also has log p(x_T), which with P_B depends on the trajectory. On-policy any function of x_T leaves the expected
gradient as it is, since the policy's steps begin there; on replayed and given trajectories it does not, so there it is added.
The residual of the balanced policy is the same on every trajectory, whatever sampled it, and so is its zero gradient.

Several updates of one rollout (`train.inner_epochs`) with PPO's clipped
ratio are the proximal form for pairs of a prompt (PRDP; Deng et al. 2024), whose loss over all pairs has the same gradient.
"""

from torch import Tensor

from dag.objectives.groups import centred
from dag.objectives.registry import OBJECTIVES, ObjectiveOutput, Plain, UpdateScalars, surrogate_output
from dag.objectives.transition import Transition
from dag.recipe import TrajectoryBalance as Config


@OBJECTIVES.register("tb")
class TrajectoryBalance(Plain[Config]):
    """loss = clipped surrogate of the advantage -(e - mean e), the same for all steps of a trajectory."""

    def advantages(self, update: UpdateScalars) -> Tensor:
        """(N, T) advantages, from what the policy that sampled gave its trajectories; off-policy the present one."""
        assert update.log_ratio is not None and update.log_reward is not None
        e = update.log_ratio.double().sum(1) - update.log_reward
        if update.log_start is not None:
            e = e + update.log_start
        advantage = -centred(e, self.per_group)
        if self.config.advantage_clip is not None:
            advantage = advantage.clamp(-self.config.advantage_clip, self.config.advantage_clip)
        return advantage.to(update.log_ratio)[:, None].expand_as(update.log_ratio)

    def __call__(self, transition: Transition) -> ObjectiveOutput:
        return surrogate_output(transition, self.config.clip_range)
