"""The updates that one rollout pays for: transitions, objective, accumulated gradients.

Every gradient is a mean over all transitions of an update. The numbers that need the whole update (DAG-KL's
baseline, residual scales) are formed first, from the scalars of the rollout and a pass of the flow net, so that the
gradient does not depend on how the rows are cut into micro-batches.

Legend: N trajectories, B rows of a micro-batch, T transitions.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from dag_kernels import TransitionLogProbs, penalty
from torch import Tensor

from dag.balance import Transition
from dag.errors import RunError
from dag.faults import NotFiniteError, Suspects, not_finite
from dag.flow_fit import FlowFit, describe_residuals
from dag.objectives import Objective, ObjectiveOutput
from dag.optim import Stepper
from dag.processes import ALONE, Processes
from dag.progress import Outcome, Progress
from dag.protocols import Policy, Prediction
from dag.recipe import PolicyGradient, Recipe
from dag.rest import Rest
from dag.rollout import look_ahead
from dag.trajectory import Trajectories
from dag.units import RewardScale, Scalars, Units

# Flow-only minibatches are this many micro-batches large: the flow net is far cheaper than the UNet.
_FLOW_BATCHES = 8
# Rewards of (images, trajectory rows).
Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rollout:
    """What every update on one rollout looks at."""

    trajectories: Trajectories
    scalars: Scalars | None
    """None for objectives without a flow."""
    epoch: int
    groups: int
    """Updates that share the trajectories."""
    score: Score | None = None
    """Rewards of images of trajectory rows; only `forward_looking.source: current` calls it."""


class Learner:
    """Owns the optimizers and what the updates carry from rollout to rollout.

    Args:
        flow_fit: None for objectives without a flow.
        text:     (P, S, D) embeddings of the recipe's prompts.
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
        text: Tensor,
        warn: Callable[[str], object] = print,
        world: Processes = ALONE,
    ) -> None:
        self.recipe, self.policy, self.objective, self.world = recipe, policy, objective, world
        self.stepper, self.flow_fit, self.text = stepper, flow_fit, text
        self.schedule = policy.schedule
        self.device = self.schedule.timesteps.device
        self.units = Units(recipe, self.schedule, policy.latent_shape)
        self.optimizer_step = 0
        self.micro_batch = recipe.train.micro_batch
        self.warn = warn
        self.rest = Rest(world)
        self.progress: Progress | None = None
        self.suspects = Suspects()
        balanced = recipe.objective.step_weight == "balanced"
        T = self.schedule.num_transitions
        self.policy_weight = self.schedule.balanced_weights() if balanced else torch.ones(T, device=self.device)

    def steppers(self) -> Iterator[Stepper]:
        """The policy's, then the flow's if there is one."""
        yield self.stepper
        if self.flow_fit is not None:
            yield self.flow_fit.stepper

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
        groups = torch.arange(trajectories.num_trajectories, device=self.device).chunk(train.updates)
        if self.flow_fit is None or epoch >= self.recipe.flow.warmup_epochs:
            for number in range(progress.outcome.updates, train.inner_epochs * len(groups)):
                self._update(rollout, groups[number % len(groups)], progress, on_rows)
        metrics, self.progress = progress.metrics | self.metrics(progress.outcome), None
        return metrics

    def _begin(self, rollout: Rollout) -> Progress:
        """What comes before a rollout's first update: the flow alone, and what is formed from the whole rollout."""
        metrics: dict[str, float | list[float]] = {}
        trajectories, groups = rollout.trajectories, rollout.groups
        if self.flow_fit is not None and rollout.scalars is not None:
            everything = torch.arange(trajectories.num_trajectories, device=self.device)
            mine = self.flow_fit.residuals(trajectories, rollout.scalars, everything)
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

    def _update(self, rollout: Rollout, rows: Tensor, progress: Progress, on_rows: Callable[[int], object]) -> None:
        """One optimizer step over the transitions of `rows`, and of the other processes'."""
        advantages = self._advantages(rollout, rows, progress.per_trajectory)
        count = self.world.size * len(rows)

        def accumulate() -> None:
            self.suspects.trajectories = rollout.trajectories
            steps = self.choose_steps()
            work = [(tile, k, weight) for tile in rows.split(self.micro_batch) for k, weight in steps]
            for tile, k, weight in work[progress.micro_batches :]:
                self.rest.attempt(
                    partial(self._micro_batch, rollout, tile, k, weight, advantages, count, progress.share)
                )
                progress.micro_batches += 1
                on_rows(len(tile))
                self.rest.point()

        self.update(accumulate, progress)

    def _micro_batch(
        self,
        rollout: Rollout,
        rows: Tensor,
        k: int,
        weight: float,
        advantages: Tensor | None,
        count: int,
        share: Outcome,
    ) -> None:
        output, regulariser = self.rows_loss(rollout, rows, k, advantages)
        self.suspects.add(k, rollout.trajectories.sample_id[rows], output)
        self.backward(output, regulariser, weight, count, share)

    # -- one update --------------------------------------------------------------------------------------------------

    def update(
        self,
        accumulate: Callable[[], None],
        progress: Progress,
        timed: Callable[[str], AbstractContextManager[None]] = lambda phase: nullcontext(),
    ) -> None:
        """One optimizer step on the gradients that `accumulate` leaves, or that it goes on with. The step is `timed`.

        Where a GPU runs out of memory it starts over with half the micro-batch: the gradient is the same.
        """
        if progress.micro_batches == 0:
            self.discard_update(progress)
        while True:
            try:
                accumulate()
                break
            except torch.OutOfMemoryError:
                self.discard_update(progress)
                self._halve_micro_batch()
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

    def discard_update(self, progress: Progress) -> None:
        """Forget the gradients of the update under way."""
        progress.restart_update()
        self.suspects.clear()
        for stepper in self.steppers():
            stepper.zero_grad()

    def _halve_micro_batch(self) -> None:
        if self.micro_batch == 1:
            raise RunError(
                "out of GPU memory at micro-batch 1; memory.checkpointing=full, memory.base=nf4, "
                "train.optimizer=paged_adamw8bit or a smaller model.resolution need less"
            )
        self.micro_batch //= 2
        torch.cuda.empty_cache()
        self.warn(f"out of GPU memory: micro-batch {self.micro_batch} from here on, over the same effective batch")

    def backward(
        self, output: ObjectiveOutput, regulariser: Tensor, weight: float, num_trajectories: int, outcome: "Outcome"
    ) -> None:
        """Accumulate the gradient of a micro-batch's share in the mean over the update's transitions."""
        transitions = num_trajectories * self.schedule.num_transitions
        loss = weight * (output.loss + regulariser).sum() / transitions
        self.stepper.scaler.scale(loss).backward()
        outcome.add(output, loss.detach())

    def _unscale_flow(self) -> None:
        """The flow, always fp32, saw the policy's scaled loss."""
        scale = self.stepper.scaler.get_scale()
        if self.flow_fit is None or scale == 1.0:
            return
        for parameter in self.flow_fit.stepper.parameters:
            if parameter.grad is not None:
                parameter.grad /= scale

    def choose_steps(self) -> list[tuple[int, float]]:
        """[(k, importance weight)] of an update; all with weight 1 unless step_fraction < 1.

        The terminal transition, the only place where the final reward enters, is kept with weight 1; the others
        stand for their whole stratum.
        """
        T, train = self.schedule.num_transitions, self.recipe.train
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

    def _advantages(self, rollout: Rollout, rows: Tensor, per_trajectory: Tensor | None) -> Tensor | None:
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

    # -- one micro-batch -----------------------------------------------------------------------------------------

    def rows_loss(
        self, rollout: Rollout, rows: Tensor, k: int, advantages: Tensor | None = None
    ) -> tuple[ObjectiveOutput, Tensor]:
        """(objective output, regulariser (B,)) of step k of some trajectories, with gradients."""
        trajectories = rollout.trajectories
        x_t, x_next = trajectories.states(k, rows), trajectories.states(k + 1, rows)
        prediction = self._predict(rollout, rows, k)
        ks = torch.full((len(rows),), k, device=self.device)
        now = self.schedule.transition_log_probs(
            x_t, x_next, prediction.rows, ks, prediction.guidance_scale, *self._references(rollout, rows, k)
        )
        transition = self.transition(ks, now, trajectories.log_pf[rows, k], trajectories.log_pb[rows, k])
        if advantages is not None:
            transition = replace(transition, advantage=advantages[rows, k])
        if self.flow_fit is not None and rollout.scalars is not None:
            transition = self._with_flows(transition, self.flow_fit, rollout.scalars, rollout, rows, k, prediction)
        return self.output(transition, k), self.regulariser(now)

    def transition(self, ks: Tensor, now: TransitionLogProbs, log_pf_old: Tensor, log_pb: Tensor) -> Transition:
        """Transitions of steps (B,) without their flows; log-probs are sums over latent dims, (B,)."""
        factor = self.units.reduction_factor
        return Transition(
            k=ks,
            is_terminal=ks == self.schedule.num_transitions - 1,
            log_pf=factor * now.log_pf,
            log_pf_old=factor * log_pf_old,
            log_pb=factor * log_pb,
            log_reward=torch.zeros_like(log_pb),
            policy_weight=self.policy_weight[ks],
        )

    def output(self, transition: Transition, k: int) -> ObjectiveOutput:
        """The objective's, weighted as step k."""
        output = self.objective(transition)
        return output if self.flow_fit is None else replace(output, loss=self.flow_fit.step_weights()[k] * output.loss)

    def _predict(self, rollout: Rollout, rows: Tensor, k: int, **switches: bool) -> Prediction:
        text = self.text[rollout.trajectories.prompt_id[rows.cpu()]]
        t = self.schedule.timesteps[k].expand(len(rows))
        return self.policy.predict(rollout.trajectories.states(k, rows), t, text, **switches)

    def _with_flows(
        self,
        transition: Transition,
        flow_fit: FlowFit,
        scalars: Scalars,
        rollout: Rollout,
        rows: Tensor,
        k: int,
        prediction: Prediction,
    ) -> Transition:
        nothing = torch.zeros_like(transition.log_pb)
        log_F_tilde = flow_fit.log_F_tilde(rollout.trajectories, rows, k)
        log_F_tilde_next, looking_next = nothing, nothing
        looking = self._looking(rollout, scalars, rows, k, prediction)
        if k < self.schedule.num_transitions - 1:
            log_F_tilde_next = flow_fit.log_F_tilde(rollout.trajectories, rows, k + 1)
            looking_next = self._looking(rollout, scalars, rows, k + 1)
        return replace(
            transition,
            log_reward=scalars.log_reward[rows],
            residual_scale=flow_fit.residual_scale[transition.k],
            log_F_tilde=log_F_tilde,
            log_F_tilde_next=log_F_tilde_next,
            looking=looking,
            looking_next=looking_next,
        )

    @torch.no_grad()
    def _looking(
        self, rollout: Rollout, scalars: Scalars, rows: Tensor, k: int, prediction: Prediction | None = None
    ) -> Tensor:
        """(B,) forward-looking term at state k: the rollout's, or (published) of the current policy's x0_hat."""
        assert not isinstance(self.recipe.objective, PolicyGradient)
        section = self.recipe.objective.forward_looking
        if section.source != "current":
            return scalars.looking[rows, k]
        assert rollout.score is not None
        prediction = prediction or self._predict(rollout, rows, k, unguided=section.prediction == "conditional")
        x_t = rollout.trajectories.states(k, rows)
        x0_hat = look_ahead(self.schedule, x_t, prediction.guided, prediction.conditional, k, section)
        reward = rollout.score(self.policy.preview(x0_hat), rows.cpu()).to(self.device)
        return self.units.looking(reward, rollout.epoch, k)

    @torch.no_grad()
    def _references(self, rollout: Rollout, rows: Tensor, k: int) -> tuple[Tensor | None, Tensor | None]:
        """(B, C, H, W) outputs of the pretrained and of the sampling-time policy, each None if nothing pulls to it."""
        weights, pretrained, old = self.recipe.regulariser, None, None
        if weights.pretrained_kl > 0:
            pretrained = self._predict(rollout, rows, k, pretrained=True).guided
        if weights.sampling > 0:
            old = rollout.trajectories.output_old(self.schedule, rows, k)
        return pretrained, old

    def regulariser(self, now: TransitionLogProbs) -> Tensor:
        """(B,) pull towards the sampling-time prediction and towards the pretrained policy."""
        weights, total = self.recipe.regulariser, torch.zeros_like(now.log_pb)
        if now.gap is not None:
            total = total + weights.sampling / math.prod(self.policy.latent_shape) * now.gap
        if now.kl is not None:
            total = total + weights.pretrained_kl * now.kl
        return total

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

    def tensors(self) -> dict[str, Tensor]:
        if self.flow_fit is None:
            return {}
        return {"residual_scale": self.flow_fit.residual_scale, "baseline": self.flow_fit.baseline}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; weights, optimizers and `tensors` are kept apart."""
        return {
            "optimizer_step": self.optimizer_step,
            "micro_batch": self.micro_batch,
            "is_calibrated": self.flow_fit is not None and self.flow_fit.is_calibrated,
            "reward_scale": asdict(self.units.reward_scale),
            "objective": self.objective.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "skipped": {stepper.name: stepper.skipped for stepper in self.steppers()},
        }

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.optimizer_step, self.micro_batch = state["optimizer_step"], state["micro_batch"]
        self.units.reward_scale = RewardScale(**state["reward_scale"])
        self.objective.load_state_dict(state["objective"])
        self.stepper.scaler.load_state_dict(state["scaler"])
        # The scale becomes a tensor with the first loss; the next thing may be an optimizer step.
        self.stepper.scaler.scale(torch.zeros((), device=self.device))
        for stepper in self.steppers():
            stepper.skipped = state["skipped"][stepper.name]
        if self.flow_fit is not None:
            self.flow_fit.is_calibrated = state["is_calibrated"]
            self.flow_fit.residual_scale = tensors["residual_scale"].to(self.device)
            self.flow_fit.baseline = tensors["baseline"].to(self.device)
