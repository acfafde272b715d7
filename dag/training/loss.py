"""The loss of a micro-batch of transitions: the objective and the regularisers, with gradients.

Legend: N trajectories, B transitions of a micro-batch, T transitions of a trajectory.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from dag_kernels import TransitionLogProbs
from torch import Tensor

from dag.chain.policy import Policy, Prediction
from dag.chain.rollout import Score, predicted_x0
from dag.chain.trajectory import Rows, Trajectories, as_index, count, on_cpu
from dag.objectives import Objective, ObjectiveOutput
from dag.objectives.log_scale import LogScale, LogTerms
from dag.objectives.transition import Transition
from dag.recipe import Recipe
from dag.training.embeddings import Embeddings
from dag.training.flow_fit import FlowFit
from dag.training.flow_gradient import Rewarded
from dag.training.pull import Pull, Pulls, States


@dataclass(frozen=True)
class Rollout:
    """A rollout as all its updates use it."""

    trajectories: Trajectories
    terms: LogTerms | None
    """The terms of detailed balance; None for objectives without a flow."""
    epoch: int
    groups: int
    """The number of updates that share the trajectories."""
    score: Score | None = None
    """Computes the rewards of images of these trajectories, for `forward_looking.source: current`, and their gradients."""
    is_off_policy: bool = False
    """Another policy, or P_B, gave the trajectories: P_F at sampling time has no part in the loss, and the ratio is 1."""


@dataclass(frozen=True)
class StepOutput:
    """A trained step of a micro-batch."""

    k: int
    """The step; of an objective that noises pictures anew, the number of the draw."""
    weight: float
    """Importance weight of the step."""
    output: ObjectiveOutput
    regulariser: Tensor
    """(B,)."""


@dataclass(frozen=True)
class Tables:
    """(N, T) numbers of an update's transitions that its objective forms before the gradient; None where it forms none."""

    advantage: Tensor | None = None
    flow_slope: Tensor | None = None


class Losses(Protocol):
    """Gives the losses of an update's micro-batches: of single steps, or along chains, or of pictures that are noised anew."""

    @property
    def is_sweep(self) -> bool:
        """Whether the steps of a micro-batch are computed together, since one needs what the next has found."""
        ...

    def steps(
        self, rollout: Rollout, rows: Rows, chosen: Sequence[tuple[int, float]], tables: Tables, update: int
    ) -> Iterator[StepOutput]:
        """The chosen steps of the trajectories `rows`; each is to be back-propagated before the next is asked for.

        Args:
            chosen: [(k, importance weight)] in ascending order.
            update: number of the update in the run.
        """
        ...


@dataclass(frozen=True)
class FlowTerms:
    """The terms of the state flow at both ends of B transitions, (B,) each, in nats."""

    log_F_tilde: Tensor
    """Learnt flow at x_t, with gradients."""
    log_F_tilde_next: Tensor
    """Learnt flow at x_next; ignored in the last transition."""
    log_looking: Tensor
    """Forward-looking term at x_t."""
    log_looking_next: Tensor
    """Forward-looking term at x_next; ignored in the last transition."""
    log_reward: Tensor
    """Takes the place of the flow at x_next in the last transition, and is ignored elsewhere."""


