"""The denoiser, the decoder and the reward for the particles of one picture, in tiles, with a count of their work.

Legend: B particles, T transitions, x_k the state before transition k and x_T the clean latent.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dag.chain.policy import Policy, Prediction
from dag.chain.rollout import first_state, last_latents, take_step
from dag.chain.schedule import Schedule
from dag.recipe import Sampler
from dag.rewards import RewardSum


@dataclass
class Work:
    """What pictures have cost so far."""

    passes: float = 0.0
    """Guided forward passes of the denoiser for one sample; a backward pass counts as 1.2 of them."""
    scored: int = 0
    """Pictures that were decoded and scored."""


@dataclass(frozen=True)
class Ends:
    """B final pictures."""

    images: Tensor
    """(B, 3, H, W) in [0, 1], on the CPU."""
    reward: Tensor
    """(B,) float32 on the CPU."""


class Particles:
    """Denoises B particles of one prompt step by step.

    The noise of a step is a function of seed, id and step, so particles that share a state part if their ids differ.

    Args:
        text:   (1, S, D) the prompt's embedding.
        tile:   particles per network call, and per call of decoder and reward.
    """

    def __init__(
        self, policy: Policy, reward: RewardSum, sampler: Sampler, seed: int, text: Tensor, prompt: str, tile: int
    ) -> None:
        self.policy, self.reward, self.sampler, self.seed = policy, reward, sampler, seed
        self.text, self.prompt, self.tile, self.work = text, prompt, tile, Work()

    @property
    def schedule(self) -> Schedule:
        return self.policy.schedule

    def start(self, ids: Tensor) -> Tensor:
        """(B, C, H, W) the first states, pure noise of the ids (B,)."""
        return first_state(self.policy, self._on_device(ids), self.seed, self.sampler)

    @torch.no_grad()
    def outputs(self, x: Tensor, k: int) -> Tensor:
        """(B, C, H, W) float32 the network's guided outputs at the states x before step k."""
        self.work.passes += len(x)
        t = self.schedule.timesteps[k]
        return self._tiled(lambda part: self.policy.predict(part, t.expand(len(part)), self.text_of(part)).guided, x)

    def step(self, x: Tensor, outputs: Tensor, k: int, ids: Tensor) -> Tensor:
        """(B, C, H, W) the next states, with the noise of the ids (B,)."""
        prediction = Prediction(outputs, len(x), 1.0, outputs)
        return take_step(self.schedule, x, prediction, k, self.seed, self._on_device(ids), self.sampler).x_next

    def walk(self, x: Tensor, ids: Tensor) -> Iterator[Tensor]:
        """The T + 1 states (B, C, H, W) of the chains that begin in x, x first, with the noise of the ids (B,)."""
        yield x
        for k in range(self.schedule.num_transitions):
            x = self.step(x, self.outputs(x, k), k, ids)
            yield x

    def drawn(self, ids: Tensor) -> Ends:
        """The pictures of the ids (B,) as the policy draws them without a search, and their rewards."""
        x = self.start(ids)
        for state in self.walk(x, ids):
            x = state
        return self.finish(x)

    @torch.no_grad()
    def look(self, x: Tensor, outputs: Tensor, k: int) -> Tensor:
        """(B,) float32 on the CPU: the rewards of the pictures of x0_hat at the states x before step k."""
        clean = self.schedule.x0_hat(x.float(), outputs, k)
        self.work.scored += len(x)
        rewards = [self._scored(self.policy.preview(part), is_preview=True) for part in clean.split(self.tile)]
        self.reward.check()
        return torch.cat(rewards).cpu()

    @torch.no_grad()
    def finish(self, x: Tensor) -> Ends:
        """The pictures of the last states x (B, C, H, W), and their rewards."""
        self.work.passes += 0 if self.schedule.final is None else len(x)
        self.work.scored += len(x)
        images = self._tiled(lambda part: self.policy.decode(last_latents(self.policy, part, self.text_of(part))), x)
        rewards = [self._scored(part, is_preview=False) for part in images.split(self.tile)]
        return Ends(images.cpu(), torch.cat(rewards).cpu())

    def _scored(self, images: Tensor, *, is_preview: bool) -> Tensor:
        return self.reward.total(images, [self.prompt] * len(images), is_preview=is_preview)

    def text_of(self, x: Tensor) -> Tensor:
        """(B, S, D) the prompt's embedding for each of the states x."""
        return self.text.expand(len(x), -1, -1)

    def _tiled(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([call(part) for part in x.split(self.tile)])

    def _on_device(self, ids: Tensor) -> Tensor:
        return ids.to(self.schedule.timesteps.device)
