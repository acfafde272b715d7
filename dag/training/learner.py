"""The policy, objective, state flow, optimizers and scales that training carries from rollout to rollout.

`StoredTraining` and `OnePass` are the two ways of training a learner.

Legend: N trajectories, T transitions.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from dag_kernels import penalty
from torch import Generator, Tensor

from dag.chain.policy import Policy
from dag.chain.rollout import Score
from dag.chain.trajectory import Trajectories
from dag.objectives import Objective
from dag.objectives.log_scale import LogScale, RewardScale
from dag.recipe import Recipe
from dag.run.processes import ALONE, Processes
from dag.training.embeddings import Embeddings
from dag.training.faults import NotFiniteError, not_finite
from dag.training.flow_fit import FlowFit
from dag.training.loss import Loss, Rollout
from dag.training.optimizer import ClippedOptimizer
from dag.training.updates import Updates

# A flow-only update takes this many times as many transitions as a micro-batch: the flow is far cheaper than the denoiser.
_FLOW_BATCHES = 8


class Learner:
    """The state of training that outlives an epoch, apart from counters of the loop.

    Args:
        optimizer: the policy's optimizer.
        flow_fit:  the state flow; None for objectives without one.
        text:      embeddings of the recipe's prompts.
        warn:      called with one line when a micro-batch had to be halved.
        processes: share each update's trajectories.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        objective: Objective,
        optimizer: ClippedOptimizer,
        flow_fit: FlowFit | None,
        text: Embeddings,
        warn: Callable[[str], object] = print,
        processes: Processes = ALONE,
    ) -> None:
        self.recipe, self.objective, self.flow_fit, self.text = recipe, objective, flow_fit, text
        self.policy, self.schedule, self.processes = policy, policy.schedule, processes
        self.device = self.schedule.timesteps.device
        self.log_scale = LogScale(recipe, self.schedule, policy.latent_shape)
        self.loss = Loss(recipe, policy, objective, flow_fit, text, self.log_scale)
        flow, T = None if flow_fit is None else flow_fit.optimizer, self.schedule.num_transitions
        self.updates = Updates(recipe, optimizer, flow, T, self.device, warn, processes)

    def rollout(self, trajectories: Trajectories, epoch: int, score: Score | None = None, groups: int = 1) -> Rollout:
        """The rollout of these trajectories, with their log-probs and rewards on the objective's scale.

        Args:
            score:  see `Rollout.score`.
            groups: the number of updates that share the trajectories.

        Raises:
            NotFiniteError: a number of the trajectories, in any process, is not finite.
        """
        bad = not_finite(trajectories)
        if self.processes.any((bad is not None,))[0]:
            raise NotFiniteError(bad or "a number of another process is not finite")
        if self.flow_fit is None:
            return Rollout(trajectories, None, epoch, groups, score)
        self.log_scale.see(self.processes.everyones(trajectories.reward, groups))
        return Rollout(trajectories, self.log_scale.terms(trajectories, epoch), epoch, groups, score)

    def fit_flow(self, rollout: Rollout) -> None:
        """Train the flow alone on a rollout, `flow.passes` times, each with its own shuffle."""
        balance = self.recipe.balance
        assert balance is not None and self.flow_fit is not None and rollout.terms is not None
        huber, batch = balance.huber, _FLOW_BATCHES * self.recipe.train.micro_batch
        for number in range(self.recipe.flow.passes):
            shuffle = Generator().manual_seed((self.recipe.seed * 1_000_003 + rollout.epoch) * 101 + number)
            self.flow_fit.fit(
                rollout.trajectories,
                rollout.terms,
                lambda delta: penalty(delta, huber),
                batch,
                shuffle,
                self.processes,
                rollout.groups,
            )

    # -- what a checkpoint keeps ---------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The flow's running statistics, (T,) each."""
        if self.flow_fit is None:
            return {}
        return {"residual_scale": self.flow_fit.residual_scale, "baseline": self.flow_fit.baseline}

    def state_dict(self) -> dict[str, Any]:
        """The state's plain numbers, for JSON. A checkpoint stores weights, optimizer states and `tensors` separately."""
        return self.updates.state_dict() | {
            "is_calibrated": self.flow_fit is not None and self.flow_fit.is_calibrated,
            "reward_scale": asdict(self.log_scale.reward_scale),
            "objective": self.objective.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.updates.load_state_dict(state)
        self.log_scale.reward_scale = RewardScale(**state["reward_scale"])
        self.objective.load_state_dict(state["objective"])
        if self.flow_fit is not None:
            self.flow_fit.is_calibrated = state["is_calibrated"]
            self.flow_fit.residual_scale = tensors["residual_scale"].to(self.device)
            self.flow_fit.baseline = tensors["baseline"].to(self.device)
