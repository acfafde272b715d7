"""Training on a stored rollout.

Every gradient is a mean over all transitions of an update. Numbers that need the complete update or rollout (DAG-KL's baseline,
residual scales) are computed before it, from the rollout's scalars and a pass of the flow network, so that the gradient does
not depend on how the update is cut into micro-batches.

Legend: N trajectories, T transitions.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dag.chain.rollout import Score
from dag.chain.trajectory import Rows, Trajectories, count, cut, on_cpu
from dag.objectives import UpdateScalars
from dag.run.meter import PhaseMeter
from dag.training.epoch_state import EpochState
from dag.training.flow_fit import describe_residuals
from dag.training.learner import Learner, Lesson
from dag.training.loss import Rollout, Tables
from dag.training.replay import with_present_log_pf
from dag.training.safe_points import Steps, agreed
from dag.training.trust_region import PROBED, Probe


class StoredTraining:
    """Updates on trajectories that were sampled and scored beforehand."""

    def __init__(self, learner: Learner, meter: PhaseMeter) -> None:
        self.learner, self.meter = learner, meter
        self.recipe, self.processes, self.updates = learner.recipe, learner.processes, learner.updates

    def steps(
        self,
        state: EpochState,
        trajectories: Trajectories,
        score: Score | None = None,
        on_rows: Callable[[int], object] = lambda n: None,
        earlier: Sequence[Trajectories] = (),
    ) -> Steps:
        """The updates of an epoch that `state` does not have yet. Yields after each micro-batch.

        At the end `state.measured` holds the metrics. Warm-up epochs (`flow.warmup_epochs`) have no updates, only the flow's
        fit.

        Args:
            trajectories: this process's trajectories of the epoch, with their chains.
            score:        see `Rollout.score`.
            on_rows:      called with the number of transitions just back-propagated, for a progress bar.
            earlier:      trajectories that another policy gave, which are trained on afterwards, once.

        Raises:
            TooManyRowsError: a GPU ran out of memory in a micro-batch. A new iterator over the same state continues.
            NotFiniteError:   see `Learner.rollout` and `Updates.step`.
        """
        train, epoch, is_off_policy = self.recipe.train, state.epoch, not self.recipe.data.samples
        with self.meter.phase("update"):
            # First what may run out of memory, while nothing has changed yet.
            lesson = self._lesson(trajectories, score) if not state.has_begun else None
            is_new = not state.has_begun
            rollout = self.learner.rollout(
                trajectories, epoch, score, train.updates, is_new=is_new, is_off_policy=is_off_policy
            )
            if is_new:
                self._begin(rollout, state, lesson)
            others = [
                self.learner.rollout(one, epoch, None, train.updates, is_new=False, is_off_policy=True)
                for one in earlier
            ]
        N = trajectories.num_trajectories
        groups, rollouts = cut(slice(0, N), N // train.updates), [*[rollout] * train.inner_epochs, *others]
        if epoch >= self.recipe.warmup_epochs:
            for number in range(state.sums.updates, len(rollouts) * len(groups)):
                yield from self._update(rollouts[number // len(groups)], groups[number % len(groups)], state, on_rows)
        state.measured |= self.updates.metrics(state.sums)
        if self.recipe.fits_critic_afterwards:
            state.measured |= self.learner.fit_critic(self._lesson(trajectories, score), train.updates)

    def _lesson(self, trajectories: Trajectories, score: Score | None) -> Lesson | None:
        return agreed(self.processes, partial(self.learner.critic_lesson, trajectories, score))

    def _begin(self, rollout: Rollout, state: EpochState, lesson: Lesson | None) -> None:
        """Before the first update: fit flow and critic to the rollout, and let the objective form advantages from all rewards."""
        trajectories, groups, flow_fit = rollout.trajectories, rollout.groups, self.learner.value_fit
        if flow_fit is not None and rollout.terms is not None:
            local_residuals = flow_fit.residuals(trajectories, rollout.terms, slice(0, trajectories.num_trajectories))
            residuals = self.processes.everyones(local_residuals, groups)
            state.measured |= describe_residuals(residuals)
            excess = flow_fit.excess(trajectories, slice(0, trajectories.num_trajectories))
            flow_fit.recentre(residuals, None if excess is None else self.processes.everyones(excess, groups))
            self.learner.fit_flow(rollout)
        if not self.recipe.fits_critic_afterwards:
            state.measured |= self.learner.fit_critic(lesson, groups)
        reward = self.processes.everyones(trajectories.reward.cpu(), groups)
        prompt_id = self.processes.everyones(trajectories.prompt_id, groups)
        advantages = self.learner.objective.observe(reward, prompt_id)
        state.advantages = None if advantages is None else self.processes.mine(advantages, groups)
        if self.learner.past is not None:
            self.learner.past.remember()
        state.has_begun = True

    def _update(self, rollout: Rollout, rows: Rows, state: EpochState, on_rows: Callable[[int], object]) -> Steps:
        """One optimizer step on the transitions of `rows` in this process and their counterparts in the others."""
        with self.meter.phase("update"):
            if rollout.is_off_policy and self.recipe.objective.weighs_by_log_pf:
                present = partial(with_present_log_pf, self.learner.loss, rollout, rows, self.updates.micro_batch)
                rollout = agreed(self.processes, present)
            tables = self._tables(rollout, rows, state.advantages)
            self.updates.begin(state)
        self.updates.suspects.trajectories = rollout.trajectories
        steps, num_trajectories = self.updates.choose_steps(), self.processes.size * count(rows)
        together = [steps] if self.learner.losses.is_sweep else [[step] for step in steps]
        work = [(tile, chosen) for tile in cut(rows, self.updates.micro_batch) for chosen in together]
        for tile, chosen in work[state.micro_batches :]:
            with self.meter.phase("update"):
                agreed(
                    self.processes,
                    partial(self._micro_batch, rollout, tile, chosen, tables, num_trajectories, state),
                )
            state.micro_batches += 1
            on_rows(count(tile) * len(chosen))
            yield
        with self.meter.phase("update"):
            self.updates.step(state, self._probes(rollout.trajectories, rows, [k for k, _ in steps]))

    @torch.no_grad()
    def _probes(self, trajectories: Trajectories, rows: Rows, steps: Sequence[int]) -> list[Probe]:
        """Transitions of an update on which the trust region is measured; none without one."""
        if self.recipe.train.max_kl is None:
            return []
        few = cut(rows, PROBED)[0]
        prompt_id = trajectories.prompt_id[on_cpu(few)]
        return [Probe(k, trajectories.states(k, few), prompt_id) for k in steps]

    def _micro_batch(
        self,
        rollout: Rollout,
        rows: Rows,
        chosen: Sequence[tuple[int, float]],
        tables: Tables,
        num_trajectories: int,
        state: EpochState,
    ) -> None:
        """Back-propagate the chosen steps of `rows`; `num_trajectories` are those of the update in all processes together."""
        for step in self.learner.losses.steps(rollout, rows, chosen, tables, self.updates.optimizer_step):
            self.updates.suspects.add(step.k, rollout.trajectories.sample_id[rows], step.output)
            self.updates.backward(step.output, step.regulariser, step.weight, num_trajectories, state.share)

    def _tables(self, rollout: Rollout, rows: Rows, per_trajectory: Tensor | None) -> Tables:
        """What the objective forms of an update, set for `rows`: from the rows of all processes.

        Args:
            per_trajectory: (N,) advantages that were formed from the complete rollout, or None.
        """
        learner = self.learner
        if per_trajectory is not None:
            return Tables(per_trajectory.to(learner.device)[:, None].expand(-1, learner.schedule.num_transitions))
        scalars = self._scalars(rollout, rows)
        formed = learner.objective.advantages(scalars), learner.objective.flow_slopes(scalars)
        return Tables(*(None if table is None else self._placed(table, rollout, rows) for table in formed))

    def _placed(self, table: Tensor, rollout: Rollout, rows: Rows) -> Tensor:
        """(N, T) this process's share of an update's table, at the rows of its trajectories; zeros elsewhere."""
        placed = torch.zeros_like(rollout.trajectories.log_pf)
        placed[rows] = self.processes.mine(table)
        return placed

    def _log_start(self, rollout: Rollout, rows: Rows) -> Tensor | None:
        """(B,) see `UpdateScalars.log_start`. The pretrained model begins in the same noise, so that with it the term cancels;
        a flow of the first noise holds it already."""
        section = self.recipe.objective
        if not (rollout.is_off_policy and section.weighs_by_log_pf) or section.has_prior or section.flow_is_log_z:
            return None
        start = rollout.trajectories.states(0, rows).double().flatten(1)
        return -0.5 * self.learner.log_scale.reduction_factor * start.square().sum(1)

    def _scalars(self, rollout: Rollout, rows: Rows) -> UpdateScalars:
        """What is known of the update whose trajectories in this process are `rows`."""
        learner, everyones, trajectories = self.learner, self.processes.everyones, rollout.trajectories
        factor, terms, flow_fit = learner.log_scale.reduction_factor, rollout.terms, learner.value_fit
        known = UpdateScalars(
            log_ratio=everyones(factor * (trajectories.log_pf - trajectories.log_pb)[rows]),
            log_reward=None if terms is None else everyones(terms.log_reward[rows]),
            reward=everyones(trajectories.reward[rows]),
            values=None if (values := learner.state_values(trajectories, rows)) is None else everyones(values),
            is_off_policy=rollout.is_off_policy,
            log_start=None if (start := self._log_start(rollout, rows)) is None else everyones(start),
        )
        if flow_fit is None or terms is None:
            return known
        residuals = everyones(flow_fit.residuals(rollout.trajectories, terms, rows))
        return replace(
            known, residuals=residuals, residual_scale=flow_fit.residual_scale, running_mean=flow_fit.baseline
        )
