"""The numbers of a rollout on the scale that an objective works on: nats, in the recipe's reduction of log-probs.

    log R(x_0) = beta (r(x_0) - mean) / sd,        log_looking_k = beta w_k (r(x0_hat(x_k)) - mean) / sd

Mean and sd are those of the first rollout with `beta.unit: reward_sd`, else 0 and 1.

Legend: N trajectories, T transitions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dag.chain.schedule import Schedule
from dag.chain.trajectory import Trajectories
from dag.recipe import Balance, Recipe


@dataclass(frozen=True)
class RewardScale:
    """Raw rewards to standard ones; the identity until it is set."""

    mean: float = 0.0
    sd: float = 1.0
    is_set: bool = False

    @classmethod
    def of(cls, reward: Tensor) -> "RewardScale":
        """The standard units of rewards (N,); a constant reward keeps its unit."""
        sd = float(reward.std(correction=0))
        return cls(float(reward.mean()), sd if sd > 0 else 1.0, True)

    def __call__(self, reward: Tensor) -> Tensor:
        return (reward - self.mean) / self.sd


@dataclass(frozen=True)
class LogTerms:
    """What an objective balances, but for the learnt flow; all in nats, at one epoch's beta."""

    log_pf: Tensor
    """(N, T) at sampling time."""
    log_pb: Tensor
    """(N, T)"""
    log_looking: Tensor
    """(N, T) forward-looking terms; zeros without forward-looking."""
    log_reward: Tensor
    """(N,)"""


def beta_at(balance: Balance, epoch: int, epochs: int) -> float:
    """The inverse temperature of one of so many epochs, in nats per unit of reward."""
    beta = balance.beta
    if beta.anneal == "none":
        return beta.value
    done = epoch if beta.anneal == "linear_from_zero" else epoch + 1
    return beta.value * min(1.0, done / max(1.0, 0.5 * epochs))


class LogScale:
    """Turns what a rollout stored into what an objective sees; remembers the first rollout's reward scale.

    Log-probs are scaled for every objective. Rewards are scaled only for one that balances a flow.

    Args:
        latent_shape: (C, H, W), whose number of elements divides log-probs if the recipe asks for their mean.
    """

    def __init__(self, recipe: Recipe, schedule: Schedule, latent_shape: tuple[int, int, int]) -> None:
        self.balance, self.epochs, self.alpha_bar_t = recipe.balance, recipe.train.epochs, schedule.alpha_bar_t
        is_sum = recipe.objective.log_prob_reduction == "sum"
        self.reduction_factor = 1.0 if is_sum else 1.0 / math.prod(latent_shape)
        self.reward_scale = RewardScale()

    def see(self, reward: Tensor) -> None:
        """The first rewards (N,), of a complete rollout, fix the reward's standard units."""
        assert self.balance is not None
        if self.balance.beta.unit == "reward_sd" and not self.reward_scale.is_set:
            self.reward_scale = RewardScale.of(reward)

    def terms(self, trajectories: Trajectories, epoch: int) -> LogTerms:
        """The rollout at this epoch's beta."""
        reward = trajectories.x0_hat_reward
        return LogTerms(
            log_pf=self.reduction_factor * trajectories.log_pf,
            log_pb=self.reduction_factor * trajectories.log_pb,
            log_looking=torch.zeros_like(trajectories.log_pf) if reward is None else self.log_looking(reward, epoch),
            log_reward=self.log_reward(trajectories.reward, epoch),
        )

    def log_reward(self, reward: Tensor, epoch: int) -> Tensor:
        """log R(x_0) = beta r of final rewards (N,)."""
        return self._beta(epoch) * self.reward_scale(reward)

    def log_looking(self, reward: Tensor, epoch: int, k: int | None = None) -> Tensor:
        """beta w_k r of x0_hat rewards (N, T), or of step k alone (N,)."""
        assert self.balance is not None
        weight = self.alpha_bar_t
        if self.balance.forward_looking.weight == "one":
            weight = torch.ones_like(weight)
        return self._beta(epoch) * (weight if k is None else weight[k]) * self.reward_scale(reward)

    def _beta(self, epoch: int) -> float:
        assert self.balance is not None
        return beta_at(self.balance, epoch, self.epochs)
