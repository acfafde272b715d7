"""Optimizer steps: which steps of a chain they train, with which weights, and what to do if memory runs out."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dag.errors import RunError
from dag.objectives import ObjectiveOutput
from dag.recipe import Backpropagation, Recipe
from dag.run.gpu import free_memory
from dag.run.processes import Processes
from dag.training.epoch_state import EpochState, UpdateSums
from dag.training.faults import Suspects
from dag.training.optimizer import ClippedOptimizer, learning_rate
from dag.training.plan import policy_updates
from dag.training.trust_region import Probe, TrustRegion


class Updates:
    """The optimizers of policy and flow, and the accumulation of gradients for them.

    Args:
        policy:          the policy's optimizer.
        flow:            the flow's optimizer; None for objectives without a flow.
        num_transitions: T, the transitions of a trajectory.
        warn:            called with one line when a micro-batch had to be halved.
        processes:       share each update's trajectories.
        informativeness: gives (T,) how much of the reward each step decides.
        region:          bounds the policy's steps.

    Attributes:
        optimizer_step: the number of updates so far.
        total:          the number of updates of the complete training.
        micro_batch:    the recipe's, or less after memory ran out.
        suspects:       the transitions of the unfinished update, in case its gradient is not finite.
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
        informativeness: Callable[[], Tensor],
        region: TrustRegion,
    ) -> None:
        self.informativeness, self.region = informativeness, region
        self.recipe, self.policy, self.flow, self.num_transitions = recipe, policy, flow, num_transitions
        self.device, self.warn, self.processes = device, warn, processes
        self.total = policy_updates(recipe)
        self.optimizer_step, self.micro_batch, self.suspects = 0, recipe.train.micro_batch, Suspects()

    def optimizers(self) -> Iterator[ClippedOptimizer]:
        """The policy's, then the flow's if there is one."""
        yield self.policy
        if self.flow is not None:
            yield self.flow

    # -- one update: begin, backward for each micro-batch, step --------------------------------------------------

    def begin(self, state: EpochState) -> None:
        """Begin an update with cleared gradients, unless `state` has some of its micro-batches already."""
        if state.micro_batches == 0:
            self.discard(state)

    def discard(self, state: EpochState) -> None:
        """Forget the unfinished update and its gradients."""
        state.restart_update()
        self.suspects.clear()
        for optimizer in self.optimizers():
            optimizer.zero_grad()

    def halve_micro_batch(self, state: EpochState, why: str) -> None:
        """Halve the micro-batch and discard the unfinished update, to be done again; its gradient will be the same.

        Args:
            why: the reason, for the error.

        Raises:
            RunError: the micro-batch is one row already.
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
        """[(k, importance weight)] of the steps that an update trains, the same in all processes and micro-batches.

        With `step_fraction` 1 they are all steps of `step_window`, with weight 1. Below 1 they are drawn at random, and weighted
        so that the expected gradient is that of all these steps. With `keep_terminal` the last step, where the final reward
        enters, is always among them, with weight 1; if it is the only one, the gradient of the others is missing.
        `informative_steps` are drawn with `step_choice: informative`.
        """
        train, objective = self.recipe.train, self.recipe.objective
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.optimizer_step)
        if isinstance(objective, Backpropagation):
            return last_steps(objective.last, self.num_transitions, generator)
        if objective.num_draws:
            return [(number, 1.0) for number in range(objective.num_draws)]
        first, end = train.step_window or (0, self.num_transitions)
        size = end - first
        count = max(1, math.ceil(train.step_fraction * size))
        if count == size:
            return [(k, 1.0) for k in range(first, end)]
        if train.step_choice == "informative":
            drawn = informative_steps(self.informativeness()[first:end], count, generator)
        else:
            drawn = uniform_steps(size, count, generator, train.keep_terminal and end == self.num_transitions)
        return [(first + k, weight) for k, weight in drawn]

    def backward(
        self, output: ObjectiveOutput, regulariser: Tensor, weight: float, num_trajectories: int, sums: UpdateSums
    ) -> None:
        """Add the gradient of a micro-batch's share of the update's mean loss.

        Args:
            regulariser:      (B,).
            weight:           importance weight of the step.
            num_trajectories: of the update, in all processes together.
            sums:             where the loss and the ratio are added for the metrics.
        """
        transitions = num_trajectories * self.num_transitions
        loss = weight * (output.loss + regulariser).sum() / transitions
        self.policy.backward(loss)
        sums.add(output, loss.detach())

    def step(self, state: EpochState, probes: Sequence[Probe] = ()) -> None:
        """One optimizer step with the gradients of all processes. Raises NotFiniteError after several skipped ones in a row.

        Args:
            probes: transitions of this process on which `train.max_kl` is measured.
        """
        for optimizer in self.optimizers():
            self.processes.sum_gradients(optimizer.parameters)
        self._unscale_flow()
        self.policy.set_rate(learning_rate(self.recipe.train, self.optimizer_step, self.total))
        norm, bounded = self.region.step(probes)
        norms = {self.policy.name: norm}
        if self.flow is not None:
            norms[self.flow.name] = self.flow.step()
        for optimizer in self.optimizers():
            optimizer.check(self.suspects)
        state.end_update(norms, bounded)
        self.suspects.clear()
        self.optimizer_step += 1

    def _unscale_flow(self) -> None:
        """Divide the flow's gradients by the scale of the policy's loss. With fp16 both come from the one scaled loss."""
        scale = self.policy.scaler.get_scale()
        if self.flow is None or scale == 1.0:
            return
        for parameter in self.flow.parameters:
            if parameter.grad is not None:
                parameter.grad /= scale

    def metrics(self, sums: UpdateSums) -> dict[str, Any]:
        """The metrics of the updates in all processes: loss, ratio and gradient norms. Empty if there was no update."""
        if sums.updates == 0:
            return {}
        measured: dict[str, Any] = {
            "loss": float(self.processes.sum(torch.stack(sums.loss).sum())) / sums.updates,
            "ratio_max_dev": float(self.processes.largest(torch.stack(sums.ratio_dev).max())),
            "learning_rate": learning_rate(self.recipe.train, self.optimizer_step - 1, self.total),
        }
        if sums.clipped:
            measured["clip_frac"] = float(self.processes.sum(torch.stack(sums.clipped).mean())) / self.processes.size
        measured |= {f"grad_norm_{name}": sum(norms) / len(norms) for name, norms in sums.norms.items()}
        measured |= {name: sum(values) / len(values) for name, values in sums.bounded.items()}
        return measured | {f"{name}_per_step": self._means(found) for name, found in sums.per_step.items()}

    def _means(self, found: Tensor) -> list[float | None]:
        """T means over all processes from (T, 2) sums and counts; None for a step that was not trained."""
        return [total / count if count else None for total, count in self.processes.sum(found).tolist()]

    # -- what a checkpoint keeps ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON. A checkpoint stores the optimizer states separately."""
        return {
            "optimizer_step": self.optimizer_step,
            "micro_batch": self.micro_batch,
            "scaler": self.policy.scaler.state_dict(),
            "skipped": {optimizer.name: optimizer.skipped for optimizer in self.optimizers()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer_step, self.micro_batch = state["optimizer_step"], state["micro_batch"]
        self.policy.scaler.load_state_dict(state["scaler"])
        # The scaler creates its tensor at the first loss; after a resume an optimizer step may come before any loss.
        self.policy.scaler.scale(torch.zeros((), device=self.device))
        for optimizer in self.optimizers():
            optimizer.skipped = state["skipped"][optimizer.name]


def last_steps(
    last: int | tuple[int, int], num_transitions: int, generator: torch.Generator
) -> list[tuple[int, float]]:
    """[(k, 1)] of the last steps, whose number is given, or drawn between the two given; all if there are not so many."""
    low, high = (last, last) if isinstance(last, int) else last
    count = min(int(torch.randint(low, high + 1, (), generator=generator)), num_transitions)
    return [(k, 1.0) for k in range(num_transitions - count, num_transitions)]


def uniform_steps(size: int, count: int, generator: torch.Generator, keeps_last: bool) -> list[tuple[int, float]]:
    """[(k, weight)] of `count` of `size` steps, drawn with equal probabilities, or the last one and others drawn so."""
    if not keeps_last:
        return [(k, size / count) for k in sorted(torch.randperm(size, generator=generator)[:count].tolist())]
    if count == 1:
        return [(size - 1, 1.0)]
    others = sorted(torch.randperm(size - 1, generator=generator)[: count - 1].tolist())
    return [(k, (size - 1) / (count - 1)) for k in others] + [(size - 1, 1.0)]


def informative_steps(informativeness: Tensor, count: int, generator: torch.Generator) -> list[tuple[int, float]]:
    """[(k, weight)] of `count` steps, drawn more often the more of the reward they decide.

    A step is drawn with probability pi_k, a quarter of it uniform over the steps and the rest in proportion to the
    informativeness, at most 1. Its weight 1 / pi_k would keep the expected gradient that of all steps, but a rarely drawn step
    would then own its update. So the weight is at most T / count, that of uniform drawing: the steps that decide little count
    less, which changes how fast they are learnt but not the policy at which their gradient vanishes.

    Args:
        informativeness: (T,), at least 0.
    """
    T = len(informativeness)
    share = informativeness.double().cpu()
    share = share / share.sum() if float(share.sum()) > 0 else torch.full_like(share, 1 / T)
    probability = _capped(count * (0.25 / T + 0.75 * share), count)
    # Systematic sampling in a random order: exactly `count` steps, each with its own probability.
    order = torch.randperm(T, generator=generator)
    ends = probability[order].cumsum(0)
    ends[-1] = count
    ticks = torch.rand((), generator=generator, dtype=torch.float64) + torch.arange(count)
    chosen = order[torch.searchsorted(ends, ticks, right=True)]
    return [(k, min(T / count, float(1 / probability[k]))) for k in sorted(chosen.tolist())]


def _capped(probability: Tensor, total: int) -> Tensor:
    """Probabilities (T,) whose sum is `total`, in proportion to the given ones where those would not exceed 1, and 1 there."""
    certain = torch.zeros_like(probability, dtype=torch.bool)
    while True:
        rest = probability.masked_fill(certain, 0.0)
        scaled = torch.where(certain, 1.0, rest * (total - int(certain.sum())) / rest.sum())
        if not bool((scaled > 1).any()):
            return scaled
        certain |= scaled > 1
