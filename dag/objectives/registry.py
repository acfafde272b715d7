"""The dict of objectives, and what each returns."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from dag_kernels import BalanceLoss, Kernels
from torch import Tensor

from dag.objectives.transition import Transition
from dag.recipe import DetailedBalance, KLDivergence
from dag.recipe.registry import Registry

OBJECTIVES = Registry("objective")


@dataclass(frozen=True)
class ObjectiveOutput:
    """Rows of a micro-batch; the trainer averages them over the whole update."""

    loss: Tensor
    """(B,) with gradients."""
    ratio: Tensor
    """(B,) detached, P_F now over P_F at sampling time (in the recipe's reduction)."""
    residual: Tensor | None = None
    """(B,) detached, unscaled, in nats of the recipe's reduction."""
    clipped: Tensor | None = None
    """(B,) bool, rows whose ratio was clipped."""


class Objective(Protocol):
    """What the learner asks of an objective; `BatchFree` answers for one that needs nothing but transitions."""

    uses_flow: bool

    def __call__(self, transition: Transition) -> ObjectiveOutput: ...

    def observe(self, reward: Tensor, prompt_id: Tensor) -> Tensor | None:
        """Once per rollout: (N,) advantages formed from final rewards (N,), or None."""
        ...

    def advantages(self, residuals: Tensor, residual_scale: Tensor, running_mean: Tensor) -> Tensor | None:
        """(N, T) advantages of an update's residuals (N, T), or None.

        Args:
            residual_scale: (T,)
            running_mean:   (T,) of the residuals of earlier rollouts.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class BatchFree:
    """No advantages, no state."""

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
    config: DetailedBalance | KLDivergence,
    kernels: Kernels,
    policy_weight: Tensor | None = None,
) -> BalanceLoss:
    """The detailed-balance loss of a micro-batch with these log P_F, (B,)."""
    assert transition.log_F_tilde is not None and transition.log_F_tilde_next is not None
    return kernels.detailed_balance(
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


def log_ratio(transition: Transition) -> Tensor:
    """log P_F now - log P_F at sampling time, (B,), with the policy's gradient."""
    return transition.log_pf - transition.log_pf_old


def clipped_surrogate(advantage: Tensor, log_ratio: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic loss max(-A ratio, -A clip(ratio, 1 - c, 1 + c)), (B,), and which rows left the clip range."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped), (ratio - 1).abs() > clip_range
