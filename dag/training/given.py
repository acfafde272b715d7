"""Makes trajectories of a folder's pictures: encoded by the VAE, noised by P_B, scored by the recipe's rewards.

The reward is that of the decoded end of the trajectory, as for sampled ones: the balance needs one reward for a state, whoever
found the state. So it is the reward of the picture up to what the VAE, and the noise level at which the schedule ends, lose.

Legend: B pictures of a tile, T transitions.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dag.chain.noising import last_state, noised_chain
from dag.chain.rollout import Batch, SampledTile, assemble, last_latents, score_tile
from dag.chain.sample_ids import of_given
from dag.chain.trajectory import ChainStore, Trajectories
from dag.errors import RunError
from dag.recipe import Recipe, captions
from dag.run.meter import PhaseMeter
from dag.run.processes import Processes
from dag.training.build import Components
from dag.training.epoch_state import EpochState
from dag.training.safe_points import Steps, agreed
from dag.training.scoring import Scorer


class Given:
    """This process's share of the given pictures of each epoch, as trajectories."""

    def __init__(self, recipe: Recipe, components: Components, processes: Processes, meter: PhaseMeter) -> None:
        self.recipe, self.components, self.processes, self.meter = recipe, components, processes, meter
        self.policy, self.schedule = components.policy, components.policy.schedule
        self.prompt_id = {text: number for number, text in enumerate(components.prompts)}
        self.side = self.policy.latent_shape[1] * self.policy.decoder.side

    def store(self) -> ChainStore | None:
        """A new store for the chains of this process's share, or for their ends alone; None without a folder."""
        if self.recipe.data.folder is None:
            return None
        num_states = 1 if self.recipe.objective.num_draws else self.schedule.num_transitions + 1
        device = self.components.device
        place = torch.device("cpu") if self.recipe.memory.chains == "cpu" else device
        return ChainStore(num_states, self.recipe.train.trajectories // self.processes.size, place, device)

    def batch(self, epoch: int) -> tuple[Batch, list[Path]]:
        """(the prompts and sample ids, the files) of this process's share of an epoch."""
        count, pictures = self.recipe.train.trajectories, self.components.pictures
        per_group, updates = self.recipe.prompts.per_group, self.recipe.train.updates
        drawn = torch.from_numpy(captions.draw(pictures, count, self.recipe.seed, epoch, per_group))
        ids, mine = of_given(epoch * count, count, per_group), self.processes.mine
        chosen = [pictures[number] for number in mine(drawn, updates).tolist()]
        prompt_id = torch.tensor([self.prompt_id[picture.text] for picture in chosen])
        return Batch(prompt_id, mine(ids, updates)), [picture.file for picture in chosen]

    def steps(
        self,
        state: EpochState,
        tile: int,
        on_rows: Callable[[int], object] = lambda n: None,
        on_images: Callable[[int], object] = lambda n: None,
    ) -> Steps:
        """Make the trajectories of an epoch that `state` does not have yet. Yields after each tile; see `Sampling.steps`."""
        assert state.given_store is not None
        batch, files = self.batch(state.epoch)
        done = state.num_given
        tiles = batch.tail(done).tiles(tile)
        for number, part in enumerate(tiles):
            start = done + number * tile
            of_tile = files[start : start + len(part.sample_id)]
            chain, scored = agreed(self.processes, partial(self._tile, part, of_tile))
            state.given_store.put(chain)
            state.given.append(scored)
            on_rows(scored.log_pf.numel())
            on_images(len(of_tile))
            yield

    @torch.no_grad()
    def _tile(self, batch: Batch, files: list[Path]) -> tuple[Tensor, Trajectories]:
        """(chain (T + 1, B, C, H, W), scored trajectories without it) of a tile. log P_F is 0: no policy sampled them."""
        recipe, device = self.recipe, self.components.device
        ids, text = batch.sample_id.to(device), self.components.text[batch.prompt_id].to(device)
        with self.meter.phase("sample"):
            images = torch.stack([read_picture(file, self.side) for file in files])
            x_0 = self.policy.decoder.encode(images)
            zeros = torch.zeros(len(files), self.schedule.num_transitions, device=device)
            if recipe.objective.num_draws:
                chain, log_pb = last_state(self.schedule, x_0, ids, recipe.seed, recipe.sampler), zeros
            else:
                chain, log_pb = noised_chain(self.schedule, x_0, ids, recipe.seed, recipe.sampler)
                log_pb = self._pretrained(chain, text) if recipe.samples_prior else log_pb
            made = SampledTile(chain, zeros, log_pb, {}, last_latents(self.policy, chain[-1], text))
        with self.meter.phase("reward"):
            score = Scorer(recipe, self.policy, self.components.reward, self.components.prompts, batch)
            _, reward, _ = score_tile(self.policy, made, score)
        return chain, assemble(made, None, reward, batch, recipe.seed, recipe.sampler)

    def _pretrained(self, chain: Tensor, text: Tensor) -> Tensor:
        """(B, T) the pretrained model's log P_F along the chains."""
        columns = []
        for k, (x_t, x_next) in enumerate(pairwise(chain)):
            t = self.schedule.timesteps[k].expand(len(x_t))
            output = self.policy.predict(x_t, t, text, pretrained=True).guided
            columns.append(self.schedule.log_pf(x_t, x_next, output, k))
        return torch.stack(columns, dim=1)


def read_picture(file: Path, side: int) -> Tensor:
    """(3, side, side) float32 in [0, 1]: the picture's middle square, resized. Raises RunError."""
    try:
        with Image.open(file) as picture:
            square = ImageOps.fit(
                ImageOps.exif_transpose(picture).convert("RGB"), (side, side), Image.Resampling.BICUBIC
            )
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RunError(f"data.folder: {file} cannot be read as a picture: {error}") from None
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
