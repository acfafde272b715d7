"""A rollout's numbers in the units an objective works in: nats, in the recipe's reduction of log-probs.

    log R(x_0) = beta (r(x_0) - mean) / sd,        looking_k = beta w_k (r(x0_hat(x_k)) - mean) / sd

Mean and sd are those of the first rollout with `beta.unit: reward_sd`, else 0 and 1.

Legend: N trajectories, T transitions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dag.chain.schedule import Schedule
from dag.chain.trajectory import Trajectories
from dag.recipe import DetailedBalance, KLDivergence, PolicyGradient, Recipe


@dataclass(frozen=True)
class RewardScale:
    """Raw rewards to standard ones; the identity until it is set."""

    mean: float = 0.0
    sd: float = 1.0
    is_set: bool = False

    @classmethod
    def of(cls, reward: Tensor) -> "RewardScale":
        """Standard units of rewards (N,); a constant reward keeps its unit."""
        sd = float(reward.std(correction=0))
        return cls(float(reward.mean()), sd if sd > 0 else 1.0, True)

    def __call__(self, reward: Tensor) -> Tensor:
        return (reward - self.mean) / self.sd


@dataclass(frozen=True)
class Scalars:
    """A rollout's log-probs, forward-looking terms and log rewards, at one epoch's beta."""

    log_pf: Tensor
    """(N, T) at sampling time."""
    log_pb: Tensor
    """(N, T)"""
    looking: Tensor
    """(N, T) zeros without forward-looking."""
    log_reward: Tensor
    """(N,)"""


def beta_at(recipe: Recipe, epoch: int) -> float:
    """The inverse temperature of an epoch, in nats per unit of reward."""
    beta = _with_flow(recipe).beta
    if beta.anneal == "none":
        return beta.value
    done = epoch if beta.anneal == "linear_from_zero" else epoch + 1
    return beta.value * min(1.0, done / max(1.0, 0.5 * recipe.train.epochs))


class Units:
    """Turns what a rollout stored into what an objective sees; remembers the first rollout's reward scale.

    Args:
        latent_shape: (C, H, W), whose number of elements divides log-probs if the recipe asks for their mean.
    """

    def __init__(self, recipe: Recipe, schedule: Schedule, latent_shape: tuple[int, int, int]) -> None:
        self.recipe, self.alpha_bar_t = recipe, schedule.alpha_bar_t
        is_sum = recipe.objective.log_prob_reduction == "sum"
        self.reduction_factor = 1.0 if is_sum else 1.0 / math.prod(latent_shape)
        self.reward_scale = RewardScale()

    def see(self, reward: Tensor) -> None:
        """The first rewards (N,), of a whole rollout, fix the reward's standard units."""
        if _with_flow(self.recipe).beta.unit == "reward_sd" and not self.reward_scale.is_set:
            self.reward_scale = RewardScale.of(reward)

    def scalars(self, trajectories: Trajectories, epoch: int) -> Scalars:
        """The rollout at this epoch's beta."""
        looking = torch.zeros_like(trajectories.log_pf)
        if trajectories.looking is not None:
            looking = self.looking(trajectories.looking, epoch)
        return Scalars(
            log_pf=self.reduction_factor * trajectories.log_pf,
            log_pb=self.reduction_factor * trajectories.log_pb,
            looking=looking,
            log_reward=self.log_reward(trajectories.reward, epoch),
        )

    def log_reward(self, reward: Tensor, epoch: int) -> Tensor:
        """log R(x_0) = beta r, (N,), of final rewards."""
        return beta_at(self.recipe, epoch) * self.reward_scale(reward)

    def looking(self, reward: Tensor, epoch: int, k: int | None = None) -> Tensor:
        """beta w_k r of x0_hat rewards, (N, T), or of step k alone, (N,)."""
        weight = self.alpha_bar_t
        if _with_flow(self.recipe).forward_looking.weight == "one":
            weight = torch.ones_like(weight)
        return beta_at(self.recipe, epoch) * (weight if k is None else weight[k]) * self.reward_scale(reward)


def _with_flow(recipe: Recipe) -> DetailedBalance | KLDivergence:
    """The objective's section; only objectives with a flow have beta and forward-looking keys."""
    assert not isinstance(recipe.objective, PolicyGradient)
    return recipe.objective
