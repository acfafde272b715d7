"""One pass: training while sampling. A transition is back-propagated after the denoiser's pass at its next state.

Detailed balance is local. The residual of step k needs log P_F and log P_B of that step, the flows at x_k and x_{k+1} and
the rewards of their x0_hat, all known after the denoiser's pass at x_{k+1}. So one denoiser pass per transition serves sampling
and training, and at most two steps' graphs are in memory at a time. The last step waits for the final picture's reward. Chains
are stored for flow-only updates (`flow.passes`) alone.

Every update samples its own trajectories, hence is strictly on-policy. The flow's constants and slopes, the residual scales and
DAG-KL's baseline, the fitted weights of the forward-looking term and the reward critic, which `dag.training.stored.StoredTraining`
computes from the rollout itself, come from earlier rollouts here.
Given the same values of them, the gradient equals that of `StoredTraining` on the same trajectories.

Legend: B rows of a micro-batch, N trajectories, T transitions.
"""

from collections.abc import Callable
from functools import partial

import torch
from dag_kernels import residual
from torch import Tensor

from dag.chain.rollout import Batch, Score, Step, clean_latents, last_latents, walk
from dag.chain.sample_ids import start_ids
from dag.chain.trajectory import concatenate
from dag.objectives import UpdateScalars
from dag.objectives.transition import residual_table
from dag.recipe import ValueBalance, is_scored
from dag.run.meter import PhaseMeter
from dag.training.critic_fit import preview_steps
from dag.training.epoch_state import EpochState
from dag.training.flow_fit import FlowFit, describe_residuals
from dag.training.flow_gradient import Look
from dag.training.learner import Learner
from dag.training.loss import FlowTerms, Rollout
from dag.training.pull import States
from dag.training.safe_points import Steps, agreed
from dag.training.tile import Next, Pending, Tile
from dag.training.trust_region import PROBED, Probe


