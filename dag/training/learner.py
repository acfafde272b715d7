"""The policy, objective, state flow, optimizers and scales that training carries from rollout to rollout.

`StoredTraining` and `OnePass` are the two ways of training a learner.

Legend: N trajectories, T transitions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from dag_kernels import penalty
from torch import Generator, Tensor, nn
from torch.nn import functional

from dag.chain.policy import Policy
from dag.chain.rollout import Score, last_latents
from dag.chain.trajectory import Rows, Trajectories, cut, on_cpu
from dag.objectives import Objective
from dag.objectives.log_scale import LogScale, RewardScale
from dag.recipe import Balance, DirectPreference, Recipe, ScalarBalance
from dag.run.processes import ALONE, Processes
from dag.training.ascent import Ascent
from dag.training.critic_fit import CriticFit, preview_steps
from dag.training.denoising import Denoising
from dag.training.embeddings import Embeddings
from dag.training.faults import NotFiniteError, not_finite
from dag.training.flow_fit import FlowFit
from dag.training.flow_gradient import FlowGradient
from dag.training.loss import Loss, Losses, Rollout
from dag.training.optimizer import ClippedOptimizer
from dag.training.past import PastPolicies
from dag.training.pull import Pulls
from dag.training.trust_region import TrustRegion
from dag.training.updates import Updates

# A flow-only update takes this many times as many transitions as a micro-batch: the flow is far cheaper than the denoiser.
_FLOW_BATCHES = 8
# Trajectories whose states the critic values in one call.
_VALUED_AT_ONCE = 64
# Trajectories at whose previews the critic's gradient is compared with the exact one.
_COMPARED = 8


@dataclass(frozen=True)
class Lesson:
    """What the reward critic learns from one process's trajectories."""

    latents: Tensor
    """(N, S, C, H, W) float16 clean latents, on the CPU."""
    reward: Tensor
    """(N, S) the learnt part of their rewards; for a baseline, the reward of the final picture."""
    prompt_id: Tensor
    """(N,) int64 on the CPU."""
    cosine: Tensor | None
    """() agreement of the critic's gradient with the exact one before the lesson; None where there is no exact one."""


