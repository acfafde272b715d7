"""Samples and scores the trajectories of an epoch.

Legend: N trajectories of an epoch, B of a tile, T transitions.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dag.chain.rollout import Batch, Score, assemble, sample_tile, score_tile
from dag.chain.sample_ids import start_ids
from dag.chain.trajectory import ChainStore, Trajectories
from dag.recipe import Recipe, is_scored, prompts
from dag.run.meter import PhaseMeter
from dag.run.processes import Processes
from dag.training.build import Components
from dag.training.epoch_state import EpochState
from dag.training.safe_points import Steps, agreed
from dag.training.scoring import Scorer


class Sampling:
    """Samples and scores this process's share of an epoch's trajectories."""

    def __init__(self, recipe: Recipe, components: Components, processes: Processes, meter: PhaseMeter) -> None:
        self.recipe, self.components, self.processes, self.meter = recipe, components, processes, meter

    def batch(self, epoch: int) -> Batch:
        """The prompts and sample ids of this process's share of an epoch."""
        count, updates = self.recipe.train.trajectories, self.recipe.train.updates
        per_group = self.recipe.prompts.per_group
        drawn = prompts.draw(self.components.num_sampled, count, self.recipe.seed, epoch, per_group)
        ids = epoch * count + torch.arange(count)
        return Batch(self.processes.mine(torch.from_numpy(drawn), updates), self.processes.mine(ids, updates))

    def store(self) -> ChainStore:
        """A new store for the chains of this process's share."""
        device, num_states = self.components.device, self.components.policy.schedule.num_transitions + 1
        place = torch.device("cpu") if self.recipe.memory.chains == "cpu" else device
        return ChainStore(num_states, self.recipe.train.trajectories // self.processes.size, place, device)

    def scorer(self, batch: Batch) -> Score:
        """What scores images of a batch's trajectories."""
        made = self.components
        return Scorer(self.recipe, made.policy, made.reward, made.prompts, batch)

    def images_per_trajectory(self) -> int:
        """The number of pictures of a trajectory that are scored: the final one, and previews."""
        section, T = self.recipe.forward_looking, self.components.policy.schedule.num_transitions
        return 1 + (0 if section is None else sum(is_scored(k, T, section.stride) for k in range(T)))

    def steps(
        self,
        state: EpochState,
        tile: int,
        on_rows: Callable[[int], object] = lambda n: None,
        on_images: Callable[[int], object] = lambda n: None,
    ) -> Steps:
        """Sample and score the trajectories of an epoch that `state` does not have yet. Yields after each tile.

        Args:
            tile:      trajectories at a time. The noise is counter-based, hence the same for any number.
            on_rows:   called with the number of transitions just sampled, for a progress bar.
            on_images: called with the number of pictures just scored, for a progress bar.

        Raises:
            TooManyRowsError: a GPU ran out of memory in a tile. A new iterator over the same state continues.
        """
        for batch in self.batch(state.epoch).tail(state.num_sampled).tiles(tile):
            chain, scored = agreed(self.processes, partial(self._tile, batch, on_rows, on_images))
            state.store.put(chain)
            state.sampled.append(scored)
            yield

    def _tile(
        self, batch: Batch, on_rows: Callable[[int], object], on_images: Callable[[int], object]
    ) -> tuple[Tensor, Trajectories]:
        """(chain (T + 1, B, C, H, W), scored trajectories without it) of a tile."""
        recipe, policy, size = self.recipe, self.components.policy, len(batch.sample_id)
        with self.meter.phase("sample"):
            sampled = sample_tile(
                policy,
                self.components.text[batch.prompt_id],
                batch.sample_id,
                recipe.seed,
                recipe.sampler,
                recipe.forward_looking,
                recipe.samples_prior,
                start_ids(recipe.prompts, batch.sample_id),
                on_step=lambda: on_rows(size),
            )
        with self.meter.phase("reward"):
            x0_hat_reward, reward, _ = score_tile(policy, sampled, self.scorer(batch), on_image=lambda: on_images(size))
        return sampled.chain, assemble(sampled, x0_hat_reward, reward, batch, recipe.seed, recipe.sampler)
