"""The updates that one rollout pays for.

Every gradient is a mean over all transitions of an update. The numbers that need the whole update (DAG-KL's
baseline, residual scales) are formed first, from the scalars of the rollout and a pass of the flow net, so that the
gradient does not depend on how the rows are cut into micro-batches.

Legend: N trajectories, T transitions.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from dag_kernels import penalty
from torch import Tensor

from dag.chain.policy import Policy
from dag.chain.rollout import Score
from dag.chain.trajectory import Rows, Trajectories, count, cut
from dag.objectives import Objective
from dag.objectives.log_scale import RewardScale, Units
from dag.recipe import PolicyGradient, Recipe
from dag.run.processes import ALONE, Processes
from dag.training.embeddings import Embeddings
from dag.training.epoch_state import Outcome, Progress
from dag.training.faults import NotFiniteError, not_finite
from dag.training.flow_fit import FlowFit, describe_residuals
from dag.training.loss import Loss, Rollout
from dag.training.optimizer import Stepper
from dag.training.safe_points import Rest
from dag.training.updates import Updates

# Flow-only minibatches are this many micro-batches large: the flow net is far cheaper than the UNet.
_FLOW_BATCHES = 8


class Learner:
    """Owns what the updates carry from rollout to rollout.

    Args:
        flow_fit: None for objectives without a flow.
        text:     embeddings of the recipe's prompts.
        warn:     hears of a micro-batch that had to be halved.
        world:    the processes that share each update's trajectories.

    Attributes:
        rest:     where the updates can be interrupted; the trainer's, once there is one.
        progress: of the epoch's updates while they are under way; what a checkpoint inside an epoch keeps.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        objective: Objective,
        stepper: Stepper,
        flow_fit: FlowFit | None,
        text: Embeddings,
        warn: Callable[[str], object] = print,
        world: Processes = ALONE,
    ) -> None:
        self.recipe, self.objective, self.flow_fit, self.text = recipe, objective, flow_fit, text
        self.policy, self.schedule, self.world = policy, policy.schedule, world
        self.device = self.schedule.timesteps.device
        self.units = Units(recipe, self.schedule, policy.latent_shape)
        self.loss = Loss(recipe, policy, objective, flow_fit, text, self.units)
        flow, T = None if flow_fit is None else flow_fit.stepper, self.schedule.num_transitions
        self.updates = Updates(recipe, stepper, flow, T, self.device, warn, world)
        self.rest = Rest(world)
        self.progress: Progress | None = None

    # -- one rollout ---------------------------------------------------------------------------------------------

    def learn(
        self,
        trajectories: Trajectories,
        epoch: int,
        score: Score | None = None,
        on_rows: Callable[[int], object] = lambda n: None,
    ) -> dict[str, float | list[float]]:
        """All updates of one rollout, or those that `progress` has left; returns its metrics.

        `on_rows` hears of finished policy transitions.
        """
        rollout, train = self.rollout(trajectories, epoch, score, self.recipe.train.updates), self.recipe.train
        if self.progress is None:
            self.progress = self._begin(rollout)
        progress = self.progress
        N = trajectories.num_trajectories
        groups = cut(slice(0, N), N // train.updates)
        if self.flow_fit is None or epoch >= self.recipe.flow.warmup_epochs:
            for number in range(progress.outcome.updates, train.inner_epochs * len(groups)):
                self._update(rollout, groups[number % len(groups)], progress, on_rows)
        metrics, self.progress = progress.metrics | self.updates.metrics(progress.outcome), None
        return metrics

    def _begin(self, rollout: Rollout) -> Progress:
        """What comes before a rollout's first update: the flow alone, and what is formed from the whole rollout."""
        metrics: dict[str, float | list[float]] = {}
        trajectories, groups = rollout.trajectories, rollout.groups
        if self.flow_fit is not None and rollout.scalars is not None:
            mine = self.flow_fit.residuals(trajectories, rollout.scalars, slice(0, trajectories.num_trajectories))
            residuals = self.world.everyones(mine, groups)
            metrics |= describe_residuals(residuals)
            self.flow_fit.calibrate(residuals)
            self.train_flow(rollout)
        reward = self.world.everyones(trajectories.reward.cpu(), groups)
        observed = self.objective.observe(reward, self.world.everyones(trajectories.prompt_id, groups))
        advantages = None if observed is None else self.world.mine(observed, groups)
        return Progress(metrics=metrics, per_trajectory=advantages)

    def rollout(self, trajectories: Trajectories, epoch: int, score: Score | None = None, groups: int = 1) -> Rollout:
        """Trajectories of so many updates with their numbers in the objective's units.

        Raises:
            NotFiniteError: a number of theirs is not.
        """
        odd = not_finite(trajectories)
        if self.world.any((odd is not None,))[0]:
            raise NotFiniteError(odd or "a number of another process is not finite")
        if self.flow_fit is None:
            return Rollout(trajectories, None, epoch, groups, score)
        self.units.see(self.world.everyones(trajectories.reward, groups))
        return Rollout(trajectories, self.units.scalars(trajectories, epoch), epoch, groups, score)

    def train_flow(self, rollout: Rollout) -> None:
        """`flow.passes` flow-only passes, each shuffled by its own seed."""
        assert not isinstance(self.recipe.objective, PolicyGradient)
        assert self.flow_fit is not None and rollout.scalars is not None
        huber, batch = self.recipe.objective.huber, _FLOW_BATCHES * self.recipe.train.micro_batch
        for number in range(self.recipe.flow.passes):
            shuffle = torch.Generator().manual_seed((self.recipe.seed * 1_000_003 + rollout.epoch) * 101 + number)
            self.flow_fit.train(
                rollout.trajectories,
                rollout.scalars,
                lambda delta: penalty(delta, huber),
                batch,
                shuffle,
                self.world,
                rollout.groups,
            )

    def _update(self, rollout: Rollout, rows: Rows, progress: Progress, on_rows: Callable[[int], object]) -> None:
        """One optimizer step over the transitions of `rows`, and of the other processes'."""
        advantages = self._advantages(rollout, rows, progress.per_trajectory)
        together = self.world.size * count(rows)

        def accumulate() -> None:
            self.updates.suspects.trajectories = rollout.trajectories
            steps = self.updates.choose_steps()
            work = [(tile, k, weight) for tile in cut(rows, self.updates.micro_batch) for k, weight in steps]
            for tile, k, weight in work[progress.micro_batches :]:
                self.rest.attempt(
                    partial(self._micro_batch, rollout, tile, k, weight, advantages, together, progress.share)
                )
                progress.micro_batches += 1
                on_rows(count(tile))
                self.rest.point()

        self.updates.run(accumulate, progress)

    def _micro_batch(
        self,
        rollout: Rollout,
        rows: Rows,
        k: int,
        weight: float,
        advantages: Tensor | None,
        together: int,
        share: Outcome,
    ) -> None:
        output, regulariser = self.loss.rows(rollout, rows, k, advantages)
        self.updates.suspects.add(k, rollout.trajectories.sample_id[rows], output)
        self.updates.backward(output, regulariser, weight, together, share)

    def _advantages(self, rollout: Rollout, rows: Rows, per_trajectory: Tensor | None) -> Tensor | None:
        """(N, T) advantages, filled in for `rows`, or None. Formed over the rows of all processes."""
        if per_trajectory is not None:
            return per_trajectory.to(self.device)[:, None].expand(-1, self.schedule.num_transitions)
        if self.flow_fit is None or rollout.scalars is None:
            return None
        residuals = self.world.everyones(self.flow_fit.residuals(rollout.trajectories, rollout.scalars, rows))
        advantages = self.objective.advantages(residuals, self.flow_fit.residual_scale, self.flow_fit.baseline)
        if advantages is None:
            return None
        table = torch.zeros_like(rollout.scalars.log_pf)
        table[rows] = self.world.mine(advantages)
        return table

    # -- what a checkpoint keeps ---------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        if self.flow_fit is None:
            return {}
        return {"residual_scale": self.flow_fit.residual_scale, "baseline": self.flow_fit.baseline}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; weights, optimizers and `tensors` are kept apart."""
        return self.updates.state_dict() | {
            "is_calibrated": self.flow_fit is not None and self.flow_fit.is_calibrated,
            "reward_scale": asdict(self.units.reward_scale),
            "objective": self.objective.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.updates.load_state_dict(state)
        self.units.reward_scale = RewardScale(**state["reward_scale"])
        self.objective.load_state_dict(state["objective"])
        if self.flow_fit is not None:
            self.flow_fit.is_calibrated = state["is_calibrated"]
            self.flow_fit.residual_scale = tensors["residual_scale"].to(self.device)
            self.flow_fit.baseline = tensors["baseline"].to(self.device)
