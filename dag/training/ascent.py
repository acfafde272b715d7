"""The reward's gradient along stored chains, for objectives that follow it without balancing a flow.

An adjoint sweep goes from the end of a chain to its beginning, one step and one graph of the denoiser at a time:

    lambda_T = d r / d x_T,        lambda_k = mean_x lambda_{k+1} + mean_output (d o / d x_k)^T lambda_{k+1}

which is d r / d x_k with the noise of the chain held fixed (DRaFT: Clark et al. 2024; adjoint: Domingo-Enrich et al. 2025).

With `copies: n` the gradient of the last step is a mean over n draws of that step (DRaFT-LV). The first is the stored one. For each
other, P_B noises the stored end x_T back and the policy denoises it, both with fresh noise:

    x'_{T-1} = r x_T + c epsilon,        x'_T = mean_x x'_{T-1} + mean_output o(x'_{T-1}) + sigma epsilon'

P_B keeps the noise levels of the chain for every eta, so x'_{T-1} is a state as the sampler meets them, and the expected gradient
is that of one draw. A draw is made without a graph before its gradient is taken, so that the reward's graph and the denoiser's are
never alive together: one more forward pass, and the memory of one draw.

Legend: B trajectories of a micro-batch, T transitions.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dag.chain.jacobian import backwards
from dag.chain.policy import Policy
from dag.chain.rollout import last_latents
from dag.chain.trajectory import Rows, draw_noise_anew
from dag.objectives import ObjectiveOutput, pathwise
from dag.objectives.log_scale import LogScale
from dag.recipe import AdjointMatching, Backpropagation, Recipe, RewardFeedback
from dag.training.flow_gradient import Rewarded
from dag.training.loss import Loss, Rollout, StepOutput, Tables
from dag.training.pull import Pull, States, kl_to


class Ascent:
    """Computes the losses of a recipe's objective, one that follows the reward's gradient."""

    def __init__(self, recipe: Recipe, policy: Policy, loss: Loss, log_scale: LogScale) -> None:
        assert isinstance(recipe.objective, Backpropagation | RewardFeedback | AdjointMatching)
        self.section, self.loss, self.log_scale = recipe.objective, loss, log_scale
        self.policy, self.schedule = policy, policy.schedule

    @property
    def is_sweep(self) -> bool:
        """Whether the gradient comes from the end of the chain."""
        return not isinstance(self.section, RewardFeedback)

    def steps(
        self, rollout: Rollout, rows: Rows, chosen: Sequence[tuple[int, float]], tables: Tables, update: int
    ) -> Iterator[StepOutput]:
        """The chosen steps, in a sweep from the last to the first; see `Losses`."""
        if isinstance(self.section, RewardFeedback):
            for k, weight in chosen:
                yield StepOutput(k, weight, *self._feedback(rollout, rows, k))
        elif isinstance(self.section, Backpropagation):
            copies = self.section.copies
            yield from self._through_policy(rollout, rows, {k: weight / copies for k, weight in chosen})
            for copy in range(1, copies):
                yield self._anew(rollout, rows, chosen[-1][1] / copies, update * copies + copy)
        else:
            yield from self._through_pretrained(rollout, rows, dict(chosen))

    # -- sweeps --------------------------------------------------------------------------------------------------

    def _through_policy(self, rollout: Rollout, rows: Rows, weights: dict[int, float]) -> Iterator[StepOutput]:
        """The gradient of r(x_0) with respect to the weights in the last steps."""
        assert isinstance(self.section, Backpropagation)
        end = rollout.trajectories.states(self.schedule.num_transitions, rows)
        adjoint = self._at_end(rollout, rows, end, is_pretrained=False)
        for k in sorted(weights, reverse=True):
            is_first = k == min(weights)
            states = self.loss.states(rollout, rows, k, needs_gradient=not is_first)
            following = adjoint
            if not is_first:
                adjoint = self._before(k, states.prediction.guided, states.x_t, adjoint, keeps_graph=True)
            pull = self._ascending(states, following)
            yield StepOutput(k, weights[k], *self.loss.finished(rollout, rows, states, pull=pull))

    def _anew(self, rollout: Rollout, rows: Rows, weight: float, number: int) -> StepOutput:
        """The gradient of r(x'_T) with respect to the weights in the last step, drawn anew from the stored end.

        Args:
            number: of the draw, in all updates of the run.
        """
        k, loss = self.schedule.num_transitions - 1, self.loss
        text, (x_t, x_next) = loss.text_of(rollout, rows), self._drawn_anew(rollout, rows, k, number)
        adjoint = self._at_end(rollout, rows, x_next, is_pretrained=False)
        prediction = self.policy.predict(x_t, self.schedule.timesteps[k].expand(len(x_t)), text)
        pretrained, whose = loss.pretrained(x_t, k, text), loss.whose(rollout, rows)
        states = States(k, x_t, x_next, prediction, pretrained, text, whose)
        now, pull = loss.log_probs(x_t, x_next, prediction, k, pretrained), self._ascending(states, adjoint)
        transition = loss.transition(k, now, now.log_pf.detach(), now.log_pb, pull=pull)
        return StepOutput(k, weight, loss.output(transition, k, pull), loss.regulariser(now))

    @torch.no_grad()
    def _drawn_anew(self, rollout: Rollout, rows: Rows, k: int, number: int) -> tuple[Tensor, Tensor]:
        """(x'_{T-1}, x'_T), (B, C, H, W) each, rounded as stored states are."""
        trajectories, text = rollout.trajectories, self.loss.text_of(rollout, rows)
        back, forth = (
            draw_noise_anew(
                trajectories.seed,
                trajectories.sample_id[rows],
                2 * number + which,
                self.policy.latent_shape,
                trajectories.noise_dtype,
            )
            for which in (0, 1)
        )
        end = trajectories.states(k + 1, rows)
        x_t = self.schedule.noised_back(end, back, k).to(end.dtype)
        output = self.policy.predict(x_t, self.schedule.timesteps[k].expand(len(x_t)), text).guided
        return x_t, self.schedule.sample_next(x_t, output, forth, k).to(end.dtype)

    def _through_pretrained(self, rollout: Rollout, rows: Rows, weights: dict[int, float]) -> Iterator[StepOutput]:
        """The lean adjoint: lambda goes through the pretrained policy, to which the matched policy is compared."""
        end = rollout.trajectories.states(self.schedule.num_transitions, rows)
        adjoint = self._at_end(rollout, rows, end, is_pretrained=True)
        whose = self.loss.whose(rollout, rows)
        beta = self.log_scale.slope(whose.epoch, self.schedule.num_transitions)
        for k in reversed(range(min(weights), self.schedule.num_transitions)):
            is_first, following = k == min(weights), adjoint
            x_t = rollout.trajectories.states(k, rows).detach().float().requires_grad_(not is_first)
            t, text = self.schedule.timesteps[k].expand(len(x_t)), self.loss.text_of(rollout, rows)
            with torch.set_grad_enabled(not is_first):
                pretrained = self.policy.predict(x_t, t, text, pretrained=True).guided
            if not is_first:
                adjoint = self._before(k, pretrained, x_t, adjoint, keeps_graph=False)
            if k in weights:
                states = self.loss.states(rollout, rows, k, pretrained=pretrained.detach())
                target = pathwise.against_pretrained(self.schedule, k, beta * following, pretrained.detach())
                pull = self._pull(kl_to(self.schedule, states, target), beta * following)
                yield StepOutput(k, weights[k], *self.loss.finished(rollout, rows, states, pull=pull))

    def _at_end(self, rollout: Rollout, rows: Rows, end: Tensor, *, is_pretrained: bool) -> Tensor:
        """(B, C, H, W) lambda_T, the gradient of the reward, or of minus its distance to the goal, at a last state of the chain."""
        whose, text = self.loss.whose(rollout, rows), self.loss.text_of(rollout, rows)
        with torch.enable_grad():
            x = end.detach().float().requires_grad_(True)
            clean = last_latents(self.policy, x, text, pretrained=is_pretrained)
        reward, gradient = self._reward(clean.detach(), whose, is_preview=False)
        if isinstance(self.section, Backpropagation) and self.section.goal is not None:
            gradient = _per_row((self.section.goal - reward).sign(), gradient)
        return gradient if clean is x else backwards(clean, x, gradient)

    def _before(self, k: int, output: Tensor, x_t: Tensor, adjoint: Tensor, *, keeps_graph: bool) -> Tensor:
        """(B, C, H, W) lambda_k from lambda_{k+1}."""
        a, b = self.schedule.mean_x[k], self.schedule.mean_output[k]
        return a * adjoint + backwards(output, x_t, b * adjoint, keeps_graph=keeps_graph)

    # -- one step ------------------------------------------------------------------------------------------------

    def _feedback(self, rollout: Rollout, rows: Rows, k: int) -> tuple[ObjectiveOutput, Tensor]:
        """The gradient of r(x0_hat(x_k)) with respect to the weights through step k's output alone (ReFL)."""
        assert isinstance(self.section, RewardFeedback)
        states = self.loss.states(rollout, rows, k)
        clean = self.schedule.x0_hat(states.x_t.float(), states.prediction.guided, k)
        reward, gradient = self._reward(clean.detach(), states.whose, is_preview=True)
        if self.section.margin is not None:
            gradient = _per_row((reward < self.section.margin).float(), gradient)
        return self.loss.finished(
            rollout, rows, states, pull=self._pull(-(gradient * clean).flatten(1).sum(1), gradient)
        )

    def _ascending(self, states: States, adjoint: Tensor) -> Pull:
        """The loss -<b lambda_{k+1}, o>, whose gradient with respect to the weights is minus the reward's through step k."""
        ascended = self.schedule.mean_output[states.k] * adjoint * states.prediction.guided.float()
        return self._pull(-ascended.flatten(1).sum(1), adjoint)

    def _reward(self, latents: Tensor, whose: Rewarded, *, is_preview: bool) -> tuple[Tensor, Tensor]:
        assert whose.score is not None
        return whose.score.gradient(latents, whose.rows, is_preview=is_preview)

    def _pull(self, loss: Tensor, y: Tensor) -> Pull:
        return Pull(loss, None, None, {"gradient_norm": y.detach().flatten(1).norm(dim=1)})


def _per_row(factor: Tensor, values: Tensor) -> Tensor:
    """(B, C, H, W) values with each row multiplied by its factor (B,)."""
    return factor.to(values)[:, None, None, None] * values
