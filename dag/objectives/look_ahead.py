"""How well the reward of x0_hat predicts the reward of the final picture, step by step, measured on the rollouts.

The value of a state is fitted by a straight line for each step, V_k = a_k + w_k r(x0_hat(x_k)), with the final reward as V_T.
Two things follow. w_k is the weight of the forward-looking term in the flow (`forward_looking.weight: fitted`); the constants a_k
are left to the learnt flow. And the standard deviation of V_{k+1} - V_k says how much of the reward is decided in step k, hence
how much its transitions can teach (`train.step_choice: informative`).

Legend: N trajectories, T transitions.
"""

import torch
from torch import Tensor

# Weight of a new rollout in the running moments.
_RATE = 0.5
# Keeps the slope of a step finite whose x0_hat all have the same reward; in units of the final reward's variance.
_RIDGE = 1e-3


class LookAhead:
    """Running moments of the rewards along a chain, and the lines that follow from them.

    Attributes:
        mean:   (T + 1,) float64 means of r(x0_hat(x_0)), ..., r(x0_hat(x_{T-1})) and of the final reward.
        second: (T + 1, T + 1) float64 means of their products.
        count:  trajectories of the newest rollout; 0 before the first.
    """

    def __init__(self, num_transitions: int) -> None:
        self.mean = torch.zeros(num_transitions + 1, dtype=torch.float64)
        self.second = torch.zeros(num_transitions + 1, num_transitions + 1, dtype=torch.float64)
        self.count = 0

    def see(self, x0_hat_reward: Tensor, reward: Tensor) -> None:
        """Add a rollout's rewards of x0_hat (N, T) and of final pictures (N,), on any scale that stays the same."""
        rewards = torch.cat([x0_hat_reward, reward[:, None]], dim=1).double().cpu()
        rate = _RATE if self.count else 1.0
        self.mean = (1 - rate) * self.mean + rate * rewards.mean(0)
        self.second = (1 - rate) * self.second + rate * rewards.T @ rewards / len(rewards)
        self.count = len(rewards)

    def slopes(self) -> Tensor:
        """(T,) float32 w_k; ones before the first rollout."""
        return self._slopes()[:-1].float()

    def informativeness(self) -> Tensor:
        """(T,) float32 standard deviations of V_{k+1} - V_k, in units of reward; ones before the first rollout."""
        if not self.count:
            return torch.ones(len(self.mean) - 1)
        slopes = self._slopes()
        covariance = slopes[:, None] * self._covariance() * slopes
        variance, following = covariance.diagonal(), covariance.diagonal(1)
        return (variance[1:] + variance[:-1] - 2 * following).clamp(min=0).sqrt().float()

    def _slopes(self) -> Tensor:
        """(T + 1,) float64 slopes, of which the last, of the final reward itself, is 1."""
        if not self.count:
            return torch.ones_like(self.mean)
        covariance = self._covariance()
        ridge = _RIDGE * covariance[-1, -1].clamp(min=torch.finfo(torch.float64).tiny)
        variance = covariance.diagonal() + ridge
        slopes = covariance[:, -1] / variance
        # The positive part of the slope's square less its own noise variance: previews that say nothing get no weight.
        noise = (covariance[-1, -1] - slopes * covariance[:, -1]).clamp(min=0) / (self.count * variance)
        slopes = slopes.clamp(min=0) * (1 - noise / slopes.square().clamp(min=torch.finfo(torch.float64).tiny)).clamp(
            min=0
        )
        slopes[-1] = 1.0
        return slopes

    def _covariance(self) -> Tensor:
        return self.second - self.mean[:, None] * self.mean

    def tensors(self) -> dict[str, Tensor]:
        """The moments, for a checkpoint."""
        return {"reward_mean": self.mean, "reward_second": self.second, "reward_count": torch.tensor(self.count)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` returned; checkpoints of earlier versions have none of it."""
        if "reward_mean" in tensors:
            self.mean, self.second = tensors["reward_mean"].cpu(), tensors["reward_second"].cpu()
            self.count = int(tensors["reward_count"])