class Loss:
    """The objective and the regularisers for the transitions of a policy.

    Args:
        flow_fit:  the state flow; None for objectives without one.
        pulls:     forms the pulls of the flow's gradient; None for objectives that take the flow's values alone.
        text:      embeddings of the recipe's prompts.
        log_scale: converts log-probs and rewards to the objective's scale.
    """

    is_sweep = False

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        objective: Objective,
        flow_fit: FlowFit | None,
        pulls: Pulls | None,
        text: Embeddings,
        log_scale: LogScale,
    ) -> None:
        self.regularisers, self.forward_looking = recipe.regulariser, recipe.forward_looking
        self.policy, self.objective, self.pulls = policy, objective, pulls
        self.flow_fit, self.text, self.log_scale = flow_fit, text, log_scale
        self.has_residual = recipe.objective.fits_flow
        self.pulls_to_pretrained = pulls is not None and recipe.has_prior
        self.schedule, self.device = policy.schedule, policy.schedule.timesteps.device
        is_balanced = recipe.objective.step_weight == "balanced"
        ones = torch.ones(self.schedule.num_transitions, device=self.device)
        self.policy_weight = self.schedule.balanced_weights() if is_balanced else ones

    # -- one transition, of a stored rollout or in one pass -----------------------------------------------------

    @torch.no_grad()
    def pretrained(self, x_t: Tensor, k: int, text: Tensor) -> Tensor | None:
        """The pretrained network's output (B, C, H, W) at B states of step k, or None if the loss does not need it.

        Args:
            text: (B, S, D) embeddings of the prompts.
        """
        if self.regularisers.pretrained_kl == 0 and not self.pulls_to_pretrained:
            return None
        return self.policy.predict(x_t, self.schedule.timesteps[k].expand(len(x_t)), text, pretrained=True).guided

    def log_probs(
        self,
        x_t: Tensor,
        x_next: Tensor,
        prediction: Prediction,
        k: int,
        pretrained: Tensor | None = None,
        old: Tensor | None = None,
    ) -> TransitionLogProbs:
        """The log-probs of B transitions of step k, as sums over latent dims, and what the regularisers need.

        Args:
            pretrained: what `pretrained` returned.
            old:        (B, C, H, W) network output at sampling time; only needed with `regulariser.sampling`.
        """
        ks = torch.full((len(x_t),), k, device=self.device)
        reference = pretrained if self.regularisers.pretrained_kl > 0 else None
        return self.schedule.transition_log_probs(
            x_t, x_next, prediction.branches, ks, prediction.guidance_scale, reference, old
        )

    def transition(
        self,
        k: int,
        now: TransitionLogProbs,
        log_pf_old: Tensor,
        log_pb: Tensor,
        flows: FlowTerms | None = None,
        advantage: Tensor | None = None,
        pull: Pull | None = None,
        flow_slope: Tensor | None = None,
    ) -> Transition:
        """B transitions of step k in the form that the objective takes.

        Args:
            now:        log-probs with the policy's gradients.
            log_pf_old: (B,) log P_F at sampling time, sums over latent dims.
            log_pb:     (B,) log P_B, or the log-prob of the prior, sums over latent dims.
            flows:      terms of the state flow; None for objectives without one.
            advantage:  (B,) for objectives that form advantages.
            flow_slope: (B,) for objectives that form it.
            pull:       of the flow's gradient, for objectives that take it.
        """
        factor, ks = self.log_scale.reduction_factor, torch.full((len(log_pb),), k, device=self.device)
        transition = Transition(
            k=ks,
            is_terminal=ks == self.schedule.num_transitions - 1,
            log_pf=factor * now.log_pf,
            log_pf_old=factor * log_pf_old,
            log_pb=factor * log_pb,
            log_reward=torch.zeros_like(log_pb),
            advantage=advantage,
            flow_slope=flow_slope,
            policy_weight=self.policy_weight[ks],
            pathwise=None if pull is None else pull.pathwise,
            reverse=None if pull is None else pull.reverse,
            unexplained=None if pull is None else pull.unexplained,
        )
        if flows is None or self.flow_fit is None:
            return transition
        ks = ks.clamp(max=self.flow_fit.num_steps - 1)
        scale, weight = self.flow_fit.residual_scale[ks], self.flow_fit.step_weights()[ks]
        return replace(transition, **vars(flows), residual_scale=scale, residual_weight=weight)

    def output(self, transition: Transition, k: int, pull: Pull | None) -> ObjectiveOutput:
        """The objective's output for transitions of step k, with what was measured on the way."""
        output = self.objective(transition)
        return output if pull is None else replace(output, per_step=self._per_step(pull.measured, k))

    def _per_step(self, measured: dict[str, Tensor], k: int) -> dict[str, Tensor]:
        """(T, 2) sums and counts of numbers (B,) of step k, by name."""
        found = {name: torch.zeros(self.schedule.num_transitions, 2, device=self.device) for name in measured}
        for name, values in measured.items():
            found[name][k, 0], found[name][k, 1] = values.sum(), len(values)
        return found

    def regulariser(self, now: TransitionLogProbs) -> Tensor:
        """(B,) weighted sum of the regularisers: distance to the output at sampling time, KL to the pretrained policy."""
        weights, total = self.regularisers, torch.zeros_like(now.log_pb)
        if now.gap is not None:
            total = total + weights.sampling / math.prod(self.policy.latent_shape) * now.gap
        if now.kl is not None:
            total = total + weights.pretrained_kl * now.kl
        return total

    # -- transitions of a stored rollout -------------------------------------------------------------------------

    def steps(
        self, rollout: Rollout, rows: Rows, chosen: Sequence[tuple[int, float]], tables: Tables, update: int
    ) -> Iterator[StepOutput]:
        """The chosen steps, each by itself; see `Losses`."""
        for k, weight in chosen:
            yield StepOutput(k, weight, *self.of_step(rollout, rows, k, tables))

    def of_step(
        self, rollout: Rollout, rows: Rows, k: int, tables: Tables = Tables()
    ) -> tuple[ObjectiveOutput, Tensor]:
        """(the objective's output, regulariser (B,)) of step k of the trajectories `rows`, with gradients."""
        # First, so that its graph is gone before the policy's own is made.
        look, terms = None, rollout.terms
        if self.pulls is not None:
            x_next = rollout.trajectories.states(k + 1, rows)
            look = self.pulls.flow_gradient.at(x_next, k + 1, self.whose(rollout, rows))
        states = self.states(rollout, rows, k, needs_gradient=self.pulls is not None and self.pulls.has_reverse)
        flows, pull = None, None
        if self.flow_fit is not None and terms is not None and self.has_residual:
            flows = self._flows(self.flow_fit, terms, rollout, rows, k, states.prediction)
        if self.pulls is not None and look is not None and terms is not None:
            is_final = k == self.schedule.num_transitions - 1
            log_F_next = terms.log_reward[rows] if is_final else terms.log_looking[rows, k + 1]
            pull = self.pulls(states, look, log_F_next)
        return self.finished(rollout, rows, states, flows, tables, pull)

    def finished(
        self,
        rollout: Rollout,
        rows: Rows,
        states: States,
        flows: FlowTerms | None = None,
        tables: Tables = Tables(),
        pull: Pull | None = None,
    ) -> tuple[ObjectiveOutput, Tensor]:
        """(the objective's output, regulariser (B,)) of one step of the trajectories `rows`, once all terms are known."""
        trajectories, k, old = rollout.trajectories, states.k, None
        if self.regularisers.sampling > 0:
            with torch.no_grad():
                old = trajectories.output_old(self.schedule, rows, k)
        now = self.log_probs(states.x_t, states.x_next, states.prediction, k, states.pretrained, old)
        advantage, slope = (
            None if table is None else table[rows, k] for table in (tables.advantage, tables.flow_slope)
        )
        log_pf, log_pb = trajectories.log_pf[rows, k], trajectories.log_pb[rows, k]
        if rollout.is_off_policy:
            log_pf = now.log_pf.detach()
        transition = self.transition(k, now, log_pf, log_pb, flows, advantage, pull, slope)
        return self.output(transition, k, pull), self.regulariser(now)

    def states(
        self, rollout: Rollout, rows: Rows, k: int, *, needs_gradient: bool = False, pretrained: Tensor | None = None
    ) -> States:
        """The transitions of step k of the trajectories `rows`, with the policy's predictions.

        Args:
            needs_gradient: predictions are to be differentiated with respect to the states too.
            pretrained:     (B, C, H, W) the pretrained network's output at x_t, if it is known.
        """
        text, x_t = self.text_of(rollout, rows), rollout.trajectories.states(k, rows)
        if needs_gradient:
            x_t = x_t.float().requires_grad_(True)
        prediction = self.policy.predict(x_t, self.schedule.timesteps[k].expand(len(x_t)), text)
        pretrained = self.pretrained(x_t, k, text) if pretrained is None else pretrained
        x_next, whose = rollout.trajectories.states(k + 1, rows), self.whose(rollout, rows)
        return States(k, x_t, x_next, prediction, pretrained, text, whose)

    def whose(self, rollout: Rollout, rows: Rows) -> Rewarded:
        """The trajectories `rows`, with what rewards them."""
        prompt_id = rollout.trajectories.prompt_id[on_cpu(rows)]
        return Rewarded(prompt_id, rollout.score, as_index(rows), rollout.epoch)

    def text_of(self, rollout: Rollout, rows: Rows) -> Tensor:
        """(B, S, D) embeddings of the prompts of the trajectories `rows`."""
        return self.text.rows(rollout.trajectories.prompt_id[on_cpu(rows)])

    def _predict(self, rollout: Rollout, rows: Rows, k: int, **switches: bool) -> Prediction:
        t = self.schedule.timesteps[k].expand(count(rows))
        return self.policy.predict(rollout.trajectories.states(k, rows), t, self.text_of(rollout, rows), **switches)

    def _flows(
        self, flow_fit: FlowFit, terms: LogTerms, rollout: Rollout, rows: Rows, k: int, prediction: Prediction
    ) -> FlowTerms:
        last = flow_fit.num_steps - 1
        k = min(k, last)  # with `log_z: flow` every step trains the first state's flow
        log_F_tilde = flow_fit.log_F_tilde(rollout.trajectories, rows, k)
        log_looking = self._log_looking(rollout, terms, rows, k, prediction)
        log_F_tilde_next = log_looking_next = torch.zeros_like(terms.log_reward[rows])
        if k < last:
            log_F_tilde_next = flow_fit.log_F_tilde(rollout.trajectories, rows, k + 1)
            log_looking_next = self._log_looking(rollout, terms, rows, k + 1)
        return FlowTerms(log_F_tilde, log_F_tilde_next, log_looking, log_looking_next, terms.log_reward[rows])

    @torch.no_grad()
    def _log_looking(
        self, rollout: Rollout, terms: LogTerms, rows: Rows, k: int, prediction: Prediction | None = None
    ) -> Tensor:
        """(B,) forward-looking term at state k, from the rollout's x0_hat or, if the recipe says so, the current policy's."""
        section = self.forward_looking
        if section is None or section.source != "current":
            return terms.log_looking[rows, k]
        assert rollout.score is not None
        prediction = prediction or self._predict(rollout, rows, k, unguided=section.prediction == "conditional")
        x0_hat = predicted_x0(self.schedule, rollout.trajectories.states(k, rows), prediction, k, section)
        reward = rollout.score(self.policy.preview(x0_hat), as_index(rows), is_preview=True).to(self.device)
        return self.log_scale.log_looking(reward, rollout.epoch, k)
