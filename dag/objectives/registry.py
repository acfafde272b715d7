"""The dict of objectives, their interface, and the losses that they share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from dag_kernels import BalanceLoss, Kernels
from torch import Tensor

from dag.objectives.transition import Transition
from dag.recipe import ScalarBalance
from dag.recipe.registry import Registry

OBJECTIVES = Registry("objective")


@dataclass(frozen=True)
class ObjectiveOutput:
    """An objective's numbers for B transitions; training averages the loss over all transitions of the update."""

    loss: Tensor
    """(B,) with gradients."""
    ratio: Tensor
    """(B,) detached: P_F now divided by P_F at sampling time, in the recipe's reduction."""
    residual: Tensor | None = None
    """(B,) detached detailed-balance residual, unscaled, in nats of the recipe's reduction; None without a flow."""
    clipped: Tensor | None = None
    """(B,) bool, whether the ratio was outside the clip range; None for an objective that does not clip."""
    per_step: Mapping[str, Tensor] = field(default_factory=dict)
    """What training adds for the metrics, by name: (T, 2) sums and counts of a number of each step's transitions."""


class Objective(Protocol):
    """The interface of an objective. `BatchFree` implements all but the loss for one that needs nothing but transitions."""

    uses_flow: bool
    """Whether a state flow is trained with the policy."""

    def __call__(self, transition: Transition) -> ObjectiveOutput: ...

    def observe(self, reward: Tensor, prompt_id: Tensor) -> Tensor | None:
        """(N,) advantages from the final rewards (N,) of a rollout, or None; called once per stored rollout.

        Args:
            prompt_id: (N,) int64.
        """
        ...

    def advantages(self, residuals: Tensor, residual_scale: Tensor, running_mean: Tensor) -> Tensor | None:
        """(N, T) advantages from the residuals (N, T) of all trajectories of an update, or None.

        One pass knows less: it calls this for each step of a micro-batch, with T = 1 and the micro-batch's rows.

        Args:
            residual_scale: (T,) what the residuals of each step are divided by.
            running_mean:   (T,) running means of the residuals of earlier rollouts.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class BatchFree:
    """The base of an objective that forms no advantages from a rollout or an update, and keeps no state."""

    def observe(self, reward: Tensor, prompt_id: Tensor) -> Tensor | None:
        return None

    def advantages(self, residuals: Tensor, residual_scale: Tensor, running_mean: Tensor) -> Tensor | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None


def balance_loss(
    transition: Transition,
    log_pf: Tensor,
    config: ScalarBalance,
    kernels: Kernels,
    policy_weight: Tensor | None = None,
) -> BalanceLoss:
    """The detailed-balance loss of B transitions with `log_pf` (B,) in place of the transition's own log P_F.

    Args:
        policy_weight: (B,) weight of the gradient through log P_F; None is 1.
    """
    assert transition.log_F_tilde is not None and transition.log_F_tilde_next is not None
    balance = kernels.detailed_balance(
        transition.log_F_tilde,
        log_pf,
        transition.log_pb,
        transition.log_F_tilde_next,
        log_looking=transition.log_looking,
        log_looking_next=transition.log_looking_next,
        log_reward=transition.log_reward,
        is_terminal=transition.is_terminal,
        scale=transition.residual_scale,
        policy_weight=policy_weight,
        huber=config.huber,
        detach_next=config.detach_next,
    )
    weight = transition.residual_weight
    return balance if weight is None else balance._replace(loss=weight * balance.loss)


def pathwise_loss(transition: Transition) -> Tensor:
    """(B,) the closed form of the per-step KL, whose gradient is d/d theta of E_{P_F}[residual], see `dag.objectives.pathwise`.

    Balanced weights are squared here: the gradient of this KL grows with (b / sigma)^2, that of a score function with b / sigma.
    """
    assert transition.pathwise is not None
    weight = transition.policy_weight
    return transition.pathwise if weight is None else weight.square() * transition.pathwise


def log_ratio(transition: Transition) -> Tensor:
    """(B,) log P_F now - log P_F at sampling time, with the policy's gradient."""
    return transition.log_pf - transition.log_pf_old


def clipped_surrogate(advantage: Tensor, log_ratio: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """(PPO's loss max(-A ratio, -A clip(ratio, 1 - c, 1 + c)), whether the ratio is outside the clip range), (B,) each."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped), (ratio - 1).abs() > clip_range
