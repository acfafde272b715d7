"""Trajectory balance: the residual of a whole trajectory, with log Z estimated by the trajectories themselves or by a state flow.

    e_n = sum_k [log P_F(x_{k+1} | x_k) - log P_B(x_k | x_{k+1})] - beta r(x_0)         d_n = log Z + e_n

(Malkin et al. 2022). With the pretrained policy in P_B's place (`prior: pretrained`) it is relative trajectory balance
(Venkatraman et al. 2024). The gradient of d_n^2 / 2 is

    sum_k d_n grad log P_F(x_{k+1} | x_k) + d_n grad log Z

so the advantage of every step of a trajectory is -d_n.

`log_z: batch`: -log Z is the mean of e over a group (VarGrad; Richter et al. 2020), over the others in it, so that on-policy the
gradient is unbiased, and N / (N - 1) times that of VarGrad. TB's residual also has log p(x_T), which with P_B depends on the
trajectory. On-policy any function of x_T leaves the expected gradient as it is, since the policy's steps begin there; on replayed
and given trajectories it does not, so there it is added. The residual of the balanced policy is then the same on every trajectory
of a prompt, whatever sampled it, but with a prior for the part of log E[R | x_T] that depends on x_T.

`log_z: flow`: log Z is log F~(x_T, prompt), which holds log p(x_T) too. It is sub-trajectory balance with the whole trajectory as
its only piece, and no preview in the flow: at the first noise x0_hat says next to nothing (its weight alpha_bar is about .005 in
Stable Diffusion), and it would be decoded and scored once a trajectory. The residual of the balanced policy is zero on every
trajectory, whatever sampled it.

Several updates of one rollout (`train.inner_epochs`) with PPO's clipped
ratio are the proximal form for pairs of a prompt (PRDP; Deng et al. 2024), whose loss over all pairs has the same gradient.
"""

from dag_kernels import PLAIN, Kernels
from torch import Tensor

from dag.objectives.groups import centred
from dag.objectives.registry import OBJECTIVES, ObjectiveOutput, Plain, UpdateScalars, surrogate_output
from dag.objectives.transition import Transition
from dag.recipe import TrajectoryBalance as Config


@OBJECTIVES.register("tb")
class TrajectoryBalance(Plain[Config]):
    """loss = clipped surrogate of the advantage -d, the same for all steps of a trajectory, plus d log F~(x_T) for a flow."""

    def __init__(self, config: Config, kernels: Kernels = PLAIN, per_group: int = 1) -> None:
        super().__init__(config, kernels, per_group)
        self.uses_flow = config.fits_flow

    def advantages(self, update: UpdateScalars) -> Tensor:
        """(N, T) advantages, from what the policy that sampled gave its trajectories; off-policy the present one."""
        assert update.log_ratio is not None
        advantage = -self._residual(update)
        if self.config.advantage_clip is not None:
            advantage = advantage.clamp(-self.config.advantage_clip, self.config.advantage_clip)
        return advantage.to(update.log_ratio)[:, None].expand_as(update.log_ratio)

    def flow_slopes(self, update: UpdateScalars) -> Tensor | None:
        """(N, T) d in equal shares: every step that an update trains also trains the flow of the first noise."""
        if not self.uses_flow:
            return None
        assert update.log_ratio is not None
        share = self._residual(update) / update.log_ratio.shape[1]
        return share.to(update.log_ratio)[:, None].expand_as(update.log_ratio)

    def _residual(self, update: UpdateScalars) -> Tensor:
        """(N,) float64 d."""
        if self.uses_flow:
            assert update.residuals is not None
            return update.residuals.double().sum(1)
        assert update.log_ratio is not None and update.log_reward is not None
        e = update.log_ratio.double().sum(1) - update.log_reward
        if update.log_start is not None:
            e = e + update.log_start
        return centred(e, self.per_group)

    def __call__(self, transition: Transition) -> ObjectiveOutput:
        return surrogate_output(transition, self.config.clip_range)
