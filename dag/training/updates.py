"""Optimizer steps over accumulated gradients: which transitions count, how much, and what happens if memory runs out."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dag.errors import RunError
from dag.objectives import ObjectiveOutput
from dag.recipe import Recipe
from dag.run.gpu import free_memory
from dag.run.processes import Processes
from dag.training.epoch_state import EpochState, UpdateSums
from dag.training.faults import Suspects
from dag.training.optimizer import ClippedOptimizer


class Updates:
    """Owns the optimizers.

    Args:
        policy:          the policy's optimizer.
        flow:            the flow's; None for objectives without one.
        num_transitions: T, of a trajectory.
        warn:            hears of a micro-batch that had to be halved.
        processes:       share each update's trajectories.

    Attributes:
        optimizer_step: the number of updates so far.
        micro_batch: the recipe's, or less where memory ran out.
        suspects:    what to look at if a gradient of the update under way is not finite.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: ClippedOptimizer,
        flow: ClippedOptimizer | None,
        num_transitions: int,
        device: torch.device,
        warn: Callable[[str], object],
        processes: Processes,
    ) -> None:
        self.recipe, self.policy, self.flow, self.num_transitions = recipe, policy, flow, num_transitions
        self.device, self.warn, self.processes = device, warn, processes
        self.optimizer_step, self.micro_batch, self.suspects = 0, recipe.train.micro_batch, Suspects()

    def optimizers(self) -> Iterator[ClippedOptimizer]:
        """The policy's, then the flow's if there is one."""
        yield self.policy
        if self.flow is not None:
            yield self.flow

    # -- one update: begin, backward as often as it takes, step -------------------------------------------------

    def begin(self, state: EpochState) -> None:
        """Clear what an earlier update left, unless this one is under way already."""
        if state.micro_batches == 0:
            self.discard(state)

    def discard(self, state: EpochState) -> None:
        """Forget the gradients of the update under way."""
        state.restart_update()
        self.suspects.clear()
        for optimizer in self.optimizers():
            optimizer.zero_grad()

    def halve_micro_batch(self, state: EpochState, why: str) -> None:
        """Start the update under way over with half as many rows at a time: the gradient is the same.

        Raises:
            RunError: it is one row already.
        """
        self.discard(state)
        if self.micro_batch == 1:
            raise RunError(
                "out of GPU memory at micro-batch 1; memory.checkpointing=full, memory.base=nf4, "
                f"train.optimizer=paged_adamw8bit or a smaller model.resolution need less ({why})"
            )
        self.micro_batch //= 2
        free_memory()
        self.warn(f"out of GPU memory: micro-batch {self.micro_batch} from here on, over the same effective batch")

    def choose_steps(self) -> list[tuple[int, float]]:
        """[(k, importance weight)] of an update; all with weight 1 unless step_fraction < 1.

        The terminal transition, the only place where the final reward enters, is kept with weight 1; the others
        stand for their whole stratum.
        """
        T, train = self.num_transitions, self.recipe.train
        count = max(1, math.ceil(train.step_fraction * T))
        if count == T:
            return [(k, 1.0) for k in range(T)]
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.optimizer_step)
        if not train.keep_terminal:
            return [(k, T / count) for k in sorted(torch.randperm(T, generator=generator)[:count].tolist())]
        if count == 1:
            return [(T - 1, 1.0)]
        others = sorted(torch.randperm(T - 1, generator=generator)[: count - 1].tolist())
        return [(k, (T - 1) / (count - 1)) for k in others] + [(T - 1, 1.0)]

    def backward(
        self, output: ObjectiveOutput, regulariser: Tensor, weight: float, num_trajectories: int, sums: UpdateSums
    ) -> None:
        """Accumulate the gradient of a micro-batch's share in the mean over the update's transitions."""
        transitions = num_trajectories * self.num_transitions
        loss = weight * (output.loss + regulariser).sum() / transitions
        self.policy.backward(loss)
        sums.add(output, loss.detach())

    def step(self, state: EpochState) -> None:
        """One optimizer step on the accumulated gradients. Raises NotFiniteError after several skipped ones in a row."""
        for optimizer in self.optimizers():
            self.processes.sum_gradients(optimizer.parameters)
        self._unscale_flow()
        norms = {optimizer.name: optimizer.step() for optimizer in self.optimizers()}
        for optimizer in self.optimizers():
            optimizer.check(self.suspects)
        state.end_update(norms)
        self.suspects.clear()
        self.optimizer_step += 1

    def _unscale_flow(self) -> None:
        """The flow, always fp32, saw the policy's scaled loss."""
        scale = self.policy.scaler.get_scale()
        if self.flow is None or scale == 1.0:
            return
        for parameter in self.flow.parameters:
            if parameter.grad is not None:
                parameter.grad /= scale

    def metrics(self, sums: UpdateSums) -> dict[str, Any]:
        """Loss, ratio and gradient norms over all processes; empty without an update."""
        if sums.updates == 0:
            return {}
        measured: dict[str, Any] = {
            "loss": float(self.processes.sum(torch.stack(sums.loss).sum())) / sums.updates,
            "ratio_max_dev": float(self.processes.largest(torch.stack(sums.ratio_dev).max())),
        }
        if sums.clipped:
            measured["clip_frac"] = float(self.processes.sum(torch.stack(sums.clipped).mean())) / self.processes.size
        return measured | {f"grad_norm_{name}": sum(norms) / len(norms) for name, norms in sums.norms.items()}

    # -- what a checkpoint keeps ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; optimizer states are kept apart."""
        return {
            "optimizer_step": self.optimizer_step,
            "micro_batch": self.micro_batch,
            "scaler": self.policy.scaler.state_dict(),
            "skipped": {optimizer.name: optimizer.skipped for optimizer in self.optimizers()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer_step, self.micro_batch = state["optimizer_step"], state["micro_batch"]
        self.policy.scaler.load_state_dict(state["scaler"])
        # The scale becomes a tensor with the first loss; the next thing may be an optimizer step.
        self.policy.scaler.scale(torch.zeros((), device=self.device))
        for optimizer in self.optimizers():
            optimizer.skipped = state["skipped"][optimizer.name]
