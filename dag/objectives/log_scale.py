"""Converts a rollout's log-probs and rewards to the scale of the objective: nats, in the recipe's reduction of log-probs.

    log R(x_0) = beta (r(x_0) - mean) / sd,        log_looking_k = beta w_k (r(x0_hat(x_k)) - mean) / sd

With `beta.unit: reward_sd`, mean and sd are those of the first rollout's rewards; else they are 0 and 1.

Legend: N trajectories, T transitions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dag.chain.schedule import Schedule
from dag.chain.trajectory import Trajectories
from dag.objectives.look_ahead import LookAhead
from dag.recipe import Recipe, Target


@dataclass(frozen=True)
class RewardScale:
    """(reward - mean) / sd; the identity until mean and sd are set."""

    mean: float = 0.0
    sd: float = 1.0
    is_set: bool = False

    @classmethod
    def of(cls, reward: Tensor) -> "RewardScale":
        """The scale that standardises rewards (N,); if they are all equal, sd is 1."""
        sd = float(reward.std(correction=0))
        return cls(float(reward.mean()), sd if sd > 0 else 1.0, True)

    def __call__(self, reward: Tensor) -> Tensor:
        return (reward - self.mean) / self.sd


@dataclass(frozen=True)
class LogTerms:
    """The terms of detailed balance apart from the learnt flow, in nats, at one epoch's beta.

    Where the flow is log Z of a whole trajectory (`log_z: flow`), the trajectory is one step of the balance: T = 1.
    """

    log_pf: Tensor
    """(N, T) log P_F at sampling time."""
    log_pb: Tensor
    """(N, T) log P_B, or the log-probs of the prior."""
    log_looking: Tensor
    """(N, T) beta w_k r(x0_hat); zeros without forward-looking."""
    log_reward: Tensor
    """(N,) beta r(x_0)."""


def beta_at(target: Target, epoch: int, epochs: int) -> float:
    """The inverse temperature in an epoch (counted from 0) of a run of `epochs`, in nats per unit of reward."""
    beta = target.beta
    if beta.anneal == "none":
        return beta.value
    steps = epoch if beta.anneal == "linear_from_zero" else epoch + 1
    return beta.value * min(1.0, steps / max(1.0, 0.5 * epochs))


class LogScale:
    """Converts to the scale of the recipe's objective, and keeps the reward scale of the first rollout.

    `reduction_factor` turns sums of log-probs into the recipe's reduction, for every objective. Rewards are only converted
    for an objective with a target distribution; for others the methods must not be called.

    Args:
        latent_shape: (C, H, W); its number of elements divides log-probs if the recipe asks for their mean.
    """

    def __init__(self, recipe: Recipe, schedule: Schedule, latent_shape: tuple[int, int, int]) -> None:
        self.target, self.balance, self.epochs = recipe.target, recipe.balance, recipe.train.epochs
        self.alpha_bar_t, self.sums_steps = schedule.alpha_bar_t, recipe.objective.flow_is_log_z
        is_sum = recipe.objective.log_prob_reduction == "sum"
        self.reduction_factor = 1.0 if is_sum else 1.0 / math.prod(latent_shape)
        self.reward_scale = RewardScale()
        self.look_ahead = None if recipe.forward_looking is None else LookAhead(schedule.num_transitions)

    def see(self, reward: Tensor, x0_hat_reward: Tensor | None) -> None:
        """Learn from the rewards of a new rollout: the reward scale, if it is needed and not set yet, and the look-ahead.

        Args:
            reward:        (N,) of final pictures.
            x0_hat_reward: (N, T), or None without forward-looking.
        """
        assert self.target is not None
        if self.target.beta.unit == "reward_sd" and not self.reward_scale.is_set:
            self.reward_scale = RewardScale.of(reward)
        if self.look_ahead is not None and x0_hat_reward is not None:
            self.look_ahead.see(self.reward_scale(x0_hat_reward), self.reward_scale(reward))

    def terms(self, trajectories: Trajectories, epoch: int) -> LogTerms:
        """The terms of a rollout at this epoch's beta."""
        reward = trajectories.x0_hat_reward
        log_pf, log_pb = (self.reduction_factor * table for table in (trajectories.log_pf, trajectories.log_pb))
        if self.sums_steps:
            # In float64: the sums are large, and what is left of their difference is small.
            log_pf, log_pb = (table.double().sum(1, keepdim=True) for table in (log_pf, log_pb))
        return LogTerms(
            log_pf=log_pf,
            log_pb=log_pb,
            log_looking=torch.zeros_like(log_pf) if reward is None else self.log_looking(reward, epoch),
            log_reward=self.log_reward(trajectories.reward, epoch),
        )

    def log_reward(self, reward: Tensor, epoch: int) -> Tensor:
        """(N,) log R(x_0) = beta r(x_0), from the rewards r (N,) of final images."""
        return self._beta(epoch) * self.reward_scale(reward)

    def log_looking(self, reward: Tensor, epoch: int, k: int | None = None) -> Tensor:
        """Forward-looking terms beta w_k r(x0_hat), from the rewards r (N, T) of all states, or (N,) of state k alone."""
        weight = self.weights()
        return self._beta(epoch) * (weight if k is None else weight[k]) * self.reward_scale(reward)

    def weights(self) -> Tensor:
        """(T,) w_k on the policy's device."""
        assert self.balance is not None
        kind = self.balance.forward_looking.weight
        if kind == "fitted":
            assert self.look_ahead is not None
            return self.look_ahead.slopes().to(self.alpha_bar_t.device)
        return torch.ones_like(self.alpha_bar_t) if kind == "one" else self.alpha_bar_t

    def slope(self, epoch: int, k: int) -> Tensor:
        """() the derivative of log F at state k with respect to the raw reward of its x0_hat, or of the final picture (k = T).

        It is beta w_k / sd, in nats per unit of reward; w_T = 1.
        """
        scale = self._beta(epoch) / self.reward_scale.sd
        is_final = k == len(self.alpha_bar_t)
        return scale * (torch.ones_like(self.alpha_bar_t[0]) if is_final else self.weights()[k])

    def _beta(self, epoch: int) -> float:
        assert self.target is not None
        return beta_at(self.target, epoch, self.epochs)
