"""Optimizer steps over accumulated gradients: which transitions count, how much, and what happens if memory runs out."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dag.errors import RunError
from dag.objectives import ObjectiveOutput
from dag.recipe import Recipe
from dag.run.gpu import first_line, free_memory
from dag.run.processes import Processes
from dag.training.epoch_state import Outcome, Progress
from dag.training.faults import Suspects
from dag.training.optimizer import Stepper


class Updates:
    """Owns the optimizers.

    Args:
        stepper:         the policy's.
        flow:            the flow's; None for objectives without one.
        num_transitions: of a trajectory, T.
        warn:            hears of a micro-batch that had to be halved.
        world:           the processes that share each update's trajectories.

    Attributes:
        optimizer_step: how many there were so far.
        micro_batch: the recipe's, or less where memory ran out.
        suspects:    what to look at if a gradient of the update under way is not finite.
    """

    def __init__(
        self,
        recipe: Recipe,
        stepper: Stepper,
        flow: Stepper | None,
        num_transitions: int,
        device: torch.device,
        warn: Callable[[str], object],
        world: Processes,
    ) -> None:
        self.recipe, self.stepper, self.flow, self.num_transitions = recipe, stepper, flow, num_transitions
        self.device, self.warn, self.world = device, warn, world
        self.optimizer_step, self.micro_batch, self.suspects = 0, recipe.train.micro_batch, Suspects()

    def steppers(self) -> Iterator[Stepper]:
        """The policy's, then the flow's if there is one."""
        yield self.stepper
        if self.flow is not None:
            yield self.flow

    def run(
        self,
        accumulate: Callable[[], None],
        progress: Progress,
        timed: Callable[[str], AbstractContextManager[None]] = lambda phase: nullcontext(),
    ) -> None:
        """One optimizer step on the gradients that `accumulate` leaves, or that it goes on with. The step is `timed`.

        Where a GPU runs out of memory it starts over with half the micro-batch: the gradient is the same.
        """
        if progress.micro_batches == 0:
            self.discard(progress)
        while True:
            try:
                accumulate()
                break
            except torch.OutOfMemoryError as error:
                why = first_line(error)
            # Not inside, where the traceback would hold the tensors that were too many.
            self.discard(progress)
            self._halve_micro_batch(why)
        with timed("update"):
            for stepper in self.steppers():
                self.world.sum_gradients(stepper.parameters)
            self._unscale_flow()
            norms = {stepper.name: stepper.step() for stepper in self.steppers()}
            for stepper in self.steppers():
                stepper.check(self.suspects)
            progress.end_update(norms)
            self.suspects.clear()
        self.optimizer_step += 1

    def discard(self, progress: Progress) -> None:
        """Forget the gradients of the update under way."""
        progress.restart_update()
        self.suspects.clear()
        for stepper in self.steppers():
            stepper.zero_grad()

    def _halve_micro_batch(self, why: str) -> None:
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
        self, output: ObjectiveOutput, regulariser: Tensor, weight: float, num_trajectories: int, outcome: Outcome
    ) -> None:
        """Accumulate the gradient of a micro-batch's share in the mean over the update's transitions."""
        transitions = num_trajectories * self.num_transitions
        loss = weight * (output.loss + regulariser).sum() / transitions
        self.stepper.backward(loss)
        outcome.add(output, loss.detach())

    def _unscale_flow(self) -> None:
        """The flow, always fp32, saw the policy's scaled loss."""
        scale = self.stepper.scaler.get_scale()
        if self.flow is None or scale == 1.0:
            return
        for parameter in self.flow.parameters:
            if parameter.grad is not None:
                parameter.grad /= scale

    def metrics(self, outcome: Outcome) -> dict[str, Any]:
        """Of all processes; empty without an update."""
        if outcome.updates == 0:
            return {}
        measured: dict[str, Any] = {
            "loss": float(self.world.sum(torch.stack(outcome.loss).sum())) / outcome.updates,
            "ratio_max_dev": float(self.world.largest(torch.stack(outcome.ratio_dev).max())),
        }
        if outcome.clipped:
            measured["clip_frac"] = float(self.world.sum(torch.stack(outcome.clipped).mean())) / self.world.size
        return measured | {f"grad_norm_{name}": sum(norms) / len(norms) for name, norms in outcome.norms.items()}

    # -- what a checkpoint keeps ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; optimizer states are kept apart."""
        return {
            "optimizer_step": self.optimizer_step,
            "micro_batch": self.micro_batch,
            "scaler": self.stepper.scaler.state_dict(),
            "skipped": {stepper.name: stepper.skipped for stepper in self.steppers()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer_step, self.micro_batch = state["optimizer_step"], state["micro_batch"]
        self.stepper.scaler.load_state_dict(state["scaler"])
        # The scale becomes a tensor with the first loss; the next thing may be an optimizer step.
        self.stepper.scaler.scale(torch.zeros((), device=self.device))
        for stepper in self.steppers():
            stepper.skipped = state["skipped"][stepper.name]