class Learner:
    """The state of training that outlives an epoch, apart from counters of the loop.

    Args:
        optimizer: the policy's optimizer.
        flow_fit:  the state flow; None for objectives without one.
        critic_fit: the reward critic; None if no reward's gradient is learnt.
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
        critic_fit: CriticFit | None,
        text: Embeddings,
        warn: Callable[[str], object] = print,
        processes: Processes = ALONE,
    ) -> None:
        self.recipe, self.objective, self.text = recipe, objective, text
        self.flow_fit, self.critic_fit = flow_fit, critic_fit
        self.policy, self.schedule, self.processes = policy, policy.schedule, processes
        self.device = self.schedule.timesteps.device
        self.log_scale = LogScale(recipe, self.schedule, policy.latent_shape)
        section = recipe.objective
        takes_gradient = isinstance(section, Balance) and section.takes_gradient
        parts = recipe, policy, flow_fit, critic_fit, text, self.log_scale
        pulls = Pulls(recipe, policy, FlowGradient(*parts), self.log_scale) if takes_gradient else None
        self.loss = Loss(recipe, policy, objective, flow_fit, pulls, text, self.log_scale)
        self.past: PastPolicies | None = None
        if isinstance(section, DirectPreference) and section.reference == "past":
            self.past = PastPolicies(section.past, policy)
        self.losses = self._losses()
        flow, T = None if flow_fit is None else flow_fit.optimizer, self.schedule.num_transitions
        region = TrustRegion(recipe.train.max_kl, policy, text, optimizer, processes)
        self.updates = Updates(recipe, optimizer, flow, T, self.device, warn, processes, self._informativeness, region)

    def _losses(self) -> Losses:
        """What computes the objective's losses on stored rollouts."""
        section = self.recipe.objective
        if section.takes_gradient and not isinstance(section, Balance):
            return Ascent(self.recipe, self.policy, self.loss, self.log_scale)
        return Denoising(self.recipe, self.policy, self.loss, self.past) if section.num_draws else self.loss

    def rollout(
        self,
        trajectories: Trajectories,
        epoch: int,
        score: Score | None = None,
        groups: int = 1,
        *,
        is_new: bool = True,
        is_off_policy: bool = False,
    ) -> Rollout:
        """The rollout of these trajectories, with their log-probs and rewards on the objective's scale.

        Args:
            score:  see `Rollout.score`.
            groups: the number of updates that share the trajectories.
            is_new: the scales have not learnt from these trajectories yet; now they do.
            is_off_policy: see `Rollout`.

        Raises:
            NotFiniteError: a number of the trajectories, in any process, is not finite.
        """
        bad = not_finite(trajectories)
        if self.processes.any((bad is not None,))[0]:
            raise NotFiniteError(bad or "a number of another process is not finite")
        if self.recipe.target is None:
            return Rollout(trajectories, None, epoch, groups, score, is_off_policy)
        if is_new:
            previews = trajectories.x0_hat_reward
            everyones = None if previews is None else self.processes.everyones(previews, groups)
            self.log_scale.see(self.processes.everyones(trajectories.reward, groups), everyones)
        terms = self.log_scale.terms(trajectories, epoch)
        return Rollout(trajectories, terms, epoch, groups, score, is_off_policy)

    @property
    def value_fit(self) -> FlowFit | None:
        """The state flow if it is trained by the residuals of its values; None without a flow, or if its gradients are."""
        return self.flow_fit if self.recipe.objective.fits_flow else None

    def fit_flow(self, rollout: Rollout) -> None:
        """Train the flow alone on a rollout, `flow.passes` times, each with its own shuffle."""
        section, batch = self.recipe.objective, _FLOW_BATCHES * self.recipe.train.micro_batch
        assert self.flow_fit is not None and rollout.terms is not None
        huber = section.huber if isinstance(section, ScalarBalance) else None
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

    def critic_lesson(self, trajectories: Trajectories, score: Score | None) -> Lesson | None:
        """What the reward critic learns from this process's trajectories, or None without a critic. Nothing is changed yet."""
        section = self.recipe.forward_looking
        if self.critic_fit is None:
            return None
        if self.recipe.objective.takes_values:
            steps = preview_steps(self.schedule.num_transitions, 1)
            reward = trajectories.reward[:, None].expand(-1, len(steps) + 1)
            return Lesson(self._previews(trajectories, steps), reward, trajectories.prompt_id, None)
        assert section is not None and score is not None and trajectories.x0_hat_reward is not None
        steps = preview_steps(self.schedule.num_transitions, section.stride)
        latents = self._previews(trajectories, steps)
        reward = torch.cat([trajectories.x0_hat_reward[:, steps], trajectories.reward[:, None]], dim=1)
        if any(self.recipe.exact_rewards):
            reward = reward - self._exact_part(latents, score)
        cosine = self._agreement(latents[:_COMPARED, len(steps) // 2], trajectories.prompt_id, score)
        return Lesson(latents, reward, trajectories.prompt_id, cosine)

    def fit_critic(self, lesson: Lesson | None, groups: int = 1) -> dict[str, float]:
        """Train the reward critic on the lessons of all processes. Returns its metrics; empty without a critic.

        Args:
            groups: the number of updates that share the trajectories.
        """
        if self.critic_fit is None or lesson is None:
            return {}
        parts = lesson.latents, lesson.reward, lesson.prompt_id
        latents, reward, prompt_id = (self.processes.everyones(part, groups) for part in parts)
        measured = self.critic_fit.learn(latents, reward, prompt_id)
        if lesson.cosine is not None:
            measured["critic_cosine"] = float(self.processes.sum(lesson.cosine)) / self.processes.size
        return measured

    @torch.no_grad()
    def state_values(self, trajectories: Trajectories, rows: Rows) -> Tensor | None:
        """(B, T) the final rewards that the critic expects from x0_hat at every state, or None if the objective takes none."""
        if self.critic_fit is None or not self.recipe.objective.takes_values:
            return None
        found, T = [], self.schedule.num_transitions
        for part in cut(rows, _VALUED_AT_ONCE):
            prompt_id = trajectories.prompt_id[on_cpu(part)]
            x0_hats = (trajectories.x0_hat_old(self.schedule, part, k) for k in range(T))
            found.append(torch.stack([self.critic_fit.value(x0_hat, prompt_id) for x0_hat in x0_hats], dim=1))
        return torch.cat(found)

    def _agreement(self, latents: Tensor, prompt_id: Tensor, score: Score) -> Tensor | None:
        """() the mean cosine of the critic's gradient and the exact one at a few latents (B, C, H, W), as the last updates used it.

        None where a learnt reward has no gradient, and before the critic has learnt. One latent at a time: the graph of a decoder
        is large, and a number for the metrics shall not decide how much memory a run needs.
        """
        assert self.critic_fit is not None
        learnt = [t for t, is_learnt in zip(self.recipe.reward, self.recipe.learnt_rewards, strict=True) if is_learnt]
        if not all(term.has_gradient for term in learnt) or self.critic_fit.rollouts == 0:
            return None
        cosines = []
        for row in torch.arange(len(latents)).split(1):
            x = latents[row].to(self.device, torch.float32)
            exact = score.gradient(x, row, is_preview=True, is_learnt=True)[1]
            ours = self.critic_fit.value_and_gradient(x, prompt_id[row])[1]
            cosines.append(functional.cosine_similarity(exact.flatten(1), ours.flatten(1)))
        return torch.cat(cosines).mean()

    @torch.no_grad()
    def _previews(self, trajectories: Trajectories, steps: Sequence[int]) -> Tensor:
        """(N, S, C, H, W) float16 clean latents, on the CPU: x0_hat at some steps, and the final latents."""
        if trajectories.previews is not None:
            return trajectories.previews
        found, T = [], self.schedule.num_transitions
        for rows in cut(slice(0, trajectories.num_trajectories), self.updates.micro_batch):
            x0_hats = [trajectories.x0_hat_old(self.schedule, rows, k).half() for k in steps]
            text = self.text.rows(trajectories.prompt_id[on_cpu(rows)])
            final = last_latents(self.policy, trajectories.states(T, rows), text)
            found.append(torch.stack([*x0_hats, final.half()], dim=1).cpu())
        return torch.cat(found)

    @torch.no_grad()
    def _exact_part(self, latents: Tensor, score: Score) -> Tensor:
        """(N, S) the sum of the rewards that are not learnt, at clean latents (N, S, C, H, W)."""
        columns = []
        for number, column in enumerate(latents.unbind(1)):
            is_preview, parts = number < latents.shape[1] - 1, []
            for rows in torch.arange(len(latents)).split(self.updates.micro_batch):
                x = column[rows].to(self.device, torch.float32)
                images = (self.policy.preview if is_preview else self.policy.decode)(x)
                parts.append(score.exact(images, rows, is_preview=is_preview).to(self.device))
            columns.append(torch.cat(parts))
        return torch.stack(columns, dim=1)

    def networks(self) -> list[nn.Module]:
        """The networks that are trained beside the policy."""
        flow = [] if self.flow_fit is None else [self.flow_fit.flow]
        return [*flow, *([] if self.critic_fit is None else [self.critic_fit.critic])]

    def optimizers(self) -> Iterator[ClippedOptimizer]:
        """All optimizers: those of the policy's updates, then the critic's if there is one."""
        yield from self.updates.optimizers()
        if self.critic_fit is not None:
            yield self.critic_fit.optimizer

    def _informativeness(self) -> Tensor:
        """(T,) how much of the reward each step decides."""
        assert self.log_scale.look_ahead is not None
        return self.log_scale.look_ahead.informativeness()

    # -- what a checkpoint keeps ---------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The running statistics of the flow's residuals and of the rewards along a chain, and earlier policies."""
        look_ahead = self.log_scale.look_ahead
        found = {} if look_ahead is None else look_ahead.tensors()
        if self.flow_fit is not None:
            found |= {"residual_scale": self.flow_fit.residual_scale, "baseline": self.flow_fit.baseline}
        return found if self.past is None else found | self.past.tensors()

    def state_dict(self) -> dict[str, Any]:
        """The state's plain numbers, for JSON. A checkpoint stores weights, optimizer states and `tensors` separately."""
        return (
            self.updates.state_dict()
            | {
                "is_calibrated": self.flow_fit is not None and self.flow_fit.is_calibrated,
                "reward_scale": asdict(self.log_scale.reward_scale),
                "objective": self.objective.state_dict(),
            }
            | ({} if self.critic_fit is None else {"critic": self.critic_fit.state_dict()})
        )

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.updates.load_state_dict(state)
        self.log_scale.reward_scale = RewardScale(**state["reward_scale"])
        self.objective.load_state_dict(state["objective"])
        if self.flow_fit is not None:
            self.flow_fit.is_calibrated = state["is_calibrated"]
            self.flow_fit.residual_scale = tensors["residual_scale"].to(self.device)
            self.flow_fit.baseline = tensors["baseline"].to(self.device)
        if self.log_scale.look_ahead is not None:
            self.log_scale.look_ahead.load(tensors)
        if self.past is not None:
            self.past.load(tensors)
