"""Fits the reward critic to the rewards of the newest rollouts, and differentiates it.

Its examples are previews: clean latents predicted from some states of each trajectory, and the final latent, with their
rewards. Some trajectories are held out; training stops when the error on them stops falling, and the best weights are kept.

Legend: N trajectories, S previews of each, M previews, B samples.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from dag.objectives.reward_critic import RewardCritic
from dag.recipe import Recipe, is_scored
from dag.run.processes import ALONE, Processes
from dag.training.optimizer import ClippedOptimizer

# Previews of a trajectory that are kept, the final latent included: neighbouring states have almost the same.
_MOST_PREVIEWS = 12
_BATCH = 64
# Passes without a lower error on the held-out previews after which training stops.
_PATIENCE = 2


def preview_steps(num_transitions: int, stride: int) -> list[int]:
    """The states whose x0_hat the critic sees, evenly spread over those that are scored; the final latent comes on top."""
    scored = [k for k in range(num_transitions) if is_scored(k, num_transitions, stride)]
    count = min(len(scored), _MOST_PREVIEWS - 1)
    return [scored[round(i * (len(scored) - 1) / max(1, count - 1))] for i in range(count)]


@dataclass(frozen=True)
class Previews:
    """M previews with their rewards, on the CPU, the same in all processes."""

    latents: Tensor
    """(M, C, H, W) float16."""
    reward: Tensor
    """(M,) float32, the learnt part of the reward."""
    prompt_id: Tensor
    """(M,) int64."""
    rollout: Tensor
    """(M,) int64, the number of the rollout that each comes from."""
    is_held_out: Tensor
    """(M,) bool."""

    @classmethod
    def of(cls, latents: Tensor, reward: Tensor, prompt_id: Tensor, number: int, held_out: float) -> "Previews":
        """The previews of one rollout.

        Args:
            latents:   (N, S, C, H, W) on any device.
            reward:    (N, S).
            prompt_id: (N,).
            number:    of the rollout.
            held_out:  share of the trajectories that are held out, evenly spread; at least one is, and one is not.
        """
        N, S = reward.shape
        is_held_out = torch.arange(N) % max(2, round(1 / held_out)) == 0
        return cls(
            latents.flatten(0, 1).to("cpu", torch.float16),
            reward.flatten().float().cpu(),
            prompt_id.repeat_interleave(S),
            torch.full((N * S,), number),
            is_held_out.repeat_interleave(S),
        )

    def __getitem__(self, rows: Tensor) -> "Previews":
        """Some of the previews, by a mask or by indices."""
        return Previews(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.reward)

    def and_newer(self, newer: "Previews", rollouts: int) -> "Previews":
        """These previews and newer ones, of at most so many rollouts."""
        joined = (torch.cat([getattr(self, field.name), getattr(newer, field.name)]) for field in fields(self))
        return (together := Previews(*joined))[together.rollout > int(newer.rollout[0]) - rollouts]


class CriticFit:
    """The critic with its optimizer and its examples.

    Args:
        optimizer: the critic's optimizer.

    Attributes:
        previews: of the newest rollouts; None before the first.
        mean, sd: of the first rollout's rewards, by which all are standardised.
        rollouts: the number of rollouts so far; before the first the critic's gradient is meaningless.
    """

    def __init__(
        self, critic: RewardCritic, optimizer: ClippedOptimizer, recipe: Recipe, processes: Processes = ALONE
    ) -> None:
        self.critic, self.optimizer, self.section, self.seed = critic, optimizer, recipe.reward_critic, recipe.seed
        self.processes, self.device = processes, critic.prompts.device
        self.previews: Previews | None = None
        self.mean, self.sd, self.rollouts = 0.0, 1.0, 0

    # -- what the policy's update asks ---------------------------------------------------------------------------

    def value_and_gradient(self, latents: Tensor, prompt_id: Tensor) -> tuple[Tensor, Tensor]:
        """(learnt rewards (B,), their gradients (B, C, H, W)) at clean latents, float32, in the reward's own unit.

        Args:
            latents:   (B, C, H, W) on the device.
            prompt_id: (B,) int64 on the CPU.
        """
        with torch.enable_grad():
            x = latents.detach().float().requires_grad_(True)
            value = self.mean + self.sd * self.critic(x, prompt_id.to(self.device))
            (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), gradient

    @torch.no_grad()
    def value(self, latents: Tensor, prompt_id: Tensor) -> Tensor:
        """(B,) learnt rewards at clean latents. Arguments as for `value_and_gradient`."""
        return self.mean + self.sd * self.critic(latents.float(), prompt_id.to(self.device))

    # -- fitting -------------------------------------------------------------------------------------------------

    def learn(self, latents: Tensor, reward: Tensor, prompt_id: Tensor) -> dict[str, float]:
        """Add a rollout's previews, drop the oldest, and train. Arguments as for `Previews.of`, of all processes together.

        Returns:
            Metrics: the correlation with the rewards of this rollout before it was trained on (from the second rollout on), and
            after that on the trajectories that are held out; the mean smooth absolute error on all that are held out, in
            standard deviations of the first rollout's reward.
        """
        newest = Previews.of(latents, reward, prompt_id, self.rollouts, self.section.held_out)
        measured = {}
        if self.previews is None:
            self.mean, sd = float(newest.reward.mean()), float(newest.reward.std(correction=0))
            self.previews, self.sd = newest, sd if sd > 0 else 1.0
        else:
            measured["critic_correlation_before"] = self._correlation(newest)
            self.previews = self.previews.and_newer(newest, self.section.rollouts)
        measured["critic_error"] = self._train(self.previews, len(newest))
        measured["critic_correlation"] = self._correlation(newest[newest.is_held_out])
        self.rollouts += 1
        return measured

    def _train(self, previews: Previews, newest: int) -> float:
        """Train until the error on the held-out previews stops falling, and take the best weights. Returns their error.

        Args:
            newest: how many previews the newest rollout has; a pass goes over twice as many, however many there are.
        """
        training, held_out = previews[~previews.is_held_out], previews[previews.is_held_out]
        generator = Generator().manual_seed(self.seed * 1_000_003 + self.rollouts)
        passes = self.section.passes * (2 if self.rollouts == 0 else 1)
        best, weights, stale = self._error(held_out), self._weights(), 0
        for _ in range(passes):
            for batch in torch.randperm(len(training), generator=generator)[: 2 * newest].split(_BATCH):
                self._step(training[batch])
            # All processes stop at the same pass, whatever their devices round to.
            error = self.processes.from_main(self._error(held_out))
            if error < best:
                best, weights, stale = error, self._weights(), 0
            elif (stale := stale + 1) == _PATIENCE:
                break
        self.critic.load_state_dict(weights)
        return best

    def _weights(self) -> dict[str, Tensor]:
        """A copy of the critic's weights."""
        return {name: weight.clone() for name, weight in self.critic.state_dict().items()}

    def _step(self, batch: Previews) -> None:
        """One optimizer step, of which each process computes the gradients of its share."""
        self.optimizer.zero_grad()
        mine = batch[torch.arange(self.processes.rank, len(batch), self.processes.size)]
        if len(mine):
            (self._losses(mine).sum() / len(batch)).backward()
        self.processes.sum_gradients(self.optimizer.parameters)
        self.optimizer.step()
        self.optimizer.check()

    @torch.no_grad()
    def _error(self, previews: Previews) -> float:
        """The mean loss of some previews."""
        parts = [self._losses(previews[index]) for index in torch.arange(len(previews)).split(_BATCH)]
        return float(torch.cat(parts).mean())

    def _losses(self, previews: Previews) -> Tensor:
        """(M,) smooth absolute errors in standard deviations of the reward: a few odd previews do not own the gradient."""
        target = ((previews.reward - self.mean) / self.sd).to(self.device)
        return functional.smooth_l1_loss(self._predicted(previews), target, reduction="none")

    @torch.no_grad()
    def _correlation(self, previews: Previews) -> float:
        """The correlation between predicted and true rewards; 0 if either does not vary."""
        parts = [self._predicted(previews[index]) for index in torch.arange(len(previews)).split(_BATCH)]
        both = torch.stack([torch.cat(parts).cpu(), previews.reward]).double()
        return float(torch.corrcoef(both)[0, 1].nan_to_num())

    def _predicted(self, previews: Previews) -> Tensor:
        return self.critic(previews.latents.to(self.device), previews.prompt_id.to(self.device))

    # -- what a checkpoint keeps ---------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The critic's weights, and the previews."""
        previews = {} if self.previews is None else {f"previews/{name}": t for name, t in vars(self.previews).items()}
        return {f"critic/{name}": t for name, t in self.critic.state_dict().items()} | previews

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {"mean": self.mean, "sd": self.sd, "rollouts": self.rollouts, "skipped": self.optimizer.skipped}

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore what `state_dict` and `tensors` returned."""
        self.mean, self.sd, self.rollouts = state["mean"], state["sd"], state["rollouts"]
        self.optimizer.skipped = state["skipped"]
        parts: dict[str, dict[str, Tensor]] = {"critic": {}, "previews": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = tensor
        self.critic.load_state_dict(parts["critic"])
        self.previews = Previews(**parts["previews"]) if parts["previews"] else None
