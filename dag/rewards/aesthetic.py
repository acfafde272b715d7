"""LAION's aesthetic predictor: linear layers on the unit-length CLIP ViT-L/14 image embedding. Prompts are ignored."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dag.recipe.reward_sections import Aesthetic as Section
from dag.rewards.clip import VIT_L
from dag.rewards.clip_reward import ClipReward
from dag.rewards.registry import REWARDS
from dag.rewards.tower import LinearHead
from dag.rewards.weights import Published, locate, read_state

HEAD = Published("trl-lib/ddpo-aesthetic-predictor", ("aesthetic-model.pth",))


@REWARDS.register("aesthetic")
class Aesthetic(ClipReward):
    """A score of about 1..10, unbounded. It is an affine function of the embedding, so only one direction in CLIP space counts."""

    def __init__(self, section: Section, device: torch.device) -> None:
        super().__init__(section, device, VIT_L)
        state = read_state("aesthetic.head", locate("aesthetic.head", section.head, HEAD))
        self.head = LinearHead("aesthetic.head", state, self.tower.model.config.projection_dim).to(device)

    def score(self, images: Tensor, prompts: Sequence[str], *, smooth: bool) -> Tensor:
        return self.head(self.tower.embed_images(images, smooth=smooth))

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.head.to(device)
