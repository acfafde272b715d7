"""Training while sampling: a transition is back-propagated as soon as the next state is known.

Detailed balance is local. The residual of step k needs log P_F and log P_B of that step, the flows at x_k and x_{k+1} and
the rewards of two x0_hat, all known after the forward pass at x_{k+1}. So one UNet pass per transition serves sampling
and training, no chain is stored, and at most two steps' graphs live at a time; the last one waits for the final picture.

Every update samples its own trajectories, hence is strictly on-policy. What a stored rollout gives beforehand comes from
earlier rollouts here: the flow's constants, the residual scales, DAG-KL's baseline. Given those, the gradient is that of
`dag.training.stored.Learner` on the stored chains of the same trajectories.

Legend: B rows of a micro-batch, N trajectories, T transitions.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from dag_kernels import SampledStep, TransitionLogProbs, residual
from torch import Tensor

from dag.chain.policy import Prediction
from dag.chain.rollout import (
    Batch,
    Score,
    against_prior,
    clean_latents,
    first_state,
    last_latents,
    noise_dtype,
    take_step,
)
from dag.chain.trajectory import Trajectories, concatenate
from dag.objectives.transition import residual_table
from dag.recipe import ForwardLooking, PolicyGradient, Sampler, is_scored
from dag.training.epoch_state import Outcome, Progress
from dag.training.flow_fit import FlowFit, describe_residuals
from dag.training.stored import Learner

# A timer of a named phase.
Timer = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class _Pending:
    """A trained step that waits for the flow at the next state."""

    k: int
    weight: float
    step: SampledStep
    now: TransitionLogProbs
    log_F_tilde: Tensor
    looking: Tensor


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
    reward_seen: list[Tensor] = field(default_factory=list)
    reward: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        return torch.arange(len(self.sample_id))


class OnePass:
    """Sampling and updates in one.

    Args:
        learner: of an objective with a flow, calibrated by at least one stored rollout where its units need it.
    """

    def __init__(self, learner: Learner, seed: int, sampler: Sampler) -> None:
        assert learner.flow_fit is not None and not isinstance(learner.recipe.objective, PolicyGradient)
        self.learner, self.seed, self.sampler = learner, seed, sampler
        self.flow_fit: FlowFit = learner.flow_fit
        self.objective, self.loss, self.updates = learner.recipe.objective, learner.loss, learner.updates
        self.policy, self.schedule, self.device = learner.policy, learner.schedule, learner.device
        self.keeps_chain = learner.recipe.flow.passes > 0

    def learn(
        self,
        batch: Batch,
        epoch: int,
        scorer: Callable[[Batch], Score],
        timed: Timer = lambda phase: nullcontext(),
        on_rows: Callable[[int], object] = lambda n: None,
    ) -> tuple[Trajectories, dict[str, Any]]:
        """All updates of an epoch on fresh trajectories, or those that the learner's `progress` has left.

        Args:
            batch: this process's trajectories.

        Returns:
            (trajectories without their chain, metrics)
        """
        learner = self.learner
        if learner.progress is None:
            learner.progress = Progress()
        progress = learner.progress
        groups = list(batch.tiles(len(batch.sample_id) // learner.recipe.train.updates))
        for group in groups[progress.outcome.updates :]:
            self.updates.run(partial(self._group, group, epoch, scorer, timed, on_rows, progress), progress, timed)
            with timed("update"):
                drawn, log_F_tilde = concatenate(progress.tiles), torch.cat(progress.log_F_tilde)
                residuals = self._fit_flow(drawn, log_F_tilde, epoch)
            progress.keep(drawn.without_chain(), residuals)
            learner.rest.point()
        learner.progress = None
        measured = describe_residuals(torch.cat(progress.residuals))
        return concatenate(progress.drawn), measured | self.updates.metrics(progress.outcome)

    def _fit_flow(self, trajectories: Trajectories, log_F_tilde: Tensor, epoch: int) -> Tensor:
        """Calibrate on an update's residuals (N, T), which are returned; then flow-only passes."""
        rollout = self.learner.rollout(trajectories, epoch)
        scalars = rollout.scalars
        assert scalars is not None
        mine = residual_table(log_F_tilde, scalars.looking, scalars.log_pf, scalars.log_pb, scalars.log_reward)
        residuals = self.learner.world.everyones(mine)
        self.flow_fit.calibrate(residuals)
        if self.keeps_chain:
            self.learner.train_flow(rollout)
        return residuals

    def _group(
        self,
        group: Batch,
        epoch: int,
        scorer: Callable[[Batch], Score],
        timed: Timer,
        on_rows: Callable[[int], object],
        progress: Progress,
    ) -> None:
        """Walk the micro-batches of an update that are left."""
        count = self.learner.world.size * len(group.sample_id)
        rest = group.tail(sum(tile.num_trajectories for tile in progress.tiles))
        for rows in rest.tiles(self.updates.micro_batch):
            tile = self._start(rows, scorer(rows))
            self.learner.rest.attempt(partial(self._walk, tile, epoch, count, progress.share, timed, on_rows))
            progress.tiles.append(self._trajectories(tile))
            progress.log_F_tilde.append(torch.stack(tile.log_F_tilde, 1))
            progress.micro_batches += 1
            self.learner.rest.point()

    # -- one micro-batch -----------------------------------------------------------------------------------------

    def _start(self, batch: Batch, score: Score) -> _Tile:
        text = self.learner.text.rows(batch.prompt_id)
        return _Tile(batch, text, batch.sample_id.to(self.device), score)

    def _walk(
        self,
        tile: _Tile,
        epoch: int,
        group: int,
        outcome: Outcome,
        timed: Timer,
        on_rows: Callable[[int], object],
    ) -> None:
        """Denoise a micro-batch and accumulate its gradients."""
        weights = dict(self.updates.choose_steps())
        x_t = first_state(self.policy, tile.sample_id, self.seed, self.sampler)
        tile.states.append(x_t)
        pending: _Pending | None = None
        for k in range(self.schedule.num_transitions):
            with timed("update"):
                with torch.set_grad_enabled(k in weights):
                    prediction = self.policy.predict(x_t, self.schedule.timesteps[k].expand(len(x_t)), tile.text)
                    log_F_tilde = self._log_F_tilde(tile, x_t, k)
                step = take_step(self.schedule, x_t, prediction, k, self.seed, tile.sample_id, self.sampler)
                if self.objective.prior == "pretrained":
                    step = against_prior(self.policy, step, x_t, tile.text, k)
            with timed("reward"):
                looking = self._look(tile, x_t, prediction, step, k, epoch)
            with timed("update"):
                if pending is not None:
                    self._backward(
                        tile, pending, self._target(tile, x_t, k, log_F_tilde), looking, None, group, outcome
                    )
                pending = None
                if k in weights:
                    now = self._log_probs(tile, x_t, step.x_next, prediction, k)
                    pending = _Pending(k, weights[k], step, now, log_F_tilde, looking)
            self._remember(tile, step, log_F_tilde)
            x_t = step.x_next
            on_rows(len(x_t))
        with timed("reward"), torch.no_grad():
            tile.reward = tile.score(self.policy.decode(last_latents(self.policy, x_t, tile.text)), tile.rows)
        if pending is not None:
            with timed("update"):
                nothing = torch.zeros_like(pending.looking)
                log_reward = self.learner.units.log_reward(tile.reward.to(self.device), epoch)
                self._backward(tile, pending, nothing, nothing, log_reward, group, outcome)

    def _log_F_tilde(self, tile: _Tile, x_t: Tensor, k: int) -> Tensor:
        ks = torch.full((len(x_t),), k, device=self.device)
        return self.flow_fit.log_F_tilde_at(x_t, tile.batch.prompt_id, ks)

    def _target(self, tile: _Tile, x_t: Tensor, k: int, log_F_tilde: Tensor) -> Tensor:
        """log F~(x_{k+1}) of the step before: the value at hand, or with a graph of its own if it is to be trained too."""
        return log_F_tilde.detach() if self.objective.detach_next else self._log_F_tilde(tile, x_t, k)

    def _log_probs(
        self, tile: _Tile, x_t: Tensor, x_next: Tensor, prediction: Prediction, k: int
    ) -> TransitionLogProbs:
        ks, reference = torch.full((len(x_t),), k, device=self.device), None
        if self.learner.recipe.regulariser.pretrained_kl > 0:
            with torch.no_grad():
                t = self.schedule.timesteps[k].expand(len(x_t))
                reference = self.policy.predict(x_t, t, tile.text, pretrained=True).guided
        return self.schedule.transition_log_probs(
            x_t, x_next, prediction.rows, ks, prediction.guidance_scale, reference
        )

    @torch.no_grad()
    def _look(self, tile: _Tile, x_t: Tensor, prediction: Prediction, step: SampledStep, k: int, epoch: int) -> Tensor:
        """(B,) forward-looking term at state k; a step that is not scored itself carries the newest reward."""
        section: ForwardLooking = self.objective.forward_looking
        if section.source == "none":
            return torch.zeros(len(x_t), device=self.device)
        if is_scored(k, self.schedule.num_transitions, section.stride):
            x0_hat = clean_latents(self.schedule, step, x_t, prediction, k, section)
            tile.reward_seen.append(tile.score(self.policy.preview(x0_hat), tile.rows, is_preview=True))
        else:
            tile.reward_seen.append(tile.reward_seen[-1])
        return self.learner.units.looking(tile.reward_seen[-1].to(self.device), epoch, k)

    def _backward(
        self,
        tile: _Tile,
        pending: _Pending,
        log_F_tilde_next: Tensor,
        looking_next: Tensor,
        log_reward: Tensor | None,
        group: int,
        outcome: Outcome,
    ) -> None:
        """Gradients of a step whose next flow, or final reward, is now known."""
        ks = torch.full((len(pending.looking),), pending.k, device=self.device)
        transition = self.loss.transition(ks, pending.now, pending.step.log_pf, pending.step.log_pb)
        transition = replace(
            transition,
            log_reward=torch.zeros_like(looking_next) if log_reward is None else log_reward,
            residual_scale=self.flow_fit.residual_scale[ks],
            log_F_tilde=pending.log_F_tilde,
            log_F_tilde_next=log_F_tilde_next,
            looking=pending.looking,
            looking_next=looking_next,
        )
        end = log_F_tilde_next.detach() + looking_next if log_reward is None else log_reward
        log_F = pending.log_F_tilde.detach() + pending.looking
        delta = residual(log_F, transition.log_pf_old, transition.log_pb, end)
        k = slice(pending.k, pending.k + 1)
        advantages = self.learner.objective.advantages(
            delta[:, None], self.flow_fit.residual_scale[k], self.flow_fit.baseline[k]
        )
        if advantages is not None:
            transition = replace(transition, advantage=advantages[:, 0])
        output, regulariser = self.loss.output(transition, pending.k), self.loss.regulariser(pending.now)
        self.updates.suspects.add(pending.k, tile.sample_id, output)
        self.updates.backward(output, regulariser, pending.weight, group, outcome)

    # -- what is left of it --------------------------------------------------------------------------------------

    def _remember(self, tile: _Tile, step: SampledStep, log_F_tilde: Tensor) -> None:
        tile.log_pf.append(step.log_pf)
        tile.log_pb.append(step.log_pb)
        tile.log_F_tilde.append(log_F_tilde.detach())
        if self.keeps_chain:
            tile.states.append(step.x_next)

    def _trajectories(self, tile: _Tile) -> Trajectories:
        assert tile.reward is not None
        return Trajectories(
            chain=torch.stack(tile.states) if self.keeps_chain else tile.states[0].new_empty(0),
            log_pf=torch.stack(tile.log_pf, 1),
            log_pb=torch.stack(tile.log_pb, 1),
            looking=torch.stack(tile.reward_seen, 1).to(self.device) if tile.reward_seen else None,
            reward=tile.reward.to(self.device),
            prompt_id=tile.batch.prompt_id,
            sample_id=tile.sample_id,
            seed=self.seed,
            noise_dtype=noise_dtype(self.sampler),
        )
