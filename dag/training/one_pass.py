"""Training while sampling: a transition is back-propagated as soon as the next state is known.

Detailed balance is local. The residual of step k needs log P_F and log P_B of that step, the flows at x_k and x_{k+1} and
the rewards of two x0_hat, all known after the forward pass at x_{k+1}. So one denoiser pass per transition serves sampling
and training, no chain is stored, and at most two steps' graphs live at a time; the last one waits for the final picture.

Every update samples its own trajectories, hence is strictly on-policy. What a stored rollout gives beforehand comes from
earlier rollouts here: the flow's constants, the residual scales, DAG-KL's baseline. Given those, the gradient is that of
`dag.training.stored.StoredTraining` on the stored chains of the same trajectories.

Legend: B rows of a micro-batch, N trajectories, T transitions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from dag_kernels import TransitionLogProbs, residual
from torch import Tensor

from dag.chain.rollout import Batch, Score, Step, clean_latents, last_latents, noise_dtype, walk
from dag.chain.trajectory import Trajectories, concatenate
from dag.objectives.transition import residual_table
from dag.recipe import is_scored
from dag.run.meter import PhaseMeter
from dag.training.epoch_state import EpochState
from dag.training.flow_fit import describe_residuals
from dag.training.learner import Learner
from dag.training.loss import FlowTerms
from dag.training.safe_points import Steps, agreed


@dataclass(frozen=True)
class _Pending:
    """A trained step that waits for the flow at the next state."""

    step: Step
    weight: float
    now: TransitionLogProbs
    log_F_tilde: Tensor
    log_looking: Tensor


@dataclass
class _Tile:
    """One micro-batch on its way down the chain, and the numbers it leaves."""

    batch: Batch
    text: Tensor
    sample_id: Tensor
    score: Score
    states: list[Tensor] = field(default_factory=list)
    log_pf: list[Tensor] = field(default_factory=list)
    log_pb: list[Tensor] = field(default_factory=list)
    log_F_tilde: list[Tensor] = field(default_factory=list)
    x0_hat_reward: list[Tensor] = field(default_factory=list)
    reward: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        return torch.arange(len(self.sample_id))


class OnePass:
    """Sampling and updates in one.

    Args:
        learner: of an objective with a flow, calibrated by at least one stored rollout where its units need it.
    """

    def __init__(self, learner: Learner, meter: PhaseMeter) -> None:
        assert learner.flow_fit is not None and learner.recipe.balance is not None
        self.learner, self.meter, self.flow_fit, self.balance = learner, meter, learner.flow_fit, learner.recipe.balance
        self.recipe, self.loss, self.updates = learner.recipe, learner.loss, learner.updates
        self.policy, self.schedule, self.device = learner.policy, learner.schedule, learner.device
        self.keeps_chain = learner.recipe.flow.passes > 0

    def steps(
        self,
        state: EpochState,
        batch: Batch,
        scorer: Callable[[Batch], Score],
        on_rows: Callable[[int], object] = lambda n: None,
    ) -> Steps:
        """All updates of an epoch on fresh trajectories, or those that `state` has left.

        Yields after each micro-batch and each update. At the end `state.drawn` holds the trajectories, without their chains,
        and `state.measured` the metrics.

        Args:
            batch:   this process's trajectories.
            scorer:  the rewards of some of them.
            on_rows: hears of finished policy transitions.

        Raises:
            TooManyRowsError: in a micro-batch; a new iterator over the same state tries again.
        """
        state.has_begun = True
        groups = list(batch.tiles(len(batch.sample_id) // self.recipe.train.updates))
        for group in groups[state.sums.updates :]:
            yield from self._micro_batches(group, state, scorer, on_rows)
            with self.meter.phase("update"):
                self.updates.step(state)
                drawn, log_F_tilde = concatenate(state.walked), torch.cat(state.log_F_tilde)
                state.keep(drawn.without_chain(), self._fit_flow(drawn, log_F_tilde, state.epoch))
            yield
        state.measured |= describe_residuals(torch.cat(state.residuals)) | self.updates.metrics(state.sums)

    def _fit_flow(self, trajectories: Trajectories, log_F_tilde: Tensor, epoch: int) -> Tensor:
        """Recentre the flow on an update's residuals (N, T), which are returned; then flow-only passes."""
        rollout = self.learner.rollout(trajectories, epoch)
        terms = rollout.terms
        assert terms is not None
        mine = residual_table(log_F_tilde, terms.log_looking, terms.log_pf, terms.log_pb, terms.log_reward)
        residuals = self.learner.processes.everyones(mine)
        self.flow_fit.recentre(residuals)
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
        """Walk the micro-batches of an update that are left, and accumulate their gradients."""
        self.updates.begin(state)
        processes, together = self.learner.processes, self.learner.processes.size * len(group.sample_id)
        for rows in group.tail(state.num_walked).tiles(self.updates.micro_batch):
            text = self.learner.text.rows(rows.prompt_id)
            tile = _Tile(rows, text, rows.sample_id.to(self.device), scorer(rows))
            with self.meter.peak("update"):
                agreed(processes, partial(self._walk, tile, state, together, on_rows))
            state.walked.append(self._trajectories(tile))
            state.log_F_tilde.append(torch.stack(tile.log_F_tilde, 1))
            state.micro_batches += 1
            yield

    # -- one micro-batch -----------------------------------------------------------------------------------------

    def _walk(self, tile: _Tile, state: EpochState, together: int, on_rows: Callable[[int], object]) -> None:
        """Denoise a micro-batch and accumulate its gradients."""
        weights, pending, timed = dict(self.updates.choose_steps()), None, self.meter.timed
        steps = walk(
            self.policy,
            tile.text,
            tile.sample_id,
            self.recipe.seed,
            self.recipe.sampler,
            has_prior=self.recipe.has_prior,
            trained=weights,
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
                    target = log_F_tilde.detach() if self.balance.detach_next else self._log_F_tilde(tile, step)
                    self._backward(tile, pending, target, log_looking, None, together, state)
                pending = None
                if step.k in weights:
                    now = self.loss.log_probs(step.x_t, step.x_next, step.prediction, step.k, tile.text)
                    pending = _Pending(step, weights[step.k], now, log_F_tilde, log_looking)
            self._remember(tile, step, log_F_tilde)
            on_rows(len(step.x_t))
        with timed("reward"), torch.no_grad():
            x_0 = last_latents(self.policy, step.x_next, tile.text)
            tile.reward = tile.score(self.policy.decode(x_0), tile.rows)
        if pending is not None:
            with timed("update"):
                nothing = torch.zeros_like(pending.log_looking)
                log_reward = self.learner.log_scale.log_reward(tile.reward.to(self.device), state.epoch)
                self._backward(tile, pending, nothing, nothing, log_reward, together, state)

    def _log_F_tilde(self, tile: _Tile, step: Step) -> Tensor:
        ks = torch.full((len(step.x_t),), step.k, device=self.device)
        return self.flow_fit.log_F_tilde_at(step.x_t, tile.batch.prompt_id, ks)

    @torch.no_grad()
    def _log_looking(self, tile: _Tile, step: Step, epoch: int) -> Tensor:
        """(B,) forward-looking term at state k; a step that is not scored itself carries the newest reward."""
        section = self.recipe.forward_looking
        if section is None:
            return torch.zeros(len(step.x_t), device=self.device)
        if is_scored(step.k, self.schedule.num_transitions, section.stride):
            images = self.policy.preview(clean_latents(self.schedule, step, section))
            tile.x0_hat_reward.append(tile.score(images, tile.rows, is_preview=True))
        else:
            tile.x0_hat_reward.append(tile.x0_hat_reward[-1])
        return self.learner.log_scale.log_looking(tile.x0_hat_reward[-1].to(self.device), epoch, step.k)

    def _backward(
        self,
        tile: _Tile,
        pending: _Pending,
        log_F_tilde_next: Tensor,
        log_looking_next: Tensor,
        log_reward: Tensor | None,
        together: int,
        state: EpochState,
    ) -> None:
        """Gradients of a step whose next flow, or final reward, is now known."""
        k, sampled = pending.step.k, pending.step.sampled
        end = log_F_tilde_next.detach() + log_looking_next if log_reward is None else log_reward
        flows = FlowTerms(
            pending.log_F_tilde,
            log_F_tilde_next,
            pending.log_looking,
            log_looking_next,
            torch.zeros_like(log_looking_next) if log_reward is None else log_reward,
        )
        factor = self.learner.log_scale.reduction_factor
        log_F = pending.log_F_tilde.detach() + pending.log_looking
        delta = residual(log_F, factor * sampled.log_pf, factor * sampled.log_pb, end)
        at_k = slice(k, k + 1)
        advantages = self.learner.objective.advantages(
            delta[:, None], self.flow_fit.residual_scale[at_k], self.flow_fit.baseline[at_k]
        )
        advantage = None if advantages is None else advantages[:, 0]
        transition = self.loss.transition(k, pending.now, sampled.log_pf, sampled.log_pb, flows, advantage)
        output, regulariser = self.loss.output(transition, k), self.loss.regulariser(pending.now)
        self.updates.suspects.add(k, tile.sample_id, output)
        self.updates.backward(output, regulariser, pending.weight, together, state.share)

    # -- what is left of it --------------------------------------------------------------------------------------

    def _remember(self, tile: _Tile, step: Step, log_F_tilde: Tensor) -> None:
        tile.log_pf.append(step.sampled.log_pf)
        tile.log_pb.append(step.sampled.log_pb)
        tile.log_F_tilde.append(log_F_tilde.detach())
        if self.keeps_chain:
            tile.states += [step.x_next] if tile.states else [step.x_t, step.x_next]

    def _trajectories(self, tile: _Tile) -> Trajectories:
        assert tile.reward is not None
        x0_hat_reward = torch.stack(tile.x0_hat_reward, 1).to(self.device) if tile.x0_hat_reward else None
        return Trajectories(
            chain=torch.stack(tile.states) if self.keeps_chain else tile.log_pf[0].new_empty(0),
            log_pf=torch.stack(tile.log_pf, 1),
            log_pb=torch.stack(tile.log_pb, 1),
            x0_hat_reward=x0_hat_reward,
            reward=tile.reward.to(self.device),
            prompt_id=tile.batch.prompt_id,
            sample_id=tile.sample_id,
            seed=self.recipe.seed,
            noise_dtype=noise_dtype(self.recipe.sampler),
        )
