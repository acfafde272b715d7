"""A reward's network with random weights, for benchmarks: the published one's work without its download."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dag.reward_terms import Tower
from dag.rewards.clip import DTYPES
from dag.rewards.footprint import architecture
from dag.rewards.pixels import CLIP_MEAN, CLIP_STD, Preprocessing
from dag.rewards.tower import TowerReward


class StandIn(TowerReward):
    """The mean of what the image tower makes of each picture; a text's side, encoded once a prompt, is left out."""

    def __init__(self, name: str, term: Tower, device: torch.device) -> None:
        super().__init__(term.max_batch, term.dtype)
        self.device, self.dtype = device, DTYPES[term.dtype]
        with torch.random.fork_rng(devices=[]), device:
            torch.manual_seed(0)
            self.towers, self.forward, size = architecture(name)
        for tower in self.towers:
            tower.to(self.dtype).eval().requires_grad_(False)
        self.preprocessing = Preprocessing(mean=CLIP_MEAN, std=CLIP_STD, size=size)

    def score(self, images: Tensor, prompts: Sequence[str], *, smooth: bool) -> Tensor:
        pixels = self.preprocessing.read(images.to(self.device), smooth=smooth).to(self.dtype)
        return self.forward(pixels).pooler_output.float().mean(1)

    def to(self, device: torch.device) -> None:
        self.device = device
        for tower in self.towers:
            tower.to(device)
