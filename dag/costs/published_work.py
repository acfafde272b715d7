"""The amount of work that the published code does for an epoch, done with this project's networks: the baseline of `dag.bench`.

For each transition of a trained row: one forward and backward pass of both guidance branches, two more conditional forward
passes for x0_hat(x_t) and x0_hat(x_next), two decodes, two rewards and two flow evaluations. So every inner state is scored
twice. The rollout's states, next states and predictions are stored in bfloat16. All operations are plain PyTorch. Only the
amount of work is reproduced, not the published algorithm's results.

Legend: B rows, N trajectories, T transitions.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from dag_kernels import residual, with_rewarded_end
from torch import Tensor

from dag.chain.rollout import Batch, Score, last_latents, walk
from dag.recipe import Recipe
from dag.training.build import Components

Timer = Callable[[str], AbstractContextManager[None]]
"""Maps the name of a phase to a context that times it."""


@dataclass(frozen=True)
class _Stored:
    """What is stored of a tile: x_t, x_next and the guided output, (T, B, C, H, W) bfloat16 each, and rewards (B,)."""

    batch: Batch
    x_t: Tensor
    x_next: Tensor
    output: Tensor
    reward: Tensor


class Published:
    """The published loop: an epoch samples and stores all tiles, then makes one update over every transition."""

    def __init__(self, recipe: Recipe, components: Components, scorer: Callable[[Batch], Score]) -> None:
        self.recipe, self.components, self.scorer = recipe, components, scorer
        self.policy, self.learner = components.policy, components.learner
        self.schedule, self.device = self.policy.schedule, components.device

    def epoch(self, batch: Batch, timed: Timer) -> None:
        """Run one epoch on the trajectories of `batch`."""
        tiles = [self._sample(tile, timed) for tile in batch.tiles(self.recipe.sampler.tile)]
        with timed("update"):
            for optimizer in self.learner.updates.optimizers():
                optimizer.zero_grad()
            for tile in tiles:
                self._backward_all(tile, len(batch.sample_id))
            for optimizer in self.learner.updates.optimizers():
                optimizer.step()

    @torch.no_grad()
    def _sample(self, batch: Batch, timed: Timer) -> _Stored:
        with timed("sample"):
            text, ids = self.components.text[batch.prompt_id].to(self.device), batch.sample_id.to(self.device)
            triples = []
            for step in walk(self.policy, text, ids, self.recipe.seed, self.recipe.sampler):
                triples.append(tuple(x.bfloat16() for x in (step.x_t, step.x_next, step.prediction.guided)))
        with timed("reward"):
            images = self.policy.decode(last_latents(self.policy, step.x_next, text))
            reward = self.scorer(batch)(images, torch.arange(len(ids)))
        stored = [torch.stack(column) for column in zip(*triples, strict=True)]
        return _Stored(batch, stored[0], stored[1], stored[2], reward.to(self.device))

    def _backward_all(self, tile: _Stored, num_trajectories: int) -> None:
        for rows in torch.arange(len(tile.reward)).split(self.recipe.train.micro_batch):
            for k in range(self.schedule.num_transitions):
                self._backward(tile, rows, k, num_trajectories)

    def _backward(self, tile: _Stored, rows: Tensor, k: int, num_trajectories: int) -> None:
        """Forward and backward pass of one micro-batch at step k."""
        x_t, x_next = tile.x_t[k, rows].float(), tile.x_next[k, rows].float()
        text = self.components.text[tile.batch.prompt_id[rows]]
        is_last = torch.full((len(rows),), k == self.schedule.num_transitions - 1, device=self.device)
        output = self.policy.predict(x_t, self._t(k, len(rows)), text).guided
        log_pf = self.schedule.log_pf(x_t, x_next, output, k)
        following = min(k + 1, self.schedule.num_transitions - 1)
        log_F = self._log_F(tile, rows, x_t, k, text)
        log_F_next = with_rewarded_end(self._log_F(tile, rows, x_next, following, text), tile.reward[rows], is_last)
        delta = residual(log_F, log_pf, self.schedule.log_pb(x_t, x_next, k), log_F_next) / x_t[0].numel()
        pull = (output - tile.output[k, rows].float()).square().flatten(1).mean(1)
        loss = (delta.square() + pull).sum() / (num_trajectories * self.schedule.num_transitions)
        self.learner.updates.policy.backward(loss)

    def _log_F(self, tile: _Stored, rows: Tensor, x_t: Tensor, k: int, text: Tensor) -> Tensor:
        """log F (B,) of the states x_t at step k: the learnt flow plus the reward of their x0_hat."""
        assert self.learner.flow_fit is not None
        with torch.no_grad():
            conditional = self.policy.predict(x_t, self._t(k, len(rows)), text, unguided=True).conditional
            x0_hat = self.schedule.x0_hat(x_t, conditional.float(), k)
            reward = self.scorer(tile.batch)(self.policy.decode(x0_hat), rows).to(self.device)
        ks = torch.full((len(rows),), k, device=self.device)
        return self.learner.flow_fit.log_F_tilde_at(x_t, tile.batch.prompt_id[rows], ks) + reward

    def _t(self, k: int, rows: int) -> Tensor:
        return self.schedule.timesteps[k].expand(rows)
