"""What one pass keeps of a micro-batch while it is sampled.

Legend: B trajectories of the micro-batch, T transitions.
"""

from dataclasses import dataclass, field

import torch
from dag_kernels import TransitionLogProbs
from torch import Tensor

from dag.chain.rollout import Batch, Score, Step, noise_dtype
from dag.chain.trajectory import Trajectories
from dag.objectives.state_flow import norm_excess
from dag.recipe import Recipe
from dag.training.flow_gradient import Look, Rewarded


@dataclass(frozen=True)
class Pending:
    """A trained step that waits for the flow at its next state, or for the final reward."""

    step: Step
    weight: float
    """Importance weight, see `Updates.choose_steps`."""
    now: TransitionLogProbs
    """Log-probs with the policy's gradients."""
    log_F_tilde: Tensor
    """(B,) learnt flow at x_t, with gradients."""
    log_looking: Tensor
    """(B,) forward-looking term at x_t."""
    pretrained: Tensor | None
    """(B, C, H, W) the pretrained network's output at x_t, or None if the loss does not need it."""


@dataclass(frozen=True)
class Next:
    """What is known of the state x_next that a pending step leads to."""

    log_F_tilde: Tensor
    """(B,) learnt flow, detached or with gradients (`detach_next`); 0 at the end of the chain."""
    log_looking: Tensor
    """(B,) forward-looking term; 0 at the end of the chain."""
    log_reward: Tensor | None
    """(B,) log R(x_0) at the end of the chain; None elsewhere."""
    look: Look | None
    """The gradient of the flow; None for objectives that take its values alone."""


@dataclass
class Tile:
    """A micro-batch of B trajectories while it is sampled, with one entry per finished step in each list."""

    batch: Batch
    text: Tensor
    """(B, S, D) prompt embeddings on the device."""
    sample_id: Tensor
    """(B,) int64 on the device."""
    score: Score
    states: list[Tensor] = field(default_factory=list)
    """The chain's T + 1 states; empty if no chain is kept."""
    log_pf: list[Tensor] = field(default_factory=list)
    log_pb: list[Tensor] = field(default_factory=list)
    log_F_tilde: list[Tensor] = field(default_factory=list)
    excess: list[Tensor] = field(default_factory=list)
    """`norm_excess` of x_t; empty for a flow without slopes."""
    x0_hat_reward: list[Tensor] = field(default_factory=list)
    previews: list[Tensor] = field(default_factory=list)
    """Clean latents for the reward critic; empty without one."""
    reward: Tensor | None = None
    """(B,) reward of the final pictures; None before the last step."""

    @property
    def rows(self) -> Tensor:
        return torch.arange(len(self.sample_id))

    def whose(self, epoch: int) -> Rewarded:
        """The trajectories, with what rewards them in an epoch."""
        return Rewarded(self.batch.prompt_id, self.score, self.rows, epoch)

    def remember(self, step: Step, log_F_tilde: Tensor, *, keeps_chain: bool, has_slopes: bool) -> None:
        """Add a step's numbers, without gradients."""
        self.log_pf.append(step.sampled.log_pf)
        self.log_pb.append(step.sampled.log_pb)
        self.log_F_tilde.append(log_F_tilde.detach())
        if has_slopes:
            self.excess.append(norm_excess(step.x_t.detach()))
        if keeps_chain:
            self.states += [step.x_next] if self.states else [step.x_t, step.x_next]

    def trajectories(self, recipe: Recipe) -> Trajectories:
        """The trajectories of the finished tile, with their chains if they were kept."""
        assert self.reward is not None
        device = self.sample_id.device
        return Trajectories(
            chain=torch.stack(self.states) if self.states else self.log_pf[0].new_empty(0),
            log_pf=torch.stack(self.log_pf, 1),
            log_pb=torch.stack(self.log_pb, 1),
            x0_hat_reward=torch.stack(self.x0_hat_reward, 1).to(device) if self.x0_hat_reward else None,
            reward=self.reward.to(device),
            prompt_id=self.batch.prompt_id,
            sample_id=self.sample_id,
            seed=recipe.seed,
            noise_dtype=noise_dtype(recipe.sampler),
            previews=torch.stack(self.previews, 1).cpu() if self.previews else None,
        )
