"""The part of a transition's loss that comes from the gradient of log F: the pull on the policy's mean, and nabla-DB's reverse.

Legend: B transitions of one step, D elements of a latent.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dag.chain.policy import Policy, Prediction
from dag.chain.schedule import Schedule
from dag.objectives import pathwise
from dag.objectives.log_scale import LogScale
from dag.recipe import NablaBalance, Recipe, ScalarBalance
from dag.training.flow_gradient import FlowGradient, Look, Rewarded


@dataclass(frozen=True)
class States:
    """B transitions of step k of one batch."""

    k: int
    x_t: Tensor
    """(B, C, H, W); with the reverse residual a float32 leaf that requires a gradient."""
    x_next: Tensor
    """(B, C, H, W)."""
    prediction: Prediction
    """The policy's at x_t, with its gradients."""
    pretrained: Tensor | None
    """(B, C, H, W) the pretrained network's output at x_t, or None if the loss does not need it."""
    text: Tensor
    """(B, S, D) embeddings of the prompts."""
    whose: Rewarded


@dataclass(frozen=True)
class Pull:
    """What the flow's gradient adds to B transitions, (B,) each."""

    pathwise: Tensor
    """Weighted KL to the target, with the policy's gradient."""
    unexplained: Tensor | None
    """log F(x_next) minus the function whose gradient the target has; None if the objective does not correct for it."""
    reverse: Tensor | None
    """Weighted square of nabla-DB's reverse residual, with the flow's gradient; None if the objective does not take it."""
    measured: dict[str, Tensor]
    """For the metrics: the norm of d log F / d x_next, and the KL to the pretrained policy where that is run, in nats."""


def kl_to(schedule: Schedule, states: States, target: pathwise.Target) -> Tensor:
    """(B,) the weighted KL of the policy's step to the target, in nats, with the policy's gradient."""
    ks = torch.full((len(states.x_t),), states.k, device=states.x_t.device)
    branches, scale = states.prediction.branches, states.prediction.guidance_scale
    kl = schedule.transition_log_probs(states.x_t, states.x_next, branches, ks, scale, target.output).kl
    assert kl is not None
    return target.weight * kl


class Pulls:
    """Forms the pulls of a recipe's objective, one that takes d log F / d x_next."""

    def __init__(self, recipe: Recipe, policy: Policy, flow_gradient: FlowGradient, log_scale: LogScale) -> None:
        section = recipe.objective
        self.policy, self.schedule = policy, policy.schedule
        self.flow_gradient, self.log_scale = flow_gradient, log_scale
        self.has_prior, self.latent_elements = recipe.has_prior, math.prod(policy.latent_shape)
        self.is_corrected = isinstance(section, ScalarBalance) and section.policy_gradient == "control_variate"
        self.nabla = section if isinstance(section, NablaBalance) else None

    @property
    def has_reverse(self) -> bool:
        """Whether the reverse residual is taken, for which predictions need gradients with respect to their states."""
        return self.nabla is not None and self.nabla.has_flow

    @property
    def is_mean(self) -> bool:
        """Whether squared residuals are averaged over the latent, without the variance of their step."""
        return self.nabla is not None and self.nabla.weight == "one"

    def __call__(self, states: States, look: Look, log_F_next: Tensor) -> Pull:
        """The pull of B transitions.

        Args:
            look:       the flow's gradient at x_next.
            log_F_next: (B,) the forward-looking term at x_next, or the log reward, as the rollout scored it. The learnt flow is
                not in it: its values are known, so that nothing of it is unexplained.
        """
        factor, unexplained = self.log_scale.reduction_factor, None
        # The reduction scales log-probs but not log F; the closed form has the sum of log-probs, so y is scaled instead.
        target = self._target(states, look.y / factor)
        kl = kl_to(self.schedule, states, target)
        if self.is_mean:
            kl = 2 / (self.schedule.sigma[states.k].square() * self.latent_elements) * kl
        if self.is_corrected:
            unexplained = (log_F_next - look.log_looking).detach()
        reverse = self._reverse(states) if self.has_reverse else None
        # Squared, since a score function's gradient is a residual times that of the reduced log-prob.
        return Pull(factor**2 * kl, unexplained, reverse, self._measured(states, look))

    @torch.no_grad()
    def _measured(self, states: States, look: Look) -> dict[str, Tensor]:
        measured = {"gradient_norm": look.y.flatten(1).norm(dim=1)}
        if states.pretrained is not None:
            measured["pretrained_kl"] = self.schedule.policy_kl(states.prediction.guided, states.pretrained, states.k)
        return measured

    def _target(self, states: States, y: Tensor) -> pathwise.Target:
        if self.has_prior:
            assert states.pretrained is not None
            return pathwise.against_pretrained(self.schedule, states.k, y, states.pretrained)
        if self.nabla is not None:
            return pathwise.against_noising_pointwise(self.schedule, states.k, y, states.x_t, states.x_next)
        return pathwise.against_noising(self.schedule, states.k, y, states.x_t)

    def _reverse(self, states: States) -> Tensor:
        """(B,) the weighted square of the reverse residual."""
        k, x, pretrained = states.k, states.x_t, None
        look = self.flow_gradient.through(x, states.prediction, k, states.whose, keeps_graph=True, has_flow=False)
        if self.has_prior:
            t = self.schedule.timesteps[k].expand(len(x))
            pretrained = self.policy.predict(x, t, states.text, pretrained=True).guided
        score = pathwise.reverse_score(self.schedule, k, x, states.x_next, states.prediction.guided, pretrained)
        residual = score + look.y + self.flow_gradient.of_flow(x, k, states.whose.prompt_id, is_trained=True)
        if self.is_mean:
            return residual.square().flatten(1).mean(1)
        return 0.5 * self.schedule.noising_std[k].square() * residual.square().flatten(1).sum(1)
