"""What a micro-batch of transitions costs: the objective's loss and the regulariser, with gradients.

Legend: N trajectories, B rows of a micro-batch, T transitions.
"""

import math
from dataclasses import dataclass, replace

import torch
from dag_kernels import TransitionLogProbs
from torch import Tensor

from dag.chain.policy import Policy, Prediction
from dag.chain.rollout import Score, look_ahead
from dag.chain.trajectory import Rows, Trajectories, count, on_cpu
from dag.objectives import Objective, ObjectiveOutput
from dag.objectives.log_scale import Scalars, Units
from dag.objectives.transition import Transition
from dag.recipe import PolicyGradient, Recipe
from dag.training.embeddings import Embeddings
from dag.training.flow_fit import FlowFit


@dataclass(frozen=True)
class Rollout:
    """What every update on one rollout looks at."""

    trajectories: Trajectories
    scalars: Scalars | None
    """None for objectives without a flow."""
    epoch: int
    groups: int
    """Updates that share the trajectories."""
    score: Score | None = None
    """Rewards of images of trajectory rows; only `forward_looking.source: current` calls it."""


class Loss:
    """The objective on the transitions that a policy is trained on.

    Args:
        flow_fit: None for objectives without a flow.
        text:     embeddings of the recipe's prompts.
        units:    of log-probs and rewards.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        objective: Objective,
        flow_fit: FlowFit | None,
        text: Embeddings,
        units: Units,
    ) -> None:
        self.recipe, self.policy, self.objective = recipe, policy, objective
        self.flow_fit, self.text, self.units = flow_fit, text, units
        self.schedule, self.device = policy.schedule, policy.schedule.timesteps.device
        is_balanced = recipe.objective.step_weight == "balanced"
        ones = torch.ones(self.schedule.num_transitions, device=self.device)
        self.policy_weight = self.schedule.balanced_weights() if is_balanced else ones

    def rows(
        self, rollout: Rollout, rows: Rows, k: int, advantages: Tensor | None = None
    ) -> tuple[ObjectiveOutput, Tensor]:
        """(objective output, regulariser (B,)) of step k of some trajectories, with gradients."""
        trajectories = rollout.trajectories
        x_t, x_next = trajectories.states(k, rows), trajectories.states(k + 1, rows)
        prediction = self._predict(rollout, rows, k)
        ks = torch.full((count(rows),), k, device=self.device)
        now = self.schedule.transition_log_probs(
            x_t, x_next, prediction.rows, ks, prediction.guidance_scale, *self._references(rollout, rows, k)
        )
        transition = self.transition(ks, now, trajectories.log_pf[rows, k], trajectories.log_pb[rows, k])
        if advantages is not None:
            transition = replace(transition, advantage=advantages[rows, k])
        if self.flow_fit is not None and rollout.scalars is not None:
            transition = self._with_flows(transition, self.flow_fit, rollout.scalars, rollout, rows, k, prediction)
        return self.output(transition, k), self.regulariser(now)

    def transition(self, ks: Tensor, now: TransitionLogProbs, log_pf_old: Tensor, log_pb: Tensor) -> Transition:
        """Transitions of steps (B,) without their flows; log-probs are sums over latent dims, (B,)."""
        factor = self.units.reduction_factor
        return Transition(
            k=ks,
            is_terminal=ks == self.schedule.num_transitions - 1,
            log_pf=factor * now.log_pf,
            log_pf_old=factor * log_pf_old,
            log_pb=factor * log_pb,
            log_reward=torch.zeros_like(log_pb),
            policy_weight=self.policy_weight[ks],
        )

    def output(self, transition: Transition, k: int) -> ObjectiveOutput:
        """The objective's, weighted as step k."""
        output = self.objective(transition)
        return output if self.flow_fit is None else replace(output, loss=self.flow_fit.step_weights()[k] * output.loss)

    def _predict(self, rollout: Rollout, rows: Rows, k: int, **switches: bool) -> Prediction:
        text = self.text.rows(rollout.trajectories.prompt_id[on_cpu(rows)])
        t = self.schedule.timesteps[k].expand(count(rows))
        return self.policy.predict(rollout.trajectories.states(k, rows), t, text, **switches)

    def _with_flows(
        self,
        transition: Transition,
        flow_fit: FlowFit,
        scalars: Scalars,
        rollout: Rollout,
        rows: Rows,
        k: int,
        prediction: Prediction,
    ) -> Transition:
        nothing = torch.zeros_like(transition.log_pb)
        log_F_tilde = flow_fit.log_F_tilde(rollout.trajectories, rows, k)
        log_F_tilde_next, looking_next = nothing, nothing
        looking = self._looking(rollout, scalars, rows, k, prediction)
        if k < self.schedule.num_transitions - 1:
            log_F_tilde_next = flow_fit.log_F_tilde(rollout.trajectories, rows, k + 1)
            looking_next = self._looking(rollout, scalars, rows, k + 1)
        return replace(
            transition,
            log_reward=scalars.log_reward[rows],
            residual_scale=flow_fit.residual_scale[transition.k],
            log_F_tilde=log_F_tilde,
            log_F_tilde_next=log_F_tilde_next,
            looking=looking,
            looking_next=looking_next,
        )

    @torch.no_grad()
    def _looking(
        self, rollout: Rollout, scalars: Scalars, rows: Rows, k: int, prediction: Prediction | None = None
    ) -> Tensor:
        """(B,) forward-looking term at state k: the rollout's, or (published) of the current policy's x0_hat."""
        assert not isinstance(self.recipe.objective, PolicyGradient)
        section = self.recipe.objective.forward_looking
        if section.source != "current":
            return scalars.looking[rows, k]
        assert rollout.score is not None
        prediction = prediction or self._predict(rollout, rows, k, unguided=section.prediction == "conditional")
        x_t = rollout.trajectories.states(k, rows)
        x0_hat = look_ahead(self.schedule, x_t, prediction.guided, prediction.conditional, k, section)
        index = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.cpu()
        reward = rollout.score(self.policy.preview(x0_hat), index, is_preview=True).to(self.device)
        return self.units.looking(reward, rollout.epoch, k)

    @torch.no_grad()
    def _references(self, rollout: Rollout, rows: Rows, k: int) -> tuple[Tensor | None, Tensor | None]:
        """(B, C, H, W) outputs of the pretrained and of the sampling-time policy, each None if nothing pulls to it."""
        weights, pretrained, old = self.recipe.regulariser, None, None
        if weights.pretrained_kl > 0:
            pretrained = self._predict(rollout, rows, k, pretrained=True).guided
        if weights.sampling > 0:
            old = rollout.trajectories.output_old(self.schedule, rows, k)
        return pretrained, old

    def regulariser(self, now: TransitionLogProbs) -> Tensor:
        """(B,) pull towards the sampling-time prediction and towards the pretrained policy."""
        weights, total = self.recipe.regulariser, torch.zeros_like(now.log_pb)
        if now.gap is not None:
            total = total + weights.sampling / math.prod(self.policy.latent_shape) * now.gap
        if now.kl is not None:
            total = total + weights.pretrained_kl * now.kl
        return total
