"""The dict of objectives, their interface, and the losses that they share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from dag_kernels import PLAIN, BalanceLoss, Kernels
from torch import Tensor

from dag.objectives.transition import Transition
from dag.recipe import ScalarBalance
from dag.recipe.registry import Registry
from dag.recipe.section import Section

OBJECTIVES = Registry("objective")
Config = TypeVar("Config", bound=Section)


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


@dataclass(frozen=True)
class UpdateScalars:
    """What is known of the N trajectories of an update, those of all processes, before its gradient is taken.

    They are in the order in which one process would have sampled them, so that the trajectories of a group are neighbours.
    Log-probs and rewards are in nats, in the recipe's reduction. In one pass it is what is known of one step (T = 1) of a
    micro-batch: residuals and their statistics.
    """

    log_ratio: Tensor | None = None
    """(N, T) log P_F - log P_B at sampling time, or minus the pretrained model's log P_F."""
    log_reward: Tensor | None = None
    """(N,) beta r(x_0); None for an objective without a target."""
    reward: Tensor | None = None
    """(N,) r(x_0) as it was scored."""
    values: Tensor | None = None
    """(N, T) the final reward that the reward critic expects from each state; None for an objective that takes none."""
    residuals: Tensor | None = None
    """(N, T) detailed-balance residuals, or (N, 1) those of whole trajectories; None without a state flow that learns values."""
    residual_scale: Tensor | None = None
    """(T,) what the residuals of each step are divided by."""
    running_mean: Tensor | None = None
    """(T,) running means of the residuals of earlier rollouts."""
    is_off_policy: bool = False
    """Whether another policy, or P_B, gave the trajectories. `log_ratio` then has the present policy's log P_F."""
    log_start: Tensor | None = None
    """(N,) log p(x_T) of the first noise, up to a constant; only off-policy, and None if it cancels in the balance."""


class Objective(Protocol):
    """The interface of an objective. `Plain` implements all but the loss for one that needs nothing but transitions."""

    uses_flow: bool
    """Whether a state flow is trained with the policy."""

    def __call__(self, transition: Transition) -> ObjectiveOutput: ...

    def observe(self, reward: Tensor, prompt_id: Tensor) -> Tensor | None:
        """(N,) advantages from the final rewards (N,) of a rollout, or None; called once per stored rollout.

        Args:
            prompt_id: (N,) int64.
        """
        ...

    def advantages(self, update: UpdateScalars) -> Tensor | None:
        """(N, T) advantages of an update's transitions, or None; called before each update, in one pass for each step."""
        ...

    def flow_slopes(self, update: UpdateScalars) -> Tensor | None:
        """(N, T) derivatives of each transition's loss with respect to its log F~, or None if the loss has them itself; called
        before each update of a stored rollout."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Plain(Generic[Config]):
    """The base of an objective that forms no advantages from a rollout or an update, and keeps no state.

    Args:
        config:    the recipe's section `objective`.
        kernels:   compute the balance of a flow that learns values.
        per_group: trajectories of a group, which share their prompt and are neighbours (`prompts.per_group`).
    """

    uses_flow = False

    def __init__(self, config: Config, kernels: Kernels = PLAIN, per_group: int = 1) -> None:
        self.config, self.kernels, self.per_group = config, kernels, per_group

    def observe(self, reward: Tensor, prompt_id: Tensor) -> Tensor | None:
        return None

    def advantages(self, update: UpdateScalars) -> Tensor | None:
        return None

    def flow_slopes(self, update: UpdateScalars) -> Tensor | None:
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


def surrogate_output(transition: Transition, clip_range: float) -> ObjectiveOutput:
    """The output of an objective whose loss is the clipped surrogate of the transition's advantage and, if it forms a slope of the
    flow, that slope times log F~."""
    assert transition.advantage is not None
    loss, clipped = clipped_surrogate(transition.advantage, log_ratio(transition), clip_range)
    if transition.policy_weight is not None:
        loss = transition.policy_weight * loss
    if transition.flow_slope is not None and transition.log_F_tilde is not None:
        loss = loss + transition.flow_slope * transition.log_F_tilde
    return ObjectiveOutput(loss=loss, ratio=log_ratio(transition).detach().exp(), clipped=clipped)
