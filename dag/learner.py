"""The updates that one rollout pays for: flow constants, transitions, objective, accumulated gradients.

Every gradient is a mean over all transitions of an update. The numbers that need the whole update (DAG-KL's
baseline, residual scales) are formed first, from the scalars of the rollout and a pass of the flow net, so that the
gradient does not depend on how the rows are cut into micro-batches.

Legend: N trajectories, B rows of a micro-batch, T transitions, D latent elements.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dag import balance
from dag.balance import Transition
from dag.objectives import Objective, ObjectiveOutput
from dag.optim import Stepper
from dag.protocols import Policy, Prediction
from dag.recipe import DetailedBalance, KLDivergence, PolicyGradient, Recipe
from dag.rollout import look_ahead
from dag.state_flow import StateFlow
from dag.trajectory import Trajectories

# Share of a new rollout in the running per-step residual scale.
_SCALE_RATE = 0.3
# Flow-only minibatches are this many micro-batches large: the flow net is far cheaper than the UNet.
_FLOW_BATCHES = 8
# Rewards of (images, trajectory rows).
Score = Callable[[Tensor, Tensor], Tensor]


@dataclass
class RewardScale:
    """How raw rewards enter log R = beta (r - mean) / sd; the identity unless beta.unit is reward_sd."""

    mean: float = 0.0
    sd: float = 1.0
    is_set: bool = False

    def __call__(self, reward: Tensor) -> Tensor:
        return (reward - self.mean) / self.sd


def beta_at(recipe: Recipe, epoch: int) -> float:
    """The inverse temperature of an epoch, in nats per unit of reward."""
    assert not isinstance(recipe.objective, PolicyGradient)
    beta = recipe.objective.beta
    if beta.anneal == "none":
        return beta.value
    done = epoch if beta.anneal == "linear_from_zero" else epoch + 1
    return beta.value * min(1.0, done / max(1.0, 0.5 * recipe.train.epochs))


@dataclass(frozen=True)
class Scalars:
    """(N, T) and (N,) numbers of a rollout in the recipe's reduction and the epoch's beta."""

    log_pf: Tensor
    log_pb: Tensor
    looking: Tensor
    log_reward: Tensor


class Learner:
    """Owns the optimizers and what they carry from rollout to rollout.

    Args:
        text:  (P, S, D) embeddings of the recipe's prompts.
        score: rewards of images of trajectory rows; only `forward_looking.source: current` calls it.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        flow: StateFlow | None,
        objective: Objective,
        policy_stepper: Stepper,
        flow_stepper: Stepper | None,
        text: Tensor,
    ) -> None:
        self.recipe, self.policy, self.flow, self.objective = recipe, policy, flow, objective
        self.policy_stepper, self.flow_stepper, self.text = policy_stepper, flow_stepper, text
        self.schedule = policy.schedule
        self.device = self.schedule.timesteps.device
        T = self.schedule.num_transitions
        self.reward_scale = RewardScale()
        self.residual_scale = torch.ones(T, device=self.device)
        self.is_calibrated = False
        self.optimizer_step = 0
        reduction = recipe.objective.log_prob_reduction
        self.reduction_factor = 1.0 if reduction == "sum" else 1.0 / math.prod(policy.latent_shape)
        balanced = recipe.objective.step_weight == "balanced"
        self.policy_weight = self.schedule.balanced_weights() if balanced else torch.ones(T, device=self.device)

    @property
    def _config(self) -> DetailedBalance | KLDivergence:
        """The objective's section; only objectives with a flow have these keys."""
        assert not isinstance(self.recipe.objective, PolicyGradient)
        return self.recipe.objective

    # -- one rollout ---------------------------------------------------------------------------------------------

    def learn(
        self,
        trajectories: Trajectories,
        epoch: int,
        score: Score | None = None,
        on_rows: Callable[[int], object] = lambda n: None,
    ) -> dict[str, float | list[float]]:
        """All updates of one rollout; returns its metrics. `on_rows` hears of finished policy transitions."""
        metrics: dict[str, float | list[float]] = {}
        scalars = None
        if self.flow is not None:
            scalars = self._scalars(trajectories, epoch)
            metrics |= self._calibrate(trajectories, scalars)
            self._train_flow(trajectories, scalars, epoch)
        per_trajectory = self.objective.observe(trajectories.reward.cpu(), trajectories.prompt_id)
        if self.flow is not None and epoch < self.recipe.flow.warmup_epochs:
            return metrics
        outcome = _Outcome()
        train = self.recipe.train
        group_size = trajectories.num_trajectories // train.updates
        for inner in range(train.inner_epochs):
            for update in range(train.updates):
                rows = torch.arange(update * group_size, (update + 1) * group_size, device=self.device)
                is_first = inner == 0 and update == 0
                self._update(trajectories, scalars, rows, per_trajectory, outcome, is_first, score, on_rows, epoch)
        return metrics | outcome.metrics()

    def _update(
        self,
        trajectories: Trajectories,
        scalars: Scalars | None,
        rows: Tensor,
        per_trajectory: Tensor | None,
        outcome: "_Outcome",
        is_first: bool,
        score: Score | None,
        on_rows: Callable[[int], object],
        epoch: int,
    ) -> None:
        """One optimizer step over the transitions of `rows`."""
        T = self.schedule.num_transitions
        advantages = self._advantages(trajectories, scalars, rows, per_trajectory)
        for stepper in self._steppers():
            stepper.zero_grad()
        steps = self._choose_steps()
        for tile in rows.split(self.recipe.train.micro_batch):
            for k, weight in steps:
                output, regulariser = self.rows_loss(trajectories, scalars, tile, k, advantages, score, epoch)
                loss = weight * (output.loss + regulariser).sum() / (len(rows) * T)
                self.policy_stepper.scaler.scale(loss).backward()
                outcome.add(output, loss.detach(), is_first)
                on_rows(len(tile))
        scale = self.policy_stepper.scaler.get_scale()
        if self.flow_stepper is not None and scale != 1.0:
            for parameter in self.flow_stepper.parameters:
                if parameter.grad is not None:
                    parameter.grad /= scale
        norms = {stepper.name: stepper.step() for stepper in self._steppers()}
        outcome.add_norms(norms)
        self.optimizer_step += 1

    def _steppers(self) -> Iterator[Stepper]:
        yield self.policy_stepper
        if self.flow_stepper is not None:
            yield self.flow_stepper

    def _choose_steps(self) -> list[tuple[int, float]]:
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

    # -- one micro-batch -----------------------------------------------------------------------------------------

    def rows_loss(
        self,
        trajectories: Trajectories,
        scalars: Scalars | None,
        rows: Tensor,
        k: int,
        advantages: Tensor | None,
        score: Score | None = None,
        epoch: int = 0,
    ) -> tuple[ObjectiveOutput, Tensor]:
        """(objective output, regulariser (B,)) of step k of some trajectories, with gradients."""
        x_t, x_next = trajectories.chain[k, rows], trajectories.chain[k + 1, rows]
        text = self.text[trajectories.prompt_id[rows.cpu()]]
        t = self.schedule.timesteps[k].expand(len(rows))
        prediction = self.policy.predict(x_t, t, text)
        log_pf = self.reduction_factor * self.schedule.log_pf(x_t, x_next, prediction.guided, k)
        T = self.schedule.num_transitions
        ks = torch.full((len(rows),), k, device=self.device)
        zero = torch.zeros_like(log_pf.detach())
        transition = Transition(
            k=ks,
            is_terminal=ks == T - 1,
            log_pf=log_pf,
            log_pf_old=self.reduction_factor * trajectories.log_pf[rows, k],
            log_pb=self.reduction_factor * trajectories.log_pb[rows, k],
            log_reward=zero if scalars is None else scalars.log_reward[rows],
            residual_scale=None if scalars is None else self.residual_scale[ks],
            policy_weight=self.policy_weight[ks],
            advantage=None if advantages is None else advantages[rows, k],
        )
        if scalars is not None:
            transition = self._with_flows(transition, trajectories, scalars, rows, k, prediction, score, epoch)
        return self.objective(transition), self._regulariser(trajectories, rows, k, prediction.guided, x_t, t, text)

    def _with_flows(
        self,
        transition: Transition,
        trajectories: Trajectories,
        scalars: Scalars,
        rows: Tensor,
        k: int,
        prediction: Prediction,
        score: Score | None,
        epoch: int,
    ) -> Transition:
        is_terminal = k == self.schedule.num_transitions - 1
        nothing = torch.zeros_like(transition.log_pb)
        looking, looking_next = scalars.looking[rows, k], nothing
        if not is_terminal:
            looking_next = scalars.looking[rows, k + 1]
        source = self._config.forward_looking.source
        if source == "current":
            assert score is not None
            looking = self._look_now(trajectories, rows, k, prediction, score, epoch)
            if not is_terminal:
                looking_next = self._look_now(trajectories, rows, k + 1, None, score, epoch)
        return replace(
            transition,
            log_F_tilde=self.log_F_tilde(trajectories, rows, k),
            log_F_tilde_next=nothing if is_terminal else self.log_F_tilde(trajectories, rows, k + 1),
            looking=looking,
            looking_next=looking_next,
        )

    @torch.no_grad()
    def _look_now(
        self,
        trajectories: Trajectories,
        rows: Tensor,
        k: int,
        prediction: Prediction | None,
        score: Score,
        epoch: int,
    ) -> Tensor:
        """(B,) forward-looking term from the current policy's x0_hat, the published form."""
        x_t = trajectories.chain[k, rows]
        if prediction is None:
            text = self.text[trajectories.prompt_id[rows.cpu()]]
            prediction = self.policy.predict(x_t, self.schedule.timesteps[k].expand(len(rows)), text)
        looking = self._config.forward_looking
        x0_hat = look_ahead(self.schedule, x_t, prediction.guided.detach(), prediction.conditional.detach(), k, looking)
        reward = score(self.policy.decode(x0_hat), rows.cpu()).to(self.device)
        return beta_at(self.recipe, epoch) * self._looking_weights()[k] * self.reward_scale(reward)

    def _regulariser(
        self,
        trajectories: Trajectories,
        rows: Tensor,
        k: int,
        output: Tensor,
        x_t: Tensor,
        t: Tensor,
        text: Tensor,
    ) -> Tensor:
        """(B,) pull towards the sampling-time prediction and towards the pretrained policy."""
        weights = self.recipe.regulariser
        total = torch.zeros(len(rows), device=self.device)
        if weights.sampling > 0:
            old = trajectories.output_old(self.schedule, rows, k)
            total = total + weights.sampling * (output - old).square().flatten(1).mean(1)
        if weights.pretrained_kl > 0:
            with torch.no_grad():
                reference = self.policy.predict(x_t, t, text, pretrained=True).guided
            total = total + weights.pretrained_kl * self.schedule.policy_kl(output, reference, k)
        return total

    # -- the flow ------------------------------------------------------------------------------------------------

    def log_F_tilde(self, trajectories: Trajectories, rows: Tensor, k: int | Tensor) -> Tensor:
        """(B,) learnt part of the flow at state k of each row; k an int or (B,)."""
        assert self.flow is not None
        ks = torch.full((len(rows),), k, device=self.device) if isinstance(k, int) else k
        text = self.text[trajectories.prompt_id[rows.cpu()]].to(self.device)
        return self.flow(trajectories.chain[ks, rows], self.schedule.timesteps[ks], ks, text)

    @torch.no_grad()
    def flow_table(self, trajectories: Trajectories, rows: Tensor) -> Tensor:
        """(n, T) log F~ at every state but the last of some trajectories."""
        return torch.stack(
            [self.log_F_tilde(trajectories, rows, k) for k in range(self.schedule.num_transitions)], dim=1
        )

    def _looking_weights(self) -> Tensor:
        alpha_bar = self.schedule.alpha_bar_t
        return alpha_bar if self._config.forward_looking.weight == "alpha_bar" else torch.ones_like(alpha_bar)

    def _scalars(self, trajectories: Trajectories, epoch: int) -> Scalars:
        """The rollout's numbers in the objective's units; the first rollout fixes the reward's standard units."""
        beta = self._config.beta
        if beta.unit == "reward_sd" and not self.reward_scale.is_set:
            sd = float(trajectories.reward.std(correction=0))
            self.reward_scale = RewardScale(float(trajectories.reward.mean()), sd if sd > 0 else 1.0, True)
        now = beta_at(self.recipe, epoch)
        looking = torch.zeros_like(trajectories.log_pf)
        if trajectories.looking is not None:
            looking = now * self._looking_weights() * self.reward_scale(trajectories.looking)
        return Scalars(
            log_pf=self.reduction_factor * trajectories.log_pf,
            log_pb=self.reduction_factor * trajectories.log_pb,
            looking=looking,
            log_reward=now * self.reward_scale(trajectories.reward),
        )

    def _residuals(self, trajectories: Trajectories, scalars: Scalars, rows: Tensor) -> Tensor:
        """(n, T) residuals of some trajectories at the sampling-time policy and the current flow."""
        flows = self.flow_table(trajectories, rows)
        return balance.residual_table(
            flows, scalars.looking[rows], scalars.log_pf[rows], scalars.log_pb[rows], scalars.log_reward[rows]
        )

    def _calibrate(self, trajectories: Trajectories, scalars: Scalars) -> dict[str, float | list[float]]:
        """Measure a fresh rollout's residuals, then centre the flow's constants on them and track their scale."""
        assert self.flow is not None
        config, rate = self._config, self.recipe.flow.calibration
        everything = torch.arange(trajectories.num_trajectories, device=self.device)
        residuals = self._residuals(trajectories, scalars, everything)
        measured: dict[str, float | list[float]] = {
            "residual_mean": float(residuals.mean()),
            "residual_rms": float(residuals.square().mean().sqrt()),
            "residual_mean_per_step": residuals.mean(0).tolist(),
            "residual_rms_per_step": residuals.square().mean(0).sqrt().tolist(),
        }
        if rate > 0:
            shift = balance.constant_shift(residuals)
            self.flow.constants += shift if not self.is_calibrated else rate * shift
            residuals = self._residuals(trajectories, scalars, everything)
        spread = residuals.std(0, correction=0).clamp(min=1e-6)
        if rate > 0 and not self.is_calibrated:
            self.flow.scale.copy_(spread.mean())
        if config.residual_scale == "running":
            keep = 1 - _SCALE_RATE if self.is_calibrated else 0.0
            self.residual_scale = keep * self.residual_scale + (1 - keep) * spread
        self.is_calibrated = True
        return measured

    def _train_flow(self, trajectories: Trajectories, scalars: Scalars, epoch: int) -> None:
        """`flow.passes` shuffled passes over every transition with log P_F held at its sampling-time value."""
        from dag.objectives.registry import penalty

        assert self.flow is not None and self.flow_stepper is not None
        N, T = scalars.log_pf.shape
        for number in range(self.recipe.flow.passes):
            generator = torch.Generator().manual_seed((self.recipe.seed * 1_000_003 + epoch) * 101 + number)
            order = torch.randperm(N * T, generator=generator).to(self.device)
            for index in order.split(_FLOW_BATCHES * self.recipe.train.micro_batch):
                rows, k = index // T, index % T
                transition = self._flow_transition(trajectories, scalars, rows, k)
                log_F, log_F_next = transition.flows()
                delta = balance.residual(log_F, transition.log_pf, transition.log_pb, log_F_next.detach())
                self.flow_stepper.zero_grad()
                penalty(delta / self.residual_scale[k], self._config.huber).mean().backward()
                self.flow_stepper.step()

    def _flow_transition(self, trajectories: Trajectories, scalars: Scalars, rows: Tensor, k: Tensor) -> Transition:
        T = self.schedule.num_transitions
        following = (k + 1).clamp(max=T - 1)
        with torch.no_grad():
            log_F_tilde_next = self.log_F_tilde(trajectories, rows, following)
        return Transition(
            k=k,
            is_terminal=k == T - 1,
            log_pf=scalars.log_pf[rows, k],
            log_pf_old=scalars.log_pf[rows, k],
            log_pb=scalars.log_pb[rows, k],
            log_reward=scalars.log_reward[rows],
            log_F_tilde=self.log_F_tilde(trajectories, rows, k),
            log_F_tilde_next=log_F_tilde_next,
            looking=scalars.looking[rows, k],
            looking_next=scalars.looking[rows, following],
        )

    def _advantages(
        self, trajectories: Trajectories, scalars: Scalars | None, rows: Tensor, per_trajectory: Tensor | None
    ) -> Tensor | None:
        """(N, T) advantages, filled in for `rows`, or None."""
        T = self.schedule.num_transitions
        if per_trajectory is not None:
            return per_trajectory.to(self.device)[:, None].expand(-1, T)
        if scalars is None:
            return None
        advantages = self.objective.advantages(self._residuals(trajectories, scalars, rows), self.residual_scale)
        if advantages is None:
            return None
        table = torch.zeros_like(scalars.log_pf)
        table[rows] = advantages
        return table


class _Outcome:
    """Sums over the micro-batches of one rollout."""

    def __init__(self) -> None:
        self.loss: list[Tensor] = []
        self.clipped: list[Tensor] = []
        self.ratio_max_dev = 0.0
        self.norms: dict[str, list[float]] = {}

    def add(self, output: ObjectiveOutput, loss: Tensor, is_first: bool) -> None:
        self.loss.append(loss)
        if is_first:
            self.ratio_max_dev = max(self.ratio_max_dev, float((output.ratio - 1).abs().max()))
        if output.clipped is not None:
            self.clipped.append(output.clipped.float().mean())

    def add_norms(self, norms: dict[str, float]) -> None:
        for name, norm in norms.items():
            self.norms.setdefault(name, []).append(norm)

    def metrics(self) -> dict[str, float | list[float]]:
        updates = len(self.norms["policy"])
        measured: dict[str, float | list[float]] = {
            "loss": float(torch.stack(self.loss).sum()) / updates,
            "ratio_max_dev": self.ratio_max_dev,
        }
        if self.clipped:
            measured["clip_frac"] = float(torch.stack(self.clipped).mean())
        return measured | {f"grad_norm_{name}": sum(norms) / len(norms) for name, norms in self.norms.items()}