class OnePass:
    """Samples and trains at the same time.

    Args:
        learner: its objective balances a flow. With `beta.unit: reward_sd` it must have seen a stored rollout, which sets the
            reward scale.
    """

    def __init__(self, learner: Learner, meter: PhaseMeter) -> None:
        assert learner.recipe.balance is not None
        self.learner, self.meter, self.flow_fit, self.balance = (
            learner,
            meter,
            learner.value_fit,
            learner.recipe.balance,
        )
        self.recipe, self.loss, self.updates = learner.recipe, learner.loss, learner.updates
        self.policy, self.schedule, self.device = learner.policy, learner.schedule, learner.device
        section = learner.recipe.objective
        self.detaches_next = not isinstance(section, ValueBalance) or section.detach_next
        self.keeps_chain = learner.recipe.flow.passes > 0
        self.has_slopes = self.flow_fit is not None and self.flow_fit.flow.slopes is not None
        looking = learner.recipe.forward_looking
        stride, has_critic = 1 if looking is None else looking.stride, learner.critic_fit is not None
        self.preview_steps = preview_steps(self.schedule.num_transitions, stride) if has_critic else []

    def steps(
        self,
        state: EpochState,
        batch: Batch,
        scorer: Callable[[Batch], Score],
        on_rows: Callable[[int], object] = lambda n: None,
    ) -> Steps:
        """The updates of an epoch that `state` does not have yet, each on newly sampled trajectories.

        Yields after each micro-batch and each update. At the end `state.drawn` holds the trajectories, without their chains,
        and `state.measured` the metrics.

        Args:
            batch:   this process's trajectories of the epoch.
            scorer:  gives the function that scores images of some of them.
            on_rows: called with the number of trajectories after each of their transitions, for a progress bar.

        Raises:
            TooManyRowsError: a GPU ran out of memory in a micro-batch. A new iterator over the same state continues.
            NotFiniteError:   see `Learner.rollout` and `Updates.step`.
        """
        state.has_begun, processes = True, self.learner.processes
        groups = list(batch.tiles(len(batch.sample_id) // self.recipe.train.updates))
        for group in groups[state.sums.updates :]:
            yield from self._micro_batches(group, state, scorer, on_rows)
            with self.meter.phase("update"):
                self.updates.step(state, state.probes)
                drawn = concatenate(state.walked)
                lesson = agreed(processes, partial(self.learner.critic_lesson, drawn, scorer(group)))
                rollout = self.learner.rollout(drawn, state.epoch, scorer(group))
                state.keep(drawn.without_states(), self._fit_flow(rollout, state))
                state.measured |= self.learner.fit_critic(lesson)
            yield
        if self.flow_fit is not None:
            state.measured |= describe_residuals(torch.cat(state.residuals))
        state.measured |= self.updates.metrics(state.sums)

    def _fit_flow(self, rollout: Rollout, state: EpochState) -> Tensor:
        """Recentre the flow on an update's residuals, and train it alone if the recipe says so.

        Args:
            rollout: the update's trajectories in this process, whose flows and norms `state` still has.

        Returns:
            The residuals (N, T) of the update's trajectories in all processes.
        """
        terms, everyones = rollout.terms, self.learner.processes.everyones
        assert terms is not None
        log_F_tilde = torch.cat(state.log_F_tilde)
        mine = residual_table(log_F_tilde, terms.log_looking, terms.log_pf, terms.log_pb, terms.log_reward)
        residuals = everyones(mine)
        if self.flow_fit is not None:
            self.flow_fit.recentre(residuals, everyones(torch.cat(state.excess)) if state.excess else None)
            if self.keeps_chain:
                self.learner.fit_flow(rollout)
        return residuals

    def _micro_batches(
        self,
        group: Batch,
        state: EpochState,
        scorer: Callable[[Batch], Score],
        on_rows: Callable[[int], object],
    ) -> Steps:
        """Sample the micro-batches of an update that `state` does not have yet, and accumulate their gradients."""
        self.updates.begin(state)
        processes = self.learner.processes
        num_trajectories = processes.size * len(group.sample_id)
        for rows in group.tail(state.num_walked).tiles(self.updates.micro_batch):
            text = self.learner.text.rows(rows.prompt_id)
            tile = Tile(rows, text, rows.sample_id.to(self.device), scorer(rows))
            with self.meter.peak("update"):
                agreed(processes, partial(self._walk, tile, state, num_trajectories, on_rows))
            state.walked.append(tile.trajectories(self.recipe))
            state.log_F_tilde.append(torch.stack(tile.log_F_tilde, 1))
            if tile.excess:
                state.excess.append(torch.stack(tile.excess, 1))
            state.micro_batches += 1
            yield

    # -- one micro-batch -----------------------------------------------------------------------------------------

    def _walk(self, tile: Tile, state: EpochState, num_trajectories: int, on_rows: Callable[[int], object]) -> None:
        """Sample a micro-batch and accumulate its gradients.

        Args:
            num_trajectories: of the update, in all processes together.
        """
        weights, pending, timed = dict(self.updates.choose_steps()), None, self.meter.timed
        is_probed, probes = self.recipe.train.max_kl is not None and not state.walked, list[Probe]()
        pulls, differentiated = self.loss.pulls, set[int]()
        if pulls is not None and self.balance.jacobian == "policy":
            differentiated |= {k + 1 for k in weights}
        if pulls is not None and pulls.has_reverse:
            differentiated |= set(weights)
        steps = walk(
            self.policy,
            tile.text,
            tile.sample_id,
            self.recipe.seed,
            self.recipe.sampler,
            has_prior=self.recipe.samples_prior,
            start_id=start_ids(self.recipe.prompts, tile.sample_id),
            trained=weights,
            differentiated=differentiated,
        )
        for _ in range(self.schedule.num_transitions):
            with timed("update"):
                step = next(steps)
                with torch.set_grad_enabled(step.k in weights):
                    log_F_tilde = self._log_F_tilde(tile, step)
            with timed("reward"):
                log_looking = self._log_looking(tile, step, state.epoch)
            with timed("update"):
                if pending is not None:
                    target = log_F_tilde.detach() if self.detaches_next else self._log_F_tilde(tile, step)
                    look = self._look(tile, step, state.epoch, keeps_graph=step.k in weights)
                    self._backward(tile, pending, Next(target, log_looking, None, look), num_trajectories, state)
                pending = None
                if step.k in weights:
                    pending = self._pending(tile, step, weights[step.k], log_F_tilde, log_looking)
                    probes += self._probe(tile, step) if is_probed else []
            tile.remember(step, log_F_tilde, keeps_chain=self.keeps_chain, has_slopes=self.has_slopes)
            on_rows(len(step.x_t))
        with timed("reward"), torch.no_grad():
            x_0 = last_latents(self.policy, step.x_next, tile.text)
            tile.reward = tile.score(self.policy.decode(x_0), tile.rows)
            if self.preview_steps:
                tile.previews.append(x_0.half())
        if pending is not None:
            with timed("update"):
                self._backward(tile, pending, self._end(tile, step.x_next, state.epoch), num_trajectories, state)
        state.probes += probes

    def _log_F_tilde(self, tile: Tile, step: Step) -> Tensor:
        """(B,) learnt flow at x_t of the step; 0 for objectives without one."""
        if self.flow_fit is None:
            return torch.zeros(len(step.x_t), device=self.device)
        ks = torch.full((len(step.x_t),), step.k, device=self.device)
        return self.flow_fit.log_F_tilde_at(step.x_t.detach(), tile.batch.prompt_id, ks)

    @torch.no_grad()
    def _log_looking(self, tile: Tile, step: Step, epoch: int) -> Tensor:
        """(B,) forward-looking term at x_t of the step. A state that is not scored takes the newest reward before it."""
        section = self.recipe.forward_looking
        if section is None:
            return torch.zeros(len(step.x_t), device=self.device)
        if is_scored(step.k, self.schedule.num_transitions, section.stride):
            clean = clean_latents(self.schedule, step, section)
            tile.x0_hat_reward.append(tile.score(self.policy.preview(clean), tile.rows, is_preview=True))
            if step.k in self.preview_steps:
                tile.previews.append(clean.half())
        else:
            tile.x0_hat_reward.append(tile.x0_hat_reward[-1])
        return self.learner.log_scale.log_looking(tile.x0_hat_reward[-1].to(self.device), epoch, step.k)

    def _look(self, tile: Tile, step: Step, epoch: int, *, keeps_graph: bool) -> Look | None:
        """The gradient of the flow at x_t of the step, or None if the objective does not take it."""
        if self.loss.pulls is None:
            return None
        flow_gradient, whose = self.loss.pulls.flow_gradient, tile.whose(epoch)
        return flow_gradient.through(step.x_t, step.prediction, step.k, whose, keeps_graph=keeps_graph)

    def _probe(self, tile: Tile, step: Step) -> list[Probe]:
        """A few transitions of the step on which the trust region is measured."""
        return [Probe(step.k, step.x_t.detach()[:PROBED], tile.batch.prompt_id[:PROBED])]

    def _end(self, tile: Tile, x_0: Tensor, epoch: int) -> Next:
        """What is known of the chain's last state (B, C, H, W)."""
        assert tile.reward is not None
        log_reward = self.learner.log_scale.log_reward(tile.reward.to(self.device), epoch)
        zero, look = torch.zeros_like(log_reward), None
        if self.loss.pulls is not None:
            look = self.loss.pulls.flow_gradient.at(x_0, self.schedule.num_transitions, tile.whose(epoch))
        return Next(zero, zero, log_reward, look)

    def _pending(self, tile: Tile, step: Step, weight: float, log_F_tilde: Tensor, log_looking: Tensor) -> Pending:
        """A trained step with the log-probs of its transition."""
        pretrained = step.pretrained
        if pretrained is None:
            pretrained = self.loss.pretrained(step.x_t, step.k, tile.text)
        now = self.loss.log_probs(step.x_t, step.x_next, step.prediction, step.k, pretrained)
        return Pending(step, weight, now, log_F_tilde, log_looking, pretrained)

    def _backward(
        self, tile: Tile, pending: Pending, following: Next, num_trajectories: int, state: EpochState
    ) -> None:
        """Accumulate the gradients of a step whose next flow, or final reward, is now known.

        Args:
            num_trajectories: of the update, in all processes together.
        """
        step, k = pending.step, pending.step.k
        log_reward = following.log_reward
        end = following.log_F_tilde.detach() + following.log_looking if log_reward is None else log_reward
        flows = advantage = pull = None
        if self.flow_fit is not None:
            flows = FlowTerms(
                pending.log_F_tilde,
                following.log_F_tilde,
                pending.log_looking,
                following.log_looking,
                torch.zeros_like(end) if log_reward is None else log_reward,
            )
            advantage = self._advantage(self.flow_fit, pending, end)
        if following.look is not None and self.loss.pulls is not None:
            log_F_next = following.log_looking if log_reward is None else log_reward
            whose = tile.whose(state.epoch)
            states = States(k, step.x_t, step.x_next, step.prediction, pending.pretrained, tile.text, whose)
            pull = self.loss.pulls(states, following.look, log_F_next)
        sampled = step.sampled
        transition = self.loss.transition(k, pending.now, sampled.log_pf, sampled.log_pb, flows, advantage, pull)
        output, regulariser = self.loss.output(transition, k, pull), self.loss.regulariser(pending.now)
        self.updates.suspects.add(k, tile.sample_id, output)
        self.updates.backward(output, regulariser, pending.weight, num_trajectories, state.share)

    def _advantage(self, flow_fit: FlowFit, pending: Pending, end: Tensor) -> Tensor | None:
        """(B,) advantages of a step whose log F(x_next) is `end` (B,), or None if the objective forms none."""
        k, sampled, factor = pending.step.k, pending.step.sampled, self.learner.log_scale.reduction_factor
        log_F = pending.log_F_tilde.detach() + pending.log_looking
        delta, at_k = residual(log_F, factor * sampled.log_pf, factor * sampled.log_pb, end), slice(k, k + 1)
        known = UpdateScalars(
            residuals=delta[:, None],
            residual_scale=flow_fit.residual_scale[at_k],
            running_mean=flow_fit.baseline[at_k],
        )
        advantages = self.learner.objective.advantages(known)
        return None if advantages is None else advantages[:, 0]
