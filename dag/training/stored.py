"""Training on a stored rollout: the updates that it pays for.

Every gradient is a mean over all transitions of an update. The numbers that need the complete update (DAG-KL's baseline,
residual scales) are formed first, from the numbers of the rollout and a pass of the flow net, so that the gradient does not
depend on how the rows are cut into micro-batches.

Legend: N trajectories, T transitions.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dag.chain.rollout import Score
from dag.chain.trajectory import Rows, Trajectories, count, cut
from dag.run.meter import PhaseMeter
from dag.training.epoch_state import EpochState
from dag.training.flow_fit import describe_residuals
from dag.training.learner import Learner
from dag.training.loss import Rollout
from dag.training.safe_points import Steps, agreed


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
    ) -> Steps:
        """The updates of an epoch, or those that `state` has left; yields after each micro-batch.

        At the end `state.measured` holds their metrics.

        Args:
            trajectories: the epoch's, on this process.
            score:        rewards of images of trajectory rows; only `forward_looking.source: current` calls it.
            on_rows:      hears of finished policy transitions.

        Raises:
            TooManyRowsError: in a micro-batch; a new iterator over the same state tries again.
            NotFiniteError:   see `Learner.rollout` and `Updates.step`.
        """
        train, epoch = self.recipe.train, state.epoch
        with self.meter.phase("update"):
            rollout = self.learner.rollout(trajectories, epoch, score, train.updates)
            if not state.has_begun:
                self._begin(rollout, state)
        N = trajectories.num_trajectories
        groups = cut(slice(0, N), N // train.updates)
        if self.learner.flow_fit is None or epoch >= self.recipe.flow.warmup_epochs:
            for number in range(state.sums.updates, train.inner_epochs * len(groups)):
                yield from self._update(rollout, groups[number % len(groups)], state, on_rows)
        state.measured |= self.updates.metrics(state.sums)

    def _begin(self, rollout: Rollout, state: EpochState) -> None:
        """What comes before a rollout's first update: the flow alone, and what is formed from the complete rollout."""
        trajectories, groups, flow_fit = rollout.trajectories, rollout.groups, self.learner.flow_fit
        if flow_fit is not None and rollout.terms is not None:
            mine = flow_fit.residuals(trajectories, rollout.terms, slice(0, trajectories.num_trajectories))
            residuals = self.processes.everyones(mine, groups)
            state.measured |= describe_residuals(residuals)
            flow_fit.recentre(residuals)
            self.learner.fit_flow(rollout)
        reward = self.processes.everyones(trajectories.reward.cpu(), groups)
        prompt_id = self.processes.everyones(trajectories.prompt_id, groups)
        advantages = self.learner.objective.observe(reward, prompt_id)
        state.advantages = None if advantages is None else self.processes.mine(advantages, groups)
        state.has_begun = True

    def _update(self, rollout: Rollout, rows: Rows, state: EpochState, on_rows: Callable[[int], object]) -> Steps:
        """One optimizer step over the transitions of `rows`, and of the other processes'."""
        with self.meter.phase("update"):
            advantages = self._advantages(rollout, rows, state.advantages)
            self.updates.begin(state)
        self.updates.suspects.trajectories = rollout.trajectories
        steps, together = self.updates.choose_steps(), self.processes.size * count(rows)
        work = [(tile, k, weight) for tile in cut(rows, self.updates.micro_batch) for k, weight in steps]
        for tile, k, weight in work[state.micro_batches :]:
            with self.meter.phase("update"):
                agreed(
                    self.processes,
                    partial(self._micro_batch, rollout, tile, k, weight, advantages, together, state),
                )
            state.micro_batches += 1
            on_rows(count(tile))
            yield
        with self.meter.phase("update"):
            self.updates.step(state)

    def _micro_batch(
        self,
        rollout: Rollout,
        rows: Rows,
        k: int,
        weight: float,
        advantages: Tensor | None,
        together: int,
        state: EpochState,
    ) -> None:
        output, regulariser = self.learner.loss.of_step(rollout, rows, k, advantages)
        self.updates.suspects.add(k, rollout.trajectories.sample_id[rows], output)
        self.updates.backward(output, regulariser, weight, together, state.share)

    def _advantages(self, rollout: Rollout, rows: Rows, per_trajectory: Tensor | None) -> Tensor | None:
        """(N, T) advantages, filled in for `rows`, or None. Formed over the rows of all processes."""
        learner = self.learner
        if per_trajectory is not None:
            return per_trajectory.to(learner.device)[:, None].expand(-1, learner.schedule.num_transitions)
        flow_fit, terms = learner.flow_fit, rollout.terms
        if flow_fit is None or terms is None:
            return None
        residuals = self.processes.everyones(flow_fit.residuals(rollout.trajectories, terms, rows))
        advantages = learner.objective.advantages(residuals, flow_fit.residual_scale, flow_fit.baseline)
        if advantages is None:
            return None
        table = torch.zeros_like(terms.log_pf)
        table[rows] = self.processes.mine(advantages)
        return table
